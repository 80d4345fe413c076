"""``qat serve`` as a process: start-up, signals, and the other engines it can start."""

import contextlib
import dataclasses
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time

import httpx
import openai
import pytest

from qat import cli
from qat.config import load
from qat.errors import UserError
from qat.serve import other_engines, server
from qat.serve.child import Launch, supervise
from qat.serve.engine import EngineOptions
from qat.serve.options import API_KEY, ServeOptions
from tests.qat.serve.serving import started, wait_until

IGNORE = {"ignore_eos": True}
GREEDY = {"model": "demo", "prompt": "This", "temperature": 0, "extra_body": IGNORE}


@pytest.fixture(autouse=True)
def _no_key(monkeypatch):
    monkeypatch.delenv(API_KEY, raising=False)


# --- the process ---------------------------------------------------------------------------------


def test_sigterm_under_load_loses_no_accepted_request(demo):
    """Streams and whole answers run while the signal comes; all end, later ones are refused."""
    environment = {API_KEY: "secret"}
    with started(demo, "max_sequences=4", "--kv-cache", "int8", **environment) as (
        process,
        url,
        printed,
    ):
        assert printed.startswith(f"serving demo at {url} ")
        assert "secret" not in printed
        assert "Ctrl-C to stop" in printed
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="secret", max_retries=0, timeout=120)
        # long enough that all are there, and the refusals seen, before the first has ended
        long = {"max_tokens": 200, **GREEDY}
        expected = client.completions.create(**long).choices[0].text
        results, refused = [], []

        def stream(place):
            chunks = client.completions.create(stream=True, **long)
            results.append("".join(chunk.choices[0].text for chunk in chunks))

        def whole(place):
            results.append(client.completions.create(**long).choices[0].text)

        # more than the batch holds: some wait in the queue when the signal comes
        threads = [threading.Thread(target=(stream, whole)[i % 2], args=(i,)) for i in range(8)]
        for thread in threads:
            thread.start()
        # one connection: a new client for each look takes longer than an answer
        with httpx.Client(base_url=url, headers={"Authorization": "Bearer secret"}) as looks:

            def in_flight():
                return "\nqat_requests_in_flight 8.0\n" in looks.get("/metrics").text

            wait_until(in_flight)
            process.send_signal(signal.SIGTERM)
            wait_until(lambda: looks.get("/health").status_code == 503)
        # while the answers go on, new requests are refused, and in the end nobody listens
        with contextlib.suppress(openai.APIConnectionError):
            while True:
                with pytest.raises(openai.APIStatusError) as caught:
                    client.completions.create(max_tokens=1, **GREEDY)
                refused.append(caught.value.status_code)
                time.sleep(0.02)
        for thread in threads:
            thread.join(60)
        assert process.wait(30) == 0
        assert results == [expected] * 8
        assert set(refused) == {503}
        assert process.stderr.read().endswith("stopping: accepted requests are being finished\n")


def test_a_second_signal_ends_it_at_once(demo):
    # one after the other: more than can end before the second signal
    body = {"prompt": "This", "max_tokens": 1000, "stream": True, "n": 16} | IGNORE
    with (
        started(demo, "max_sequences=1") as (process, url, _),
        httpx.Client(base_url=url) as client,
        client.stream("POST", "/v1/completions", json=body) as reply,
    ):
        lines = reply.iter_lines()  # kept: an iterator that is given up closes the stream
        next(lines)
        process.send_signal(signal.SIGINT)
        wait_until(lambda: client.get("/health").status_code == 503)
        process.send_signal(signal.SIGINT)
        assert process.wait(20) == 128 + signal.SIGINT


# --- start-up ------------------------------------------------------------------------------------


def test_ports_and_addresses_that_cannot_be_used(demo, capsys):
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        assert cli.main(["serve", str(demo), "--port", str(port)]) == 2
    error = capsys.readouterr().err
    assert f"host=127.0.0.1 port={port}: cannot listen there" in error
    assert "port=0 finds a free one" in error
    with pytest.raises(UserError, match=r"host=no\.such\.invalid: no such address"):
        server.bind("no.such.invalid", 8000)
    # one who binds at the same time and listens first wins
    with server.bind("127.0.0.1", 0) as first:
        port = first.getsockname()[1]
        with server.bind("127.0.0.1", port) as second:
            first.listen()
            with pytest.raises(OSError):
                second.listen()


