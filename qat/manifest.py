"""``manifest.json``: what an artifact consists of, and where it comes from.

::

    {
      "format": 2,
      "digest": SHA-256 of this very file with the 64 characters of the digest set to 0,
      "provenance": {...},
      "files": {NAME: {"sha256": ..., "size": BYTES, "block": BYTES, "blocks": HEX,
                       "tensors": {TENSOR: SHA256, ...}}}        # of safetensors files only
    }

``sha256`` judges a file. ``blocks`` only locate a difference: the first 8 bytes of the SHA-256 of
each ``block`` bytes, in hexadecimal, one after the other. ``digest`` finds a damaged manifest;
whoever changes an artifact on purpose can compute all of these anew, which is what signing is for
(`qat.signing`). Nothing here loads a model, and every file is read in pieces of `CHUNK` bytes.
"""

import hashlib
import json
import re
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from tqdm import tqdm

from qat.safetensors_header import BrokenHeader, Header, read_header

FORMAT = 2
MANIFEST = "manifest.json"
SIGNATURE = "model.sig"
"""Signs the manifest among other files, so it is not in it."""
CHUNK = 1 << 20
BLOCK_HEX = 16
"""Hexadecimal digits kept of the hash of a block."""
SMALLEST_BLOCK, MOST_BLOCKS = 4096, 2048
PICKLES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".joblib")
"""Suffixes of files that can run code when they are loaded."""
HUB_FILES = (".gitattributes", ".git", ".cache")
"""What a download from the Hub adds beside the files of the artifact; nothing loads them."""

_HEAD = f'{{\n  "format": {FORMAT},\n  "digest": "'.encode()
_ZEROS = b"0" * 64


class ManifestError(ValueError):
    """The manifest cannot be used; the message says why."""


# --- files ---------------------------------------------------------------------------------------


def file_names(directory: Path) -> list[str]:
    """The files below a directory that count, relative to it, sorted; links are listed too."""
    return sorted(
        path.relative_to(directory).as_posix()
        for path in directory.rglob("*")
        # a linked directory is listed as one name, so that it is never passed over
        if (path.is_symlink() or not path.is_dir())
        and path.relative_to(directory).parts[0] not in HUB_FILES
    )


def is_safe(name: str) -> bool:
    """Whether a name stays inside the directory, on any operating system."""
    windows = PureWindowsPath(name)
    return not (
        name in ("", ".")
        or "\0" in name
        or "\\" in name
        or PurePosixPath(name).is_absolute()
        or windows.drive
        or windows.root
        or ".." in windows.parts
        # no file system has longer names
        or max(len(part.encode("utf-8", "surrogatepass")) for part in name.split("/")) > 255
        or PurePosixPath(name).as_posix() != name
    )


def is_pickle(path: Path) -> bool:
    """Whether a file can run code when it is loaded: by its suffix, or by its first bytes.

    Those of a pickle (protocol 2 and later) or of a zip archive, in which torch keeps pickles. The
    length at the start of a safetensors file may look like either: where the header is whole, it
    is one.
    """
    if path.name.lower().endswith(PICKLES):
        return True
    if not path.is_file():
        return False
    with path.open("rb") as file:
        start = file.read(4)
    # after the protocol comes an opcode, none of which is zero
    protocol = len(start) > 2 and start[0] == 0x80 and 2 <= start[1] <= 5 and start[2] != 0
    if start != b"PK\x03\x04" and not protocol:
        return False
    if path.suffix != ".safetensors":
        return True
    try:
        read_header(path)
    except BrokenHeader:
        return True
    return False


