"""``qat verify``: compare an artifact with its manifest, and say where it differs first."""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from tqdm import tqdm

from qat.errors import UserError
from qat.manifest import (
    BLOCK_HEX,
    MANIFEST,
    SIGNATURE,
    ManifestError,
    file_names,
    is_pickle,
    is_safe,
    pieces,
    read_manifest,
    sha256,
)
from qat.safetensors_header import BrokenHeader, Header, read_header

Kind = Literal[
    "manifest", "unsafe", "pickle", "missing", "extra", "size", "header", "content", "signature"
]


@dataclass(frozen=True)
class Problem:
    """One difference between a directory and its manifest."""

    kind: Kind
    """What sort of difference."""
    file: str
    """File name relative to the artifact."""
    detail: str
    """What is wrong, in words."""
    tensor: str | None = None
    """Tensor concerned, where it is known."""
    span: tuple[int, int] | None = None
    """Bytes [begin, end) of the file within which the first difference lies, where it is known."""

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
    present = file_names(directory)
    problems = [*_unsafe_files(directory, present)]
    try:
        listed: dict[str, dict[str, Any]] = read_manifest(directory)["files"]
    except ManifestError as error:
        return [*problems, Problem("manifest", MANIFEST, str(error))]
    problems += [
        Problem("unsafe", name, "the manifest names a file outside the artifact")
        for name in listed
        if not is_safe(name)
    ]
    refused = {problem.file for problem in problems}
    problems += [
        Problem("extra", name, "not listed in the manifest")
        for name in present
        if name not in listed and name not in (MANIFEST, SIGNATURE) and name not in refused
    ]
    todo = {name: entry for name, entry in listed.items() if name not in refused}
    total = sum((directory / n).stat().st_size for n in todo if (directory / n).is_file())
    wrong = set()
    with tqdm(total=total, unit="B", unit_scale=True, delay=2, disable=None, leave=False) as bar:
        for name, entry in todo.items():
            found = _check_file(directory / name, name, entry, hashes, bar)
            problems += found
            wrong |= {name} if found else set()
    weights = {name for name in todo if name.endswith(".safetensors")}
    if weights and weights <= wrong and hashes and _is_anothers(directory, todo, wrong):
        detail = "belongs to another artifact: the weights that it lists are not the ones here"
        problems.insert(0, Problem("manifest", MANIFEST, detail))
    return problems


def _is_anothers(directory: Path, listed: dict[str, dict[str, Any]], wrong: set[str]) -> bool:
    """Whether the files that differ are whole, so that damage does not explain them."""
    for name in wrong:
        if name.endswith(".safetensors"):
            try:
                header = read_header(directory / name)
            except (BrokenHeader, OSError):
                return False
            tensors = [(t, sha256(directory / name, t.begin, t.end)) for t in header.tensors]
            expected = listed[name].get("tensors", {})
            # damage leaves most tensors as they are; another artifact shares few
            same = sum(digest == expected.get(t.name) for t, digest in tensors)
            if header.data_end != (directory / name).stat().st_size or 2 * same > len(tensors):
                return False
    return True


def _unsafe_files(directory: Path, names: list[str]) -> Iterator[Problem]:
    """Files that must not be there, whatever the manifest says of them."""
    for name in names:
        target = _link_target(directory, name)
        if target is not None:
            yield Problem("unsafe", name, f"a link to {target}, outside the artifact")
        elif not is_safe(name):
            yield Problem("unsafe", name, "a name that other systems read as a path")
        elif is_pickle(directory / name):
            detail = "a pickle file can run code when it is loaded; not allowed"
            yield Problem("pickle", name, detail)


def _link_target(directory: Path, name: str) -> Path | None:
    """What a file is outside the artifact; None for a file inside it.

    In the cache of the Hub, every file of ``snapshots/REVISION`` is a link to the folder ``blobs``
    two levels up: these count as inside.
    """
    root = directory.resolve()
    try:
        target = (directory / name).resolve()
    except (OSError, RuntimeError):  # a link to itself
        return directory / name
    blobs = root.parent.parent / "blobs" if root.parent.name == "snapshots" else None
    return None if target.is_relative_to(root) or target.parent == blobs else target


