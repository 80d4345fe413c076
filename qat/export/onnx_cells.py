"""How codes lie in the cells of ONNX Runtime's MatMulNBits.

The operator (domain com.microsoft) multiplies by a weight of B blocks a row, each of ``block``
codes of 2, 4 or 8 bits with one scale: w = (u - z) s with unsigned u, z = 2^(bits-1) where no zero
points are given. Codes of other widths go into the next wider cell, which carries them exactly;
groups larger than a block repeat their scale.
Specification: https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md

Shape legend: N output features, K input features, B = ceil(K / block) blocks a row.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from qat.export.source import Matrix
from qat_kernels import QuantSpec

CELL_BITS = (2, 4, 8)
"""Widths for which the CPU kernel of onnxruntime 1.31 exists."""
BLOCKS = (256, 128, 64, 32, 16)
"""Block sizes of the operator, the largest first."""


@dataclass(frozen=True)
class Cells:
    """Layout of one matrix."""

    n: int
    """Output features."""
    k: int
    """Input features."""
    bits: int
    """Width of a cell."""
    block: int
    """Codes that share a scale."""
    asymmetric: bool
    """Whether zero points are stored."""

    @property
    def blocks(self) -> int:
        """Blocks a row; the last one may reach beyond K."""
        return -(-self.k // self.block)

    @property
    def codes_shape(self) -> tuple[int, int, int]:
        """Of the codes, uint8."""
        return self.n, self.blocks, self.block * self.bits // 8

    @property
    def scales_shape(self) -> tuple[int, int]:
        """Of the scales, fp32."""
        return self.n, self.blocks

    @property
    def zeros_shape(self) -> tuple[int, int]:
        """Of the zero points, uint8; each row starts at a byte."""
        return self.n, -(-self.blocks * self.bits // 8)


def block_size(spec: QuantSpec, k: int) -> int | None:
    """Largest block whose codes all share a scale, or None where not even 16 do.

    >>> block_size(QuantSpec(group_size=96), 192)
    32
    >>> block_size(QuantSpec(granularity="channel"), 100)
    16
    """
    if spec.granularity == "group":
        return next((block for block in BLOCKS if spec.group_size % block == 0), None)
    # one scale a row: the last block may be cut off by K
    return next((block for block in BLOCKS if k % block == 0), BLOCKS[-1])


def cells_of(spec: QuantSpec, n: int, k: int) -> Cells:
    """The layout of a weight [N, K].

    Raises:
        ValueError: no block size fits its groups.
    """
    block = block_size(spec, k)
    if block is None:
        raise ValueError(f"groups of {spec.group_size} are no multiple of {BLOCKS[-1]}")
    bits = next(width for width in CELL_BITS if spec.bits <= width)
    return Cells(n, k, bits, block, not spec.symmetric)


def fill(matrix: Matrix, cells: Cells) -> tuple[Tensor, Tensor, Tensor | None]:
    """Codes, scales and zero points of a matrix, shaped as `Cells` says; nothing is rounded."""
    offset = 1 << (cells.bits - 1)
    codes = _pack(_unsigned(matrix.codes, offset), cells.bits, cells.blocks * cells.block)
    scale = _per_block(matrix.scale, matrix, cells)
    if matrix.zero_point is None:
        return codes.reshape(cells.codes_shape), scale, None
    zeros = _unsigned(_per_block(matrix.zero_point, matrix, cells), offset)
    width = cells.zeros_shape[1] * 8 // cells.bits
    return codes.reshape(cells.codes_shape), scale, _pack(zeros, cells.bits, width)


def _unsigned(signed: Tensor, offset: int) -> Tensor:
    # in int16, because 127 + 128 does not fit int8
    return (signed.to(torch.int16) + offset).to(torch.uint8)


def _per_block(per_group: Tensor, matrix: Matrix, cells: Cells) -> Tensor:
    """[N or 1, G] as [N, B], contiguous."""
    blocks = cells.blocks // per_group.shape[1]
    rows = per_group.expand(matrix.codes.shape[0], -1)
    return rows.repeat_interleave(blocks, dim=1).contiguous()


def _pack(values: Tensor, bits: int, width: int) -> Tensor:
    """uint8 [N, M] below 2^bits as bytes [N, width * bits / 8], the first value in the low bits."""
    padded = torch.nn.functional.pad(values, (0, width - values.shape[1]))
    cells = padded.reshape(len(values), -1, 8 // bits)
    packed = cells[..., 0].clone()
    for index in range(1, cells.shape[2]):
        packed |= cells[..., index] << (bits * index)
    return packed