def block_bytes(size: int) -> int:
    """Length of the blocks in which a file of ``size`` bytes is hashed, a power of two."""
    return max(SMALLEST_BLOCK, 1 << (max(0, size - 1) // MOST_BLOCKS).bit_length())


def pieces(path: Path, begin: int = 0, end: int | None = None) -> Iterator[bytes]:
    """The bytes of a file from ``begin`` to ``end``, at most `CHUNK` at a time."""
    with path.open("rb") as file:
        file.seek(begin)
        left = end - begin if end is not None else -1
        while left and (piece := file.read(CHUNK if left < 0 else min(CHUNK, left))):
            left = left if left < 0 else left - len(piece)
            yield piece


def sha256(path: Path, begin: int = 0, end: int | None = None, bar: Any = None) -> str:
    """Hexadecimal SHA-256 of a part of a file; ``bar`` is told the bytes read."""
    digest = hashlib.sha256()
    for piece in pieces(path, begin, end):
        digest.update(piece)
        if bar is not None:
            bar.update(len(piece))
    return digest.hexdigest()


def _describe(path: Path, bar: Any) -> dict[str, Any]:
    size = path.stat().st_size
    step = block_bytes(size)
    whole, blocks = hashlib.sha256(), []
    with path.open("rb") as file:
        for begin in range(0, size, step):
            block, left = hashlib.sha256(), min(step, size - begin)
            while left and (piece := file.read(min(CHUNK, left))):
                left -= len(piece)
                whole.update(piece)
                block.update(piece)
                bar.update(len(piece))
            blocks.append(block.hexdigest()[:BLOCK_HEX])
    entry: dict[str, Any] = {
        "sha256": whole.hexdigest(),
        "size": size,
        "block": step,
        "blocks": "".join(blocks),
    }
    if path.name.endswith(".safetensors"):
        entry["tensors"] = _tensor_hashes(path, read_header(path))
    return entry


def _tensor_hashes(path: Path, header: Header) -> dict[str, str]:
    return {entry.name: sha256(path, entry.begin, entry.end) for entry in header.tensors}


# --- writing -------------------------------------------------------------------------------------


def describe_files(directory: Path, skip: Collection[str] = ()) -> dict[str, dict[str, Any]]:
    """The table ``files`` of a manifest, without the manifest itself and a signature.

    Args:
        directory: the artifact.
        skip: names to leave out.

    Raises:
        ValueError: a file that `qat.verify` would refuse (a pickle, a broken safetensors file, a
            name that means something else on another system).
    """
    names = [n for n in file_names(directory) if n not in (MANIFEST, SIGNATURE, *skip)]
    for name in names:
        if not is_safe(name):
            raise ValueError(f"{name!r}: not a name that every system reads alike")
        if is_pickle(directory / name):
            raise ValueError(f"{name}: an artifact holds no pickle files")
    total = sum((directory / name).stat().st_size for name in names)
    options: dict[str, Any] = {"unit": "B", "unit_scale": True, "delay": 2, "leave": False}
    with tqdm(total=total, desc="hash", disable=None, **options) as bar:
        return {name: _describe(directory / name, bar) for name in names}


def write_manifest(
    directory: Path,
    provenance: Mapping[str, Any],
    known: Mapping[str, dict[str, Any]] | None = None,
) -> None:
    """Write ``manifest.json`` for the files now in `directory`.

    Args:
        directory: the artifact, complete but for the manifest.
        provenance: JSON-compatible facts on where it comes from (versions, commit, seed, config).
        known: entries of `describe_files` that still hold; these files are not read again.

    Raises:
        ValueError: see `describe_files`.
    """
    files = {**(known or {}), **describe_files(directory, known or ())}
    content = {
        "format": FORMAT,
        "digest": _ZEROS.decode(),
        "provenance": dict(provenance),
        "files": dict(sorted(files.items())),
    }
    text = json.dumps(content, indent=2, allow_nan=False) + "\n"
    (directory / MANIFEST).write_bytes(seal(text.encode()))


def seal(raw: bytes) -> bytes:
    """The bytes of a manifest with the digest that belongs to them.

    Raises:
        ManifestError: they do not begin as a manifest does.
    """
    blank = _blanked(raw)
    digest = hashlib.sha256(blank).hexdigest().encode()
    return blank.replace(_ZEROS, digest, 1)


def _blanked(raw: bytes) -> bytes:
    place = len(_HEAD)
    if not raw.startswith(_HEAD) or raw[place + 64 : place + 65] != b'"':
        raise ManifestError("it does not begin as a manifest of this format does")
    return raw[:place] + _ZEROS + raw[place + 64 :]


# --- reading -------------------------------------------------------------------------------------


def read_manifest(directory: Path) -> dict[str, Any]:
    """The manifest of a directory, its digest and the form of its entries checked.

    Raises:
        ManifestError: damaged, of another format, or not complete.
        OSError: it cannot be read.
    """
    raw = (directory / MANIFEST).read_bytes()
    try:
        sealed = seal(raw)
    except ManifestError:
        raise ManifestError(_why_not(raw)) from None
    if raw != sealed:
        raise ManifestError(
            "changed after it was written: its text does not have the digest that it states"
        )
    try:
        manifest: dict[str, Any] = json.loads(raw)
    # whoever wrote the digest may have written anything
    except (ValueError, RecursionError) as error:
        raise ManifestError(f"damaged: {error}") from None
    files = manifest.get("files")
    if not isinstance(files, dict):
        raise ManifestError("no table of files")
    for name, entry in files.items():
        if not _is_entry(entry):
            raise ManifestError(f"the entry of {name!r} lacks size, sha256 or blocks")
    return manifest


def _why_not(raw: bytes) -> str:
    """Why these bytes are no manifest of this format."""
    try:
        content = json.loads(raw)
    except (ValueError, RecursionError) as error:
        return f"damaged: {error}"
    found = content.get("format") if isinstance(content, dict) else None
    if found == 1:
        return (
            "format 1, of an earlier version, which has no digest of itself and no hashes of "
            f"blocks; {FORMAT} is expected. Make the artifact again: remove artifact/ and "
            "report.json of its run, then resume the run"
        )
    if found != FORMAT:
        return f"format {found!r} is unknown, {FORMAT} is expected"
    return "changed after it was written: it does not begin as written manifests do"


def _is_entry(entry: Any) -> bool:
    if not isinstance(entry, dict):
        return False
    size, block, blocks = (entry.get(key) for key in ("size", "block", "blocks"))
    return (
        isinstance(size, int)
        and isinstance(block, int)
        and block > 0
        and isinstance(blocks, str)
        and re.fullmatch(r"[0-9a-f]*", blocks) is not None
        and len(blocks) == BLOCK_HEX * -(-size // block)
        and isinstance(entry.get("sha256"), str)
        and isinstance(entry.get("tensors", {}), dict)
    )
