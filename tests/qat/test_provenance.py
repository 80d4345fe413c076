"""Provenance: the right facts, and nothing of the machine that is not for others."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest

from qat import config, provenance
from qat.provenance import (
    base_identity,
    base_metadata,
    command_line,
    is_hub_id,
    public_config,
    public_name,
    weights_sha256,
)
from recipes import CONFIGS, find
from recipes.config import AdapterRunConfig
from tests.tiny import save_tiny


@pytest.mark.parametrize(
    ("given", "public", "hub"),
    [
        ("meta-llama/Llama-3.2-1B", "meta-llama/Llama-3.2-1B", True),
        ("demo", "demo", False),
        ("/home/ann/secret-project/model", "model", False),
        ("/home/ann/model/", "model", False),
        ("~/models/mine", "mine", False),
        ("./mine", "mine", False),
        ("../a/mine", "mine", False),
        ("a/b/c", "c", False),
        ("C:\\Users\\ann\\model", "model", False),
    ],
)
def test_names(given, public, hub):
    assert public_name(given) == public
    assert is_hub_id(given) is hub


def test_a_directory_that_looks_like_a_hub_id(tmp_path, monkeypatch):
    (tmp_path / "customer" / "model").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert public_name("customer/model") == "model"
    monkeypatch.chdir(tmp_path / "customer")
    assert public_name(".") == "customer"
    assert public_name("..") == tmp_path.name


def adapter_config(tmp_path, **changes):
    (tmp_path / "relative").mkdir(exist_ok=True)
    (tmp_path / "relative" / "chats.jsonl").write_text("")
    return AdapterRunConfig(recipe="qlora_int4", **changes)


def test_no_path_of_this_machine_stays(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = {"validation": "relative/chats.jsonl", "cache_dir": str(tmp_path / "cache")}
    values = asdict(
        adapter_config(
            tmp_path,
            model=str(tmp_path / "model"),
            data=str(tmp_path / "my chats.jsonl"),
            output_dir=str(tmp_path / "out"),
            resume=str(tmp_path / "out"),
            prompt="/etc/hosts: what is it?",
        )
    )
    values["text"] |= text
    values["chat"]["template"] = "~/templates/mine.jinja"
    values["wandb"]["entity"] = "secret-team"
    values["outputs"] = ["adapter"]
    public = public_config(values)
    raw = json.dumps(public)
    assert str(tmp_path) not in raw
    assert "secret-team" not in raw
    assert "~" not in raw
    assert (public["model"], public["data"]) == ("model", "my chats.jsonl")
    assert public["text"]["validation"] == "chats.jsonl"
    assert public["chat"]["template"] == "mine.jinja"
    assert public["prompt"] == "/etc/hosts: what is it?"
    assert public["outputs"] == ["adapter"]
    assert not {"output_dir", "resume", "wandb"} & public.keys()
    assert "cache_dir" not in public["text"]
    # all else is there as it was
    left_out = provenance.LEFT_OUT | {"model", "data", "text.validation", "chat.template"}
    for key, value in values.items():
        if not isinstance(value, dict) and key not in left_out:
            assert public[key] == value


def test_numbers_that_json_does_not_have():
    assert public_config({"a": float("inf"), "b": [float("nan")]}) == {"a": "inf", "b": ["nan"]}


WORDS = [
    "model=org/name",
    "max_steps=7",
    "optim.lr=1e-06",
    "scheme.keep_dtype=float16",
    "text.validation=null",
    "scheme.rules=[{match: lm_head, action: quantize}]",
    "prompt=two words",
    "preset=[trainer/debug]",
]


def test_the_command_makes_the_same_configuration():
    """Read back by the shell's rules and the recipe's own parser."""
    import shlex

    recipe = find("qat_int4")
    load = lambda words: config.load(recipe.schema(), words, [recipe.config_file], CONFIGS)  # noqa: E731
    wanted = load(["recipe=qat_int4", *WORDS])
    text = command_line(public_config(asdict(wanted)), public_config(asdict(load([]))))
    words = shlex.split(text)
    assert words[:3] == ["python", "train.py", "recipe=qat_int4"]
    assert "max_steps=7" in words
    again = load(words[2:])
    changes = {"preset": wanted.preset, "output_dir": None}
    found = asdict(again) | changes
    for key in ("wandb", "logger"):
        found[key] = asdict(wanted)[key]
    found["trainer"]["progress_bar"] = wanted.trainer.progress_bar
    assert found == asdict(wanted)
    plain = load(["recipe=qat_int4", "output_dir=/tmp/x"])
    defaults = public_config(asdict(load([])))
    assert command_line(public_config(asdict(plain)), defaults) == "python train.py recipe=qat_int4"


def test_weights_of_one_file_and_of_several(tmp_path):
    model = save_tiny("llama", tmp_path / "model")
    raw = (model / "model.safetensors").read_bytes()
    one = hashlib.sha256(raw).hexdigest()
    assert weights_sha256(model) == one
    found = base_identity(str(model), model)
    assert found == {"name": "model", "weights_sha256": one}
    (model / "b.safetensors").write_bytes(raw)
    (model / "a.safetensors").write_bytes(b"x")
    index = {"weight_map": {"t": "b.safetensors", "u": "a.safetensors"}}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    hashes = hashlib.sha256(b"x").hexdigest() + "\n" + one + "\n"
    assert weights_sha256(model) == hashlib.sha256(hashes.encode()).hexdigest()
    (model / "a.safetensors").unlink()
    assert weights_sha256(model) is None
    assert base_identity("org/absent", None) == {"name": "org/absent"}


def test_revision_of_a_hub_id(tmp_path, monkeypatch):
    """From the cache, as a download leaves it."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    commit = "c" * 40
    repo = tmp_path / "models--org--name"
    snapshot = repo / "snapshots" / commit
    snapshot.mkdir(parents=True)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(commit)
    (snapshot / "config.json").write_text("{}")
    (snapshot / "model.safetensors").write_bytes(b"x")
    (snapshot / "README.md").write_text("---\nlicense: mit\n---\n")
    digest = hashlib.sha256(b"x").hexdigest()
    expected = {"name": "org/name", "revision": commit, "weights_sha256": digest}
    assert base_identity("org/name", None) == expected
    assert base_metadata(None, "org/name") == {"license": "mit"}