def _check_file(
    path: Path, name: str, entry: dict[str, Any], hashes: bool, bar: Any
) -> list[Problem]:
    if not path.is_file():
        return [Problem("missing", name, "listed in the manifest, but not there")]
    size = path.stat().st_size
    problems = []
    if size != entry["size"]:
        detail = f"{size} bytes, the manifest says {entry['size']}"
        span = _differing(path, entry)[0] if hashes else None
        if span is not None:
            detail += f"; the first difference lies in bytes {span[0]} to {span[1]}"
        problems.append(Problem("size", name, detail, span=span))
    header = None
    if name.endswith(".safetensors"):
        try:
            header = read_header(path)
        except BrokenHeader as error:
            span = _differing(path, entry)[0] if hashes else None
            where = f"; bytes {span[0]} to {span[1]} differ" if span and not problems else ""
            return [*problems, Problem("header", name, f"{error}{where}", span=span)]
        cut = next((t for t in header.tensors if t.end > size), None)
        if cut is not None:
            detail = f"truncated in tensor {cut.name} (bytes {cut.begin} to {cut.end} of the file)"
            return [*problems, Problem("header", name, detail, cut.name, (size, cut.end))]
        if header.data_end < size:
            detail = f"{size - header.data_end} bytes after the last tensor"
            problems.append(Problem("header", name, detail, span=(header.data_end, size)))
    if hashes and not problems and sha256(path, bar=bar) != entry["sha256"]:
        return _locate(path, name, header, entry)
    return problems


def _differing(path: Path, entry: dict[str, Any]) -> list[tuple[int, int] | None]:
    """The blocks of a file whose hashes are not the manifest's, or [None].

    Of a file of another size, the last block in common may be shorter than in the manifest; it
    counts as equal there, since nothing is known of its part.
    """
    size, step, expected = path.stat().st_size, entry["block"], entry["blocks"]
    found: list[tuple[int, int] | None] = []
    for number in range(len(expected) // BLOCK_HEX):
        begin, end = number * step, min((number + 1) * step, entry["size"])
        if end > size:
            break
        digest = hashlib.sha256(b"".join(pieces(path, begin, end))).hexdigest()
        if digest[:BLOCK_HEX] != expected[number * BLOCK_HEX : (number + 1) * BLOCK_HEX]:
            found.append((begin, end))
    return found or [None]


def _locate(path: Path, name: str, header: Header | None, entry: dict[str, Any]) -> list[Problem]:
    """Where a file of the right size differs: the first block, and each tensor concerned."""
    blocks = [span for span in _differing(path, entry) if span]
    problems = _differing_tensors(path, name, header, entry, blocks) if header else []
    if problems or not blocks:
        return problems or [Problem("content", name, f"sha256 differs, {entry['size']} bytes")]
    begin, end = blocks[0]
    where = ""
    if header is not None:
        end, where = min(end, header.data_begin), " (in the header)"
    detail = f"bytes {begin} to {end} differ{where}"
    return [Problem("content", name, detail, span=(begin, end))]


def _differing_tensors(
    path: Path, name: str, header: Header, entry: dict[str, Any], blocks: list[tuple[int, int]]
) -> list[Problem]:
    """The tensors that a changed safetensors file adds, lacks or holds with other bytes."""
    problems = []
    expected: dict[str, str] = entry.get("tensors", {})
    for tensor in header.tensors:
        whole = (tensor.begin, tensor.end)
        if tensor.name not in expected:
            detail = f"tensor {tensor.name} (bytes {whole[0]} to {whole[1]}) is not in the manifest"
            problems.append(Problem("content", name, detail, tensor.name, whole))
        elif sha256(path, *whole) != expected[tensor.name]:
            inside = (max(b, whole[0]) for b, _ in blocks), (min(e, whole[1]) for _, e in blocks)
            span = next((pair for pair in zip(*inside) if pair[0] < pair[1]), whole)
            detail = f"bytes {span[0]} to {span[1]} differ (in tensor {tensor.name})"
            problems.append(Problem("content", name, detail, tensor.name, span))
    for missing in sorted(expected.keys() - {tensor.name for tensor in header.tensors}):
        problems.append(Problem("content", name, f"tensor {missing} is missing", missing))
    return problems
