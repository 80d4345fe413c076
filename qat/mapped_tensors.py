"""Tensors of a checkpoint that leave memory one by one, and what a process holds in memory.

Loading repacks most of a file: once codes are in the layout of a kernel, the pages of the file that
held them are of no use. With one mapping of the whole file they would stay resident for as long as
a single kept tensor views it. Here each tensor is a mapping of its own.
"""

import ctypes
import os
from contextlib import ExitStack
from pathlib import Path

import torch
from torch import Tensor

from qat.errors import UserError
from qat.safetensors_header import BrokenHeader, TensorEntry, read_header
from qat.tensor_files import TensorFiles, weight_files

DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "U16": torch.uint16,
    "I16": torch.int16,
    "U32": torch.uint32,
    "I32": torch.int32,
    "U64": torch.uint64,
    "I64": torch.int64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
}
"""Dtypes by their names in safetensors."""

PRIMITIVES = 128
"""Compiled matmuls that oneDNN keeps: decoding takes one for each shape of layer and batch."""


class MappedTensors(TensorFiles):
    """`TensorFiles` whose tensors are private, read-on-demand mappings that end with the tensor.

    Writing to such a tensor changes memory and never the file.
    """

    def __init__(self, directory: Path) -> None:
        """Check every shard and note where its tensors lie.

        Raises:
            UserError: no weights, a shard is missing or unreadable, or a tensor is missing.
        """
        with ExitStack() as stack:
            super().__init__(directory, stack)
        self._places: dict[str, tuple[Path, TensorEntry]] = {}
        for file in sorted(set(weight_files(directory).values())) or ["model.safetensors"]:
            path = directory / file
            try:
                entries = read_header(path).tensors
            except BrokenHeader as error:
                raise UserError(f"{path}: {error}; copy the artifact again") from error
            self._places.update((entry.name, (path, entry)) for entry in entries)

    def get(self, name: str) -> Tensor:
        """One tensor, as stored; its pages are in memory once they are read."""
        self.used.add(name)
        path, entry = self._places[name]
        dtype = DTYPES.get(entry.dtype)
        if dtype is None:
            raise UserError(f"{name}: dtype {entry.dtype} in {path}; torch has no such numbers")
        if not entry.nbytes:
            return torch.empty(entry.shape, dtype=dtype)
        # the mapping starts at the file's beginning: pages that nobody reads cost nothing
        mapping = torch.UntypedStorage.from_file(str(path), shared=False, nbytes=entry.end)
        flat = torch.asarray(mapping[entry.begin : entry.end], dtype=torch.uint8)
        return flat.view(dtype).view(entry.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors: the packed size of the model."""
        return sum(entry.nbytes for _, entry in self._places.values())


def packed_bytes(artifact: Path | str) -> int:
    """Bytes of all tensors of an artifact or checkpoint directory.

    Raises:
        UserError: no weights, a shard is missing or unreadable.
    """
    return MappedTensors(Path(artifact)).nbytes


def release_freed_memory() -> None:
    """Hand memory that was freed back to the system, where the C library keeps it (glibc).

    Repacking leaves holes of many megabytes between what stays.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def limit_primitive_caches() -> None:
    """Let oneDNN keep `PRIMITIVES` compiled matmuls and not 1,024, unless the user has chosen.

    It compiles one for each shape, so each new prompt length takes memory that no model file shows:
    2.2 MiB a length for a small int4 Llama. With this limit that ends at 67 MiB. Both caches read
    their limit when they are first used: call this before.
    """
    for name in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):
        os.environ.setdefault(name, str(PRIMITIVES))


def resident_bytes() -> dict[str, int]:
    """Bytes of this process in RAM: ``now`` and ``peak``, mapped files included (Linux).

    The peak counts from the last `reset_peak`, or from the start of the process.
    """
    lines = Path("/proc/self/status").read_text("ascii").splitlines()
    fields = dict(line.split(":", 1) for line in lines)
    return {key: 1024 * int(fields[name].split()[0]) for key, name in _FIELDS.items()}


_FIELDS = {"now": "VmRSS", "peak": "VmHWM"}


def reset_peak() -> None:
    """Let `resident_bytes` count its peak from now on (Linux)."""
    Path("/proc/self/clear_refs").write_text("5", "ascii")