def test_options():
    options = load(ServeOptions, ["port=0", "kv_cache=int4", "lora=[a=x/y,b=z]", "name=m"])
    assert (options.adapters, options.kv_cache) == ({"a": "x/y", "b": "z"}, "int4")
    assert isinstance(options, EngineOptions)
    for words, message in (
        (["port=70000"], "port=70000: 0 to 65535"),
        (["max_queued=0"], "max_queued=0: at least 1"),
        (["max_sequences=0"], "max_sequences=0: at least 1"),
        (["max_body_mib=0"], "max_body_mib=0.0: above 0"),
        (["drain_seconds=-1"], "drain_seconds=-1.0: 0 or more"),
        (["lora=[a]"], "lora=a: NAME=DIRECTORY"),
        (["lora=[a=x,a=y]"], "lora=a=y: a is given twice"),
        (["engine=sglang"], "engine=sglang"),
        (["kv_cache=int2"], "kv_cache=int2"),
    ):
        with pytest.raises(UserError) as caught:
            load(ServeOptions, words)
        assert str(caught.value).startswith(message)


def test_the_key_comes_from_the_option_or_the_environment(demo, monkeypatch, capsys):
    assert ServeOptions().key is None
    monkeypatch.setenv(API_KEY, "a")
    assert ServeOptions().key == "a"
    assert ServeOptions(api_key=" b\n").key == "b"
    with pytest.raises(ValueError, match="api_key is set but empty"):
        _ = ServeOptions(api_key=" ").key
    # a variable that was to hold a key and does not must not open the server
    monkeypatch.setenv(API_KEY, "")
    assert cli.main(["serve", str(demo)]) == 2
    assert "QAT_API_KEY is set but empty" in capsys.readouterr().err


def test_the_fingerprint_tells_what_computes(demo, tmp_path):
    plain = server.fingerprint(demo, ServeOptions())
    assert plain == server.fingerprint(demo, ServeOptions(port=1))
    assert plain != server.fingerprint(demo, ServeOptions(kv_cache="int8"))
    (tmp_path / "manifest.json").write_text("{}")
    assert plain != server.fingerprint(tmp_path, ServeOptions())


