"""Where an artifact comes from: code, configuration, base model; told without local paths.

What is published must not carry the directories of the machine that made it. Models and data given
as paths are recorded by their last part, beside a fingerprint of their content; keys that only say
where files lie on this machine, or who logs the run, are left out.
"""

import hashlib
import math
import os
import subprocess
from collections.abc import Mapping
from functools import cache
from importlib import metadata
from pathlib import Path, PureWindowsPath
from typing import Any

import qat
from qat.manifest import sha256

LEFT_OUT = frozenset(
    {"output_dir", "resume", "dry_run", "text.cache_dir", "trainer.progress_bar", "wandb", "logger"}
)
"""Keys of the configuration that say nothing of the model."""
TEXT = frozenset({"prompt", "system"})
"""Last parts of keys whose values are text, which may begin like a path."""


def is_hub_id(model: str) -> bool:
    """Whether a value of ``model=`` is ``ORG/NAME`` and no directory of this machine."""
    local = model.startswith((".", "~", "/")) or "\\" in model or Path(model).exists()
    return model.count("/") == 1 and not local


def public_name(value: str) -> str:
    """A model or file as others may know it: a Hub id, or the last part of a path."""
    return value if is_hub_id(value) else _last(value)


def _last(value: str) -> str:
    path = Path(value).expanduser()
    name = path.name if path.name not in ("", "..") else path.resolve().name
    return PureWindowsPath(name).name


def public_config(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """A resolved configuration without `LEFT_OUT`, its paths cut to their last part."""
    return {
        name: _public(value, f"{prefix}{name}")
        for name, value in config.items()
        if f"{prefix}{name}" not in LEFT_OUT
    }


def _public(value: Any, key: str) -> Any:
    if isinstance(value, Mapping):
        return public_config(value, f"{key}.")
    if isinstance(value, list | tuple):
        return [_public(item, key) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)  # JSON has no such number
    if not isinstance(value, str) or key.rpartition(".")[2] in TEXT:
        return value
    if key == "model":
        return public_name(value)
    windows = PureWindowsPath(value)
    looks_local = value.startswith(("/", "~", "./", "../")) or bool(windows.drive or windows.root)
    if looks_local or (os.sep in value and _exists(value)):
        return _last(value)
    return value


def _exists(value: str) -> bool:
    try:
        return Path(value).exists()
    except (OSError, ValueError):  # too long, or with a zero byte: no path
        return False


def command_line(config: Mapping[str, Any], defaults: Mapping[str, Any]) -> str:
    """The command that makes a run again: its recipe, and every key that is not the recipe's.

    Built from the configuration, since a run may have been resumed by another command. Both
    mappings are results of `public_config`.
    """
    usual = _flat(defaults)
    words = [
        f"{key}={_word(value)}"
        for key, value in _flat(config).items()
        if key not in usual or usual[key] != value
    ]
    return " ".join(["python train.py", f"recipe={config['recipe']}", *words])


def _flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in config.items():
        key = f"{prefix}{name}"
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{key}.")
        elif key not in ("recipe", "preset"):  # presets are in what they set
            flat[key] = value
    return flat


def _word(value: Any) -> str:
    """A value as a word of a shell's command line."""
    import shlex

    import yaml  # type: ignore[import-untyped,unused-ignore]

    if isinstance(value, str) and value:
        return shlex.quote(value)
    # one line, however long
    dumped: str = yaml.safe_dump(value, default_flow_style=True, width=math.inf)
    return shlex.quote(dumped.removesuffix("...\n").strip())


@cache
def git_state() -> dict[str, Any] | None:
    """``commit`` and whether tracked files ``dirty`` it, of the checkout that this code runs from.

    None outside a checkout, or without git. Asked once per process: the checkout may move on while
    a run lasts.
    """
    here = Path(qat.__file__).resolve()
    # a git hook sets variables that point elsewhere
    environment = {k: v for k, v in os.environ.items() if not k.startswith("GIT_")}

    def git(*words: str) -> str | None:
        command = ["git", "-C", str(here.parent), *words]
        try:
            done = subprocess.run(
                command, capture_output=True, text=True, timeout=30, env=environment, check=False
            )
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    # installed below an unrelated checkout, this file is none of its own
    if git("ls-files", "--error-unmatch", here.name) is None:
        return None
    commit, changed = git("rev-parse", "HEAD"), git("status", "--porcelain", "-uno")
    return {"commit": commit, "dirty": bool(changed)} if commit and changed is not None else None


def converter() -> dict[str, str]:
    """Name and version of what wrote the packed files."""
    return {"name": "qat-lightning", "version": metadata.version("qat-lightning")}


def base_identity(model: str, directory: Path | None) -> dict[str, Any]:
    """Name of a base model, and the SHA-256 of its weights or its revision on the Hub.

    Args:
        model: what the user gave.
        directory: where its files lie, or None for a Hub id that was loaded through the cache.
    """
    identity: dict[str, Any] = {"name": public_name(model)}
    if directory is None:
        directory = _cached(model)
    if directory is None:
        return identity
    if is_hub_id(model) and directory.parent.name == "snapshots":
        identity["revision"] = directory.name
    weights = weights_sha256(directory)
    return identity | ({"weights_sha256": weights} if weights else {})


def _cached(model: str) -> Path | None:
    """The snapshot of a Hub id in the cache, which holds what was loaded."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        found = try_to_load_from_cache(model, "config.json")
    except HFValidationError:
        return None
    return Path(found).parent if isinstance(found, str) else None


def weights_sha256(directory: Path) -> str | None:
    """SHA-256 of the weights in a directory; None if it has no safetensors.

    Of one file its own; of several (those of the index, in the order of their names) that of their
    hexadecimal hashes, one per line.
    """
    # imported here: it brings torch with it
    from qat.tensor_files import weight_files

    names = sorted(set(weight_files(directory).values())) or ["model.safetensors"]
    paths = [directory / name for name in names]
    if not all(path.is_file() for path in paths):
        return None
    hashes = [sha256(path) for path in paths]
    if len(hashes) == 1:
        return hashes[0]
    return hashlib.sha256("".join(f"{value}\n" for value in hashes).encode()).hexdigest()


def base_metadata(directory: Path | None, model: str) -> dict[str, Any]:
    """What the base model's own card says of ``license`` and ``language``, where it has one."""
    import yaml  # type: ignore[import-untyped,unused-ignore]
    from huggingface_hub.repocard import metadata_load

    directory = directory or _cached(model)
    card = directory / "README.md" if directory else None
    if card is None or not card.is_file():
        return {}
    try:
        found = metadata_load(card) or {}
    except (OSError, ValueError, yaml.YAMLError):  # a card that cannot be read says nothing
        return {}
    names = ("license", "license_name", "license_link", "language")
    return {name: found[name] for name in names if found.get(name)}
