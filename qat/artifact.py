"""The artifact directory: written whole or not at all, described by a manifest, verified by it.

``manifest.json``::

    {"format": 1, "provenance": {...},
     "files": {NAME: {"sha256": ..., "size": BYTES,
                      "tensors": {TENSOR: SHA256, ...}}}}     # of safetensors files only

Hashes per tensor let `verify` name what differs instead of only the file. Nothing here loads a
model, and every file is read in pieces of `CHUNK` bytes.
"""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any, Literal

from tqdm import tqdm

from qat.artifact_summary import inspect
from qat.errors import UserError
from qat.safetensors_header import BrokenHeader, Header, read_header

__all__ = ["Problem", "inspect", "staged_directory", "verify", "write_manifest"]

MANIFEST = "manifest.json"
CHUNK = 1 << 20
PICKLES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".joblib")
"""Suffixes of files that can run code when they are loaded."""
HUB_FILES = (".gitattributes", ".git", ".cache")
"""What a download from the Hub adds beside the files of the artifact; nothing loads them."""


# --- writing -------------------------------------------------------------------------------------


@contextmanager
def staged_directory(final: Path, replace: bool = False) -> Iterator[Path]:
    """Write a directory so that `final` is whole or untouched, whatever interrupts the writing.

    Yields ``.NAME.partial-PID`` beside `final`. When the block ends, its files are flushed to the
    disk and the directory is renamed; when the block raises, it is removed. With ``replace=True``
    an existing `final` is moved aside until the new one stands, and a call after a crash between
    the two renames first puts it back. Leftovers of dead processes are removed at the start.

    Raises:
        UserError: `final` exists, is not an empty directory, and `replace` is False.
    """
    final.parent.mkdir(parents=True, exist_ok=True)
    _clean_up(final)
    _refuse_existing(final, replace)
    partial = _sibling(final, "partial", os.getpid())
    partial.mkdir()
    try:
        yield partial
        _flush(partial)
        _refuse_existing(final, replace)
        _swap_in(partial, final)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def _sibling(final: Path, kind: str, pid: int) -> Path:
    return final.with_name(f".{final.name}.{kind}-{pid}")


def _refuse_existing(final: Path, replace: bool) -> None:
    empty = final.is_dir() and not any(final.iterdir())
    if os.path.lexists(final) and not replace and not empty:
        raise UserError(f"{final} exists already; choose another directory or remove it first")


def _clean_up(final: Path) -> None:
    """Remove what dead processes left behind, and put a moved-aside directory back."""
    pattern = re.compile(rf"\.{re.escape(final.name)}\.(partial|old)-(\d+)")
    for path in final.parent.iterdir():
        match = pattern.fullmatch(path.name)
        # a left directory with our own id is from an earlier process that had the same id
        if match is None or (int(match[2]) != os.getpid() and _alive(int(match[2]))):
            continue
        if match[1] == "old" and not os.path.lexists(final):
            path.rename(final)
        else:
            shutil.rmtree(path)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def _flush(directory: Path) -> None:
    """Force every file and directory below (and including) `directory` to the disk."""
    for root, _, files in os.walk(directory):
        for name in files:
            _fsync(Path(root) / name)
        _fsync(Path(root))


def _fsync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _swap_in(partial: Path, final: Path) -> None:
    old = _sibling(final, "old", os.getpid()) if os.path.lexists(final) else None
    if old is not None:
        final.rename(old)
    try:
        partial.rename(final)
    except BaseException:
        if old is not None:
            old.rename(final)
        raise
    _fsync(final.parent)
    if old is not None:
        shutil.rmtree(old, ignore_errors=True)


# --- manifest ------------------------------------------------------------------------------------


def write_manifest(directory: Path, provenance: Mapping[str, Any]) -> None:
    """Write ``manifest.json`` for the files now in `directory`.

    Args:
        directory: the artifact, complete but for the manifest.
        provenance: JSON-compatible facts on where it comes from (versions, commit, seed, config).

    Raises:
        ValueError: a file that `verify` would refuse (a pickle, a broken safetensors file).
    """
    files: dict[str, Any] = {}
    for name in _file_names(directory):
        if name == MANIFEST:
            continue
        if name.endswith(PICKLES):
            raise ValueError(f"{name}: an artifact holds no pickle files")
        path = directory / name
        header = read_header(path) if name.endswith(".safetensors") else None
        files[name] = {"sha256": _sha256(path), "size": path.stat().st_size}
        if header is not None:
            files[name]["tensors"] = _tensor_hashes(path, header)
    text = json.dumps({"format": 1, "provenance": dict(provenance), "files": files}, indent=2)
    (directory / MANIFEST).write_text(text + "\n", encoding="utf-8")


def _file_names(directory: Path) -> list[str]:
    return sorted(
        path.relative_to(directory).as_posix()
        for path in directory.rglob("*")
        # a linked directory is listed as one name, so that it is never passed over
        if (path.is_symlink() or not path.is_dir())
        and path.relative_to(directory).parts[0] not in HUB_FILES
    )


def _pieces(path: Path, begin: int = 0, end: int | None = None) -> Iterator[bytes]:
    with path.open("rb") as file:
        file.seek(begin)
        left = end - begin if end is not None else -1
        while left and (piece := file.read(CHUNK if left < 0 else min(CHUNK, left))):
            left = left if left < 0 else left - len(piece)
            yield piece


def _sha256(path: Path, begin: int = 0, end: int | None = None, bar: Any = None) -> str:
    digest = hashlib.sha256()
    for piece in _pieces(path, begin, end):
        digest.update(piece)
        if bar is not None:
            bar.update(len(piece))
    return digest.hexdigest()