def test_metadata_of_the_base(tmp_path):
    card = tmp_path / "README.md"
    assert base_metadata(tmp_path, "x") == {}
    for text in ("# no metadata\n", "---\n: [\n---\n", "---\n- a list\n---\n", "---\n\n---\n"):
        card.write_text(text)
        assert base_metadata(tmp_path, "x") == {}, text
    card.write_text("---\nlicense: other\nlicense_name: x\nlanguage:\n- en\n- de\ntags: [a]\n---\n")
    found = base_metadata(tmp_path, "x")
    assert found == {"license": "other", "license_name": "x", "language": ["en", "de"]}


# --- the checkout --------------------------------------------------------------------------------

STATE = "from qat.provenance import git_state; import json; print(json.dumps(git_state()))"


def git(directory, *words):
    identity = ["-c", "user.name=t", "-c", "user.email=t@example.org"]
    environment = {k: v for k, v in os.environ.items() if not k.startswith("GIT_")}
    subprocess.run(["git", "-C", directory, *identity, *words], check=True, env=environment,
                   capture_output=True)  # fmt: skip


def state(root, **variables):
    """`git_state` of a process that imports the package from ``root``."""
    environment = {**os.environ, "PYTHONPATH": str(root), **variables}
    done = subprocess.run(
        [sys.executable, "-c", STATE], cwd=root, env=environment, capture_output=True, text=True,
        check=True, timeout=60,
    )  # fmt: skip
    return json.loads(done.stdout)


@pytest.fixture
def checkout(tmp_path):
    """A copy of the few modules that are needed."""
    package = tmp_path / "checkout" / "qat"
    package.mkdir(parents=True)
    source = Path(provenance.__file__).parent
    for name in ("__init__", "provenance", "manifest", "errors", "safetensors_header"):
        shutil.copy(source / f"{name}.py", package)
    return package.parent


def test_commit_of_the_checkout(checkout):
    assert state(checkout) is None, "no repository"
    git(checkout, "init", "-q")
    assert state(checkout) is None, "below a repository that does not have this code"
    git(checkout, "add", ".")
    git(checkout, "commit", "-q", "-m", "x")
    commit = (checkout / ".git" / "HEAD").read_text().strip().removeprefix("ref: ")
    sha = (checkout / ".git" / commit).read_text().strip()
    assert state(checkout) == {"commit": sha, "dirty": False}
    (checkout / "new.txt").write_text("x")
    # a git hook's variables point at another repository
    assert state(checkout, GIT_DIR="/nonexistent") == {"commit": sha, "dirty": False}
    (checkout / "qat" / "errors.py").write_text("# changed\n")
    assert state(checkout) == {"commit": sha, "dirty": True}
    assert state(checkout, PATH="/nonexistent") is None, "no git"
