"""AWQ directories in the GEMM layout, 4 bits.

For a layer of K inputs, N outputs and G groups of codes u = q + 8::

    qweight  int32 [K, N / 8]   codes along N, the eight of a word in the order 0 2 4 6 1 3 5 7
    qzeros   int32 [G, N / 8]   zero points likewise
    scales   fp16  [G, N]

Codes of fewer bits are stored in four. Zero points are always there: 8 where the trained weights
are symmetric. Layout of AutoAWQ (``WQLinear_GEMM``), as vLLM reads it. The output head is never
quantized in it.
"""

from collections.abc import Iterator, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from compressed_tensors.compressors.pack_quantized.base import PackedQuantizationCompressor
from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32
from compressed_tensors.entrypoints.convert.converters.autoawq import AutoAWQConverter
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from torch import Tensor

from qat.convert import write_shards
from qat.export.format import Loss, ReadMatrix, ReadTensor
from qat.export.hf_directory import (
    copy_side_files,
    kept_linears,
    opened,
    read_kept,
    write_config,
)
from qat.export.integer_layout import Grid, grid_of, layout_losses, outside_blocks
from qat.export.source import Matrix, Source
from qat.fidelity import FidelityError
from qat_kernels.layouts import AWQ_BITS, pack_awq

PARTS = ("qweight", "qzeros", "scales")


class Awq:
    """``format=awq``."""

    reader = f"compressed-tensors {metadata.version('compressed-tensors')} (AutoAWQConverter)"
    suffix = None
    use = "Readers that know AWQ load this directory, for example vLLM: `vllm serve .`"

    def __init__(self, options: Any = None) -> None:
        del options

    def losses(self, source: Source) -> Sequence[Loss]:
        """More than 4 bits, a quantized head, part-filled words, scales that fp16 rounds."""
        losses = layout_losses(source, "awq", (AWQ_BITS,), along_k=False)
        for name in source.matrices:
            if outside_blocks(name):
                why = "it is quantized, and AWQ keeps the output head in 16 bit"
                losses.append(Loss(name, why, "format=gptq_v2", writable=False))
        return losses

    def write(self, source: Source, directory: Path, notes: dict[str, Any]) -> None:
        """See the module."""
        grid = grid_of(source, (AWQ_BITS,))
        write_shards(_tensors(source, grid), directory, "export awq")
        write_config(source, directory, _section(source, grid), notes)
        copy_side_files(source, directory)

    def read(self, source: Source, directory: Path) -> Iterator[ReadMatrix | ReadTensor]:
        """What compressed-tensors' converter from AutoAWQ makes of it, unpacked and dequantized."""
        with opened(directory) as (files, section):
            converter = AutoAWQConverter.from_autoawq_config(section)
            scheme = _scheme(section["group_size"])
            used: set[str] = set()
            for name in source.matrices:
                stored = {f"{name}.{part}" for part in PARTS}
                if not stored <= files.names():
                    raise FidelityError(f"{min(stored - files.names())} is missing")
                used |= stored
                yield _read_matrix(name, {key: files.get(key) for key in stored}, converter, scheme)
            yield from read_kept(source, files, used)


def _scheme(group: int) -> QuantizationScheme:
    """What the converted weights are: it has a strategy of its own for whole rows."""
    size = {"strategy": "channel"} if group == -1 else {"strategy": "group", "group_size": group}
    weights = QuantizationArgs(num_bits=AWQ_BITS, type="int", symmetric=False, **size)
    return QuantizationScheme(targets=["Linear"], weights=weights)


def _tensors(source: Source, grid: Grid) -> Iterator[dict[str, Tensor]]:
    for matrix in source.all_matrices():
        parts = _packed(matrix, grid)
        yield {f"{matrix.name}.{part}": value for part, value in parts.items()}
    for name in source.kept:
        yield {name: source.tensor(name)}


def _packed(matrix: Matrix, grid: Grid) -> dict[str, Tensor]:
    return {
        "qweight": pack_awq(matrix.codes),
        "qzeros": pack_awq(grid.zero_point(matrix)),
        "scales": grid.scale(matrix).t().contiguous(),
    }


def _section(source: Source, grid: Grid) -> dict[str, Any]:
    """``quantization_config`` of config.json."""
    return {
        "quant_method": "awq",
        "version": "gemm",
        "bits": AWQ_BITS,
        "group_size": grid.group,
        "zero_point": True,
        "modules_to_not_convert": kept_linears(source),
    }


def _read_matrix(
    name: str, stored: dict[str, Tensor], converter: Any, scheme: QuantizationScheme
) -> ReadMatrix:
    state = {
        key.removeprefix(f"{name}."): value for key, value in converter.process(stored).items()
    }
    if "weight_packed" not in state:
        raise FidelityError(f"{name}: the reader takes it for a layer that is not quantized")
    state["weight_scale"] = state["weight_scale"].to(torch.float32)
    shape = torch.Size(state["weight_shape"].tolist())
    codes = unpack_from_int32(state["weight_packed"], AWQ_BITS, shape)
    unpacked = PackedQuantizationCompressor.decompress(state | {"weight_shape": shape}, scheme)
    zero_point = unpacked["weight_zero_point"]
    return ReadMatrix(name, codes, state["weight_scale"], zero_point, unpacked["weight"])
