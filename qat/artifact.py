"""The artifact directory: written whole or not at all.

What describes and checks it lives beside: `qat.manifest` (``manifest.json``), `qat.verify`,
`qat.artifact_summary` (``qat inspect``), `qat.signing`, `qat.push`.
"""

import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from qat.artifact_summary import inspect
from qat.errors import UserError
from qat.manifest import MANIFEST, write_manifest
from qat.verify import Problem, verify

__all__ = ["MANIFEST", "Problem", "inspect", "staged_directory", "verify", "write_manifest"]


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