def test_missing_packages_and_no_artifact(demo, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(server, "PACKAGES", ("fastapi", "no_such_package"))
    assert cli.main(["serve", str(demo)]) == 2
    assert 'needs no_such_package: pip install "qat-lightning[serve]"' in capsys.readouterr().err
    (tmp_path / "config.json").write_text("{}")
    assert cli.main(["serve", str(tmp_path)]) == 2
    assert "no quantization_config" in capsys.readouterr().err


# --- other engines -------------------------------------------------------------------------------


@pytest.fixture
def other_python(tmp_path):
    """A Python in which vllm and llama_cpp.server are programs that print what they were given."""
    code = (
        "import json, os, sys\n"
        "keys = ('VLLM_API_KEY', 'API_KEY', 'LLAMA_API_KEY')\n"
        "found = {k: os.environ[k] for k in keys if k in os.environ}\n"
        "open(os.environ['REPORT'], 'w').write(json.dumps([sys.argv[1:], found]))\n"
        "sys.exit(3)\n"
    )
    for module in ("vllm/entrypoints/openai/api_server.py", "llama_cpp/server/__main__.py"):
        path = tmp_path / "packages" / module
        path.parent.mkdir(parents=True)
        path.write_text(code)
    python = tmp_path / "python"
    python.write_text(
        f'#!/bin/sh\nPYTHONPATH="{tmp_path / "packages"}" exec "{sys.executable}" "$@"\n'
    )
    python.chmod(0o755)
    return python


def report(path):
    command, environment = json.loads(path.read_text())
    pairs = dict(zip(command[::2], command[1::2]))
    return pairs, environment


def test_vllm_gets_the_artifact_and_its_exit_code_is_returned(
    demo, other_python, tmp_path, monkeypatch
):
    monkeypatch.setenv("REPORT", str(tmp_path / "report"))
    words = ["--engine", "vllm", "--port", "9", f"engine_python={other_python}", "max_context=64"]
    assert cli.main(["serve", str(demo), *words, "api_key=secret", "name=m"]) == 3
    given, environment = report(tmp_path / "report")
    assert given == {
        "--model": str(demo),
        "--host": "127.0.0.1",
        "--port": "9",
        "--served-model-name": "m",
        "--max-model-len": "64",
    }
    assert environment == {"VLLM_API_KEY": "secret"}


def test_llama_cpp_gets_a_gguf(demo, other_python, tmp_path, monkeypatch):
    monkeypatch.setenv("REPORT", str(tmp_path / "report"))
    monkeypatch.setenv("PATH", os.path.dirname(other_python))
    out = tmp_path / "kept.gguf"
    words = ["engine=llama.cpp", f"engine_python={other_python}", "--kv-cache=int8"]
    assert cli.main(["serve", str(demo), *words, f"gguf={out}", "api_key=secret"]) == 3
    given, environment = report(tmp_path / "report")
    assert (given["--model"], given["--model_alias"]) == (str(out), "demo")
    assert (given["--type_k"], given["--n_ctx"]) == ("8", "0")
    assert environment == {"API_KEY": "secret"}
    assert out.read_bytes()[:4] == b"GGUF"
    # the next time it is there
    stamp = out.stat().st_mtime_ns
    assert cli.main(["serve", str(demo), *words, f"gguf={out}"]) == 3
    assert out.stat().st_mtime_ns == stamp
    # without a name for it, it is written for this run only
    assert cli.main(["serve", str(demo), *words]) == 3
    given, _ = report(tmp_path / "report")
    assert given["--model"].endswith("/demo.gguf")
    assert not os.path.exists(given["--model"])


def test_llama_server_is_preferred(demo, tmp_path, monkeypatch):
    program = tmp_path / "llama-server"
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    options = ServeOptions(engine="llama.cpp", max_sequences=4, max_context=100, kv_cache="int4")
    assert other_engines._llama_program(options) == [str(program)]
    launch = other_engines.llama([str(program)], demo, tmp_path / "m.gguf", options, "k")
    given = dict(zip(launch.command[1::2], launch.command[2::2]))
    assert (given["--ctx-size"], given["--parallel"]) == ("400", "4")
    assert (given["--cache-type-k"], given["--flash-attn"]) == ("q4_0", "on")
    assert launch.environment == {"LLAMA_API_KEY": "k"}
    assert "k" not in launch.command


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_signals_reach_the_other_engine(tmp_path, number):
    ready = tmp_path / "ready"
    child = (
        "import pathlib, signal, sys, time\n"
        f"signal.signal({int(number)}, lambda *_: sys.exit(7))\n"
        f"pathlib.Path({str(ready)!r}).touch()\n"
        "time.sleep(60)\n"
    )
    parent = (
        "import signal, sys; from qat.serve.child import Launch, supervise\n"
        # under nohup it is inherited as ignored
        "signal.signal(signal.SIGHUP, signal.SIG_DFL)\n"
        f"sys.exit(supervise(Launch([sys.executable, '-c', {child!r}], {{}})))"
    )
    process = subprocess.Popen([sys.executable, "-c", parent], stderr=subprocess.DEVNULL)
    try:
        wait_until(ready.exists, 60)
        process.send_signal(number)
        assert process.wait(20) == 7
    finally:
        process.kill()
        process.wait()


def test_a_child_that_a_signal_ends_gives_a_code_like_a_shell():
    code = "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"
    before = signal.getsignal(signal.SIGTERM)
    assert supervise(Launch([sys.executable, "-c", code], {})) == 128 + signal.SIGKILL
    assert signal.getsignal(signal.SIGTERM) is before


def test_engines_that_are_not_here_and_options_they_lack(demo, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("PATH", "")
    missing = {"vllm": "has no vllm. `pip install vllm`", "llama.cpp": "there is no llama-server"}
    for engine, words in missing.items():
        # this Python, without its installed packages
        python = tmp_path / f"python-{engine}"
        python.write_text(f'#!/bin/sh\nexec "{sys.executable}" -I -S "$@"\n')
        python.chmod(0o755)
        assert cli.main(["serve", str(demo), f"engine={engine}", f"engine_python={python}"]) == 2
        assert words in capsys.readouterr().err
    for words, message in (
        (["engine=vllm", "kv_cache=int8"], "kv_cache=int8: engine=vllm does not have it"),
        (["engine=vllm", "max_queued=3"], "max_queued=3: engine=vllm does not have it"),
        (["engine=llama.cpp", "lora=[a=b]"], "engine=llama.cpp does not have it"),
        (["engine=vllm", f"engine_python={tmp_path}/none"], "none: no such program"),
    ):
        assert cli.main(["serve", str(demo), *words]) == 2
        assert message in capsys.readouterr().err


def test_every_option_is_of_an_engine():
    names = {field.name for field in dataclasses.fields(ServeOptions)}
    assert set(other_engines.VLLM_OPTIONS) <= names
    assert set(other_engines.LLAMA_OPTIONS) <= names