def _tensor_hashes(path: Path, header: Header) -> dict[str, str]:
    return {entry.name: _sha256(path, entry.begin, entry.end) for entry in header.tensors}


# --- verifying -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Problem:
    """One difference between a directory and its manifest."""

    kind: Literal["manifest", "unsafe", "pickle", "missing", "extra", "size", "header", "content"]
    """What sort of difference."""
    file: str
    """File name relative to the artifact."""
    detail: str
    """What is wrong, in words."""
    tensor: str | None = None
    """Tensor concerned, where it is known."""

    def __str__(self) -> str:
        """One line for the user."""
        return f"{self.file}: {self.detail}"


def verify(directory: Path, hashes: bool = True) -> list[Problem]:
    """Compare a directory with its ``manifest.json``; an empty list means that all is well.

    Args:
        directory: the artifact.
        hashes: read every file; otherwise names, sizes and safetensors headers only.

    Raises:
        UserError: `directory` is no artifact (no such directory, no manifest).
    """
    if not directory.is_dir():
        raise UserError(f"{directory}: no such directory; give the artifact/ of a finished run")
    if not (directory / MANIFEST).is_file():
        raise UserError(f"{directory}: not an artifact, it has no {MANIFEST}")
    present = _file_names(directory)
    problems = [
        Problem("pickle", name, "a pickle file can run code when it is loaded; not allowed")
        for name in present
        if name.endswith(PICKLES)
    ]
    try:
        listed = _listed_files(directory)
    except ValueError as error:
        return [*problems, Problem("manifest", MANIFEST, f"cannot be read: {error}")]
    unsafe = [name for name in listed if not _is_safe(name)]
    problems += [
        Problem("unsafe", name, "the manifest names a file outside the artifact") for name in unsafe
    ]
    refused = {problem.file for problem in problems}
    problems += [
        Problem("extra", name, "not listed in the manifest")
        for name in present
        if name not in listed and name != MANIFEST and name not in refused
    ]
    todo = {name: entry for name, entry in listed.items() if name not in refused}
    total = sum((directory / n).stat().st_size for n in todo if (directory / n).is_file())
    with tqdm(total=total, unit="B", unit_scale=True, delay=2, disable=None, leave=False) as bar:
        for name, entry in todo.items():
            problems += _check_file(directory / name, name, entry, hashes, bar)
    return problems


def _listed_files(directory: Path) -> dict[str, dict[str, Any]]:
    manifest = json.loads((directory / MANIFEST).read_text(encoding="utf-8"))
    files = manifest.get("files") if isinstance(manifest, dict) else None
    if not isinstance(files, dict):
        raise ValueError("no table of files")
    if manifest.get("format") != 1:
        raise ValueError(f"format {manifest.get('format')!r} is unknown, 1 is expected")
    for name, entry in files.items():
        if not (
            isinstance(entry, dict)
            and isinstance(entry.get("size"), int)
            and isinstance(entry.get("sha256"), str)
            and isinstance(entry.get("tensors", {}), dict)
        ):
            raise ValueError(f"the entry of {name!r} lacks size or sha256")
    return files


def _is_safe(name: str) -> bool:
    """Whether a name stays inside the directory, on any operating system."""
    windows = PureWindowsPath(name)
    return not (
        name in ("", ".")
        or "\0" in name
        or PurePosixPath(name).is_absolute()
        or windows.drive
        or windows.root
        or ".." in windows.parts
    )


def _check_file(
    path: Path, name: str, entry: dict[str, Any], hashes: bool, bar: Any
) -> list[Problem]:
    if not path.is_file():
        return [Problem("missing", name, "listed in the manifest, but not there")]
    size = path.stat().st_size
    problems = []
    if size != entry["size"]:
        detail = f"{size} bytes, the manifest says {entry['size']}"
        problems.append(Problem("size", name, detail))
    header = None
    if name.endswith(".safetensors"):
        try:
            header = read_header(path)
        except BrokenHeader as error:
            return [*problems, Problem("header", name, str(error))]
        cut = next((t for t in header.tensors if t.end > size), None)
        if cut is not None:
            detail = f"truncated in tensor {cut.name} (bytes {cut.begin} to {cut.end} of the file)"
            return [*problems, Problem("header", name, detail, cut.name)]
        if header.data_end < size:
            detail = f"{size - header.data_end} bytes after the last tensor"
            problems.append(Problem("header", name, detail))
    if hashes and not problems and _sha256(path, bar=bar) != entry["sha256"]:
        found = _differing_tensors(path, name, header, entry.get("tensors", {})) if header else []
        where = f", {size} bytes" if header is None else " in the header"
        problems += found or [Problem("content", name, f"sha256 differs{where}")]
    return problems


def _differing_tensors(
    path: Path, name: str, header: Header, expected: dict[str, str]
) -> list[Problem]:
    """The tensors that a changed safetensors file adds, lacks or holds with other bytes."""
    problems = []
    for entry in header.tensors:
        span = f"bytes {entry.begin} to {entry.end} of the file"
        if entry.name not in expected:
            detail = f"tensor {entry.name} is not in the manifest ({span})"
        elif _sha256(path, entry.begin, entry.end) != expected[entry.name]:
            detail = f"sha256 of tensor {entry.name} differs ({span})"
        else:
            continue
        problems.append(Problem("content", name, detail, entry.name))
    for missing in sorted(expected.keys() - {entry.name for entry in header.tensors}):
        problems.append(Problem("content", name, f"tensor {missing} is missing", missing))
    return problems
