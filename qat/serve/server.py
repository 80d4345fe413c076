"""``qat serve``: start-up, signals, and a stop that loses no accepted request.

The first SIGTERM or SIGINT begins the drain: ``/health`` and new requests get status 503, accepted
requests are answered to their end, then the process exits with 0. Those that take longer than
``drain_seconds`` are told so and cut off (exit code 1). A second signal ends the process at once.
"""

import asyncio
import gc
import hashlib
import os
import signal
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import qat
from qat.errors import UserError
from qat.runtime import read_artifact_config
from qat.serve.options import ServeOptions

if TYPE_CHECKING:
    from qat.serve.service import Service

__all__ = ["ServeOptions", "serve"]

PACKAGES = ("fastapi", "uvicorn", "prometheus_client")
KEEP_ALIVE_SECONDS = 65
"""Idle connections live longer than the minute after which common clients and proxies let go."""
LOOPBACK = ("127.", "::1", "localhost")


def serve(artifact: Path, options: ServeOptions | None = None) -> int:
    """Serve an artifact until a signal comes; returns the exit code.

    Args:
        artifact: the ``artifact/`` of a run, or the ``nf4/`` of an adapter run.
        options: see `ServeOptions`; None takes its defaults.

    Raises:
        UserError: not an artifact, the port is in use, a package is missing, or what the engine
            refuses.
    """
    options = options or ServeOptions()
    read_artifact_config(artifact)
    key = _key(options)
    if options.engine != "qat":
        from qat.serve.other_engines import run_engine

        return run_engine(artifact, options, key)
    missing = [name for name in PACKAGES if find_spec(name) is None]
    if missing:
        raise UserError(f'qat serve needs {", ".join(missing)}: pip install "qat-lightning[serve]"')
    # the port first: loading can take minutes. Until the socket listens, clients are refused
    listener = bind(options.host, options.port)
    print(f"loading {artifact} ...", file=sys.stderr, flush=True)
    from qat.serve.engine import Engine
    from qat.serve.prompts import Prompts
    from qat.serve.service import Service, Settings

    with listener:
        prompts = Prompts(artifact)
        engine = Engine(artifact, options)
        settings = Settings(
            api_key=key,
            fingerprint=fingerprint(artifact, options),
            max_queued=options.max_queued,
            max_answers=options.max_answers,
            max_tokens=options.max_tokens,
            max_body_bytes=int(options.max_body_mib * 2**20),
            cors_origins=options.cors_origins,
        )
        try:
            return asyncio.run(_run(Service(engine, prompts, settings), listener, options))
        finally:
            engine.close()
            prompts.close()


def _key(options: ServeOptions) -> str | None:
    try:
        return options.key
    except ValueError as error:
        raise UserError(str(error)) from None


def bind(host: str, port: int) -> socket.socket:
    """A socket that is bound but does not listen yet.

    Raises:
        UserError: the port is in use, or the address is none of this machine.
    """
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except socket.gaierror as error:
        raise UserError(f"host={host}: no such address ({error.strerror})") from None
    family, kind, protocol, _, address = found[0]
    listener = socket.socket(family, kind, protocol)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except OSError as error:
        listener.close()
        raise _cannot_listen(host, port, error) from None
    return listener


def _cannot_listen(host: str, port: int, error: OSError) -> UserError:
    if isinstance(error, PermissionError):
        return UserError(f"port={port}: ports below 1024 are for root; take another, port=8000")
    return UserError(
        f"host={host} port={port}: cannot listen there ({error.strerror}); stop what uses the port "
        "or take another one (port=0 finds a free one)"
    )


def fingerprint(artifact: Path, options: ServeOptions) -> str:
    """``system_fingerprint``: changes with the weights, the version, and how they are computed."""
    manifest = artifact / "manifest.json"
    content = (manifest if manifest.is_file() else artifact / "config.json").read_bytes()
    how = f"{qat.__version__} {options.dtype} {options.kv_cache}".encode()
    return f"qat-{hashlib.sha256(content + how).hexdigest()[:12]}"


async def _run(service: "Service", listener: socket.socket, options: ServeOptions) -> int:
    """Serve until a signal; returns the exit code."""
    import uvicorn

    from qat.serve.app import create_app
    from qat.serve.connection import Connection

    class Server(uvicorn.Server):
        @contextmanager
        def capture_signals(self) -> Iterator[None]:
            # uvicorn would stop listening at once and die of the signal in the end
            yield

    server = Server(
        uvicorn.Config(
            create_app(service),
            http=Connection,
            lifespan="off",
            log_level="info" if options.access_log else "warning",
            access_log=options.access_log,
            server_header=False,
            timeout_keep_alive=KEEP_ALIVE_SECONDS,
            timeout_graceful_shutdown=5,
        )
    )
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, _on_signal, stop, number)
    # listens from here on, so that what is printed is true
    try:
        listener.listen(2048)
    except OSError as error:
        raise _cannot_listen(options.host, options.port, error) from None
    # what has been loaded stays: looking through it with each collection holds up every answer
    gc.collect()
    gc.freeze()
    serving = asyncio.create_task(server.serve(sockets=[listener]))
    stopping = asyncio.create_task(stop.wait())
    print(greeting(service, listener, options), flush=True)
    await asyncio.wait({serving, stopping}, return_when=asyncio.FIRST_COMPLETED)
    cut = 0
    if not serving.done():
        print("stopping: accepted requests are being finished", file=sys.stderr, flush=True)
        cut = await service.lifecycle.drain(options.drain_seconds)
        server.should_exit = True
    stopping.cancel()
    await serving
    if cut:
        print(
            f"{cut} requests were cut off after drain_seconds={options.drain_seconds:g}",
            file=sys.stderr,
        )
    return 1 if cut else 0


def _on_signal(stop: asyncio.Event, number: signal.Signals) -> None:
    if stop.is_set():
        sys.stdout.flush()
        sys.stderr.flush()
        # at once: neither threads in the middle of a step nor open streams are waited for
        os._exit(128 + number)
    stop.set()


def greeting(service: "Service", listener: socket.socket, options: ServeOptions) -> str:
    """What is printed once requests are answered."""
    host, port = listener.getsockname()[:2]
    here = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    url = f"http://[{here}]:{port}" if ":" in here else f"http://{here}:{port}"
    model = service.engine.models[0]
    auth = ' -H "Authorization: Bearer $QAT_API_KEY"' if service.settings.api_key else ""
    if service.prompts.chat:
        path = "chat/completions"
        body = f'{{"model": "{model}", "messages": [{{"role": "user", "content": "Hello"}}]}}'
    else:
        path = "completions"
        body = f'{{"model": "{model}", "prompt": "Once", "max_tokens": 32}}'
    lines = [
        f"serving {', '.join(service.engine.models)} at {url} (a chat page; the API under /v1)",
        f"  curl {url}/v1/{path}{auth} -H 'Content-Type: application/json' -d '{body}'",
        f"  context {service.engine.context} tokens, /health, /metrics. Ctrl-C to stop.",
    ]
    if not options.host.startswith(LOOPBACK) and not service.settings.api_key:
        lines.append("  Everyone who reaches this machine can use it: set api_key or QAT_API_KEY.")
    return "\n".join(lines)
