"""The header of a safetensors file, read without loading a tensor.

Layout: 8 bytes little-endian length n, n bytes of JSON ``{name: {dtype, shape, data_offsets}}``,
then the tensors' bytes without gaps; offsets count from the end of the header.
(https://huggingface.co/docs/safetensors, section "Format")
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path

BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "U16": 16, "I16": 16, "U32": 32, "I32": 32, "U64": 64, "I64": 64,
    "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F16": 16, "BF16": 16, "F32": 32, "F64": 64,
}  # fmt: skip
"""Bits per element of each dtype name."""

MAX_HEADER_BYTES = 100_000_000
"""The format's own limit; a larger length means that the first 8 bytes are damaged."""


class BrokenHeader(ValueError):  # noqa: N818  (reads as what it is)
    """The file is truncated or not a safetensors file."""


@dataclass(frozen=True)
class TensorEntry:
    """Where one tensor lies: bytes ``begin`` to ``end`` of the file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return self.end - self.begin


@dataclass(frozen=True)
class Header:
    """All tensors of a file in the order of their bytes, and where the first of them begins."""

    tensors: tuple[TensorEntry, ...]
    data_begin: int
    data_end: int


def read_header(path: Path) -> Header:
    """Read and check the header; the data may be shorter than it says (see `Header.data_end`).

    Raises:
        BrokenHeader: no complete header, or offsets that overlap, leave gaps or contradict shapes.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        prefix = file.read(8)
        length = int.from_bytes(prefix, "little")
        if len(prefix) < 8 or length > min(size - 8, MAX_HEADER_BYTES):
            raise BrokenHeader(
                f"truncated: the header should take {8 + length} bytes, the file has {size}"
                if len(prefix) == 8 and length <= MAX_HEADER_BYTES
                else "not a safetensors file: no plausible header length"
            )
        raw = file.read(length)
    try:
        table = json.loads(raw)
        entries = [
            _entry(name, spec, 8 + length) for name, spec in table.items() if name != "__metadata__"
        ]
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise BrokenHeader(f"header is not valid: {error}") from error
    entries.sort(key=lambda entry: (entry.begin, entry.end))
    position = 8 + length
    for entry in entries:
        if entry.begin != position:
            raise BrokenHeader(f"header is not valid: {entry.name} does not follow its predecessor")
        position = entry.end
    return Header(tuple(entries), 8 + length, position)


def _entry(name: str, spec: dict[str, object], data_begin: int) -> TensorEntry:
    shape, offsets = spec["shape"], spec["data_offsets"]
    if not isinstance(shape, list) or not isinstance(offsets, list):
        raise ValueError(f"{name} has no shape or offsets")
    if not all(type(number) is int and number >= 0 for number in [*shape, *offsets]):
        raise ValueError(f"{name}: shape {shape} and offsets {offsets} are not all counts")
    begin, end = offsets
    dtype = str(spec["dtype"])
    entry = TensorEntry(name, dtype, tuple(shape), data_begin + begin, data_begin + end)
    if dtype in BITS and entry.numel * BITS[dtype] != 8 * entry.nbytes:
        raise ValueError(f"{name}: {shape} of {dtype} does not take {entry.nbytes} bytes")
    return entry
