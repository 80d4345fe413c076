"""What GPTQ and AWQ share: one width and one group for all weights, fp16 scales, no input scales.

A matrix of fewer bits goes into the wider codes of the format unchanged, and scales of larger
groups are repeated: both carry the same weight exactly. `Grid` is the width and group of an output.

Shape legend: N output features, K input features, G scales a row.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from qat.export.format import Loss
from qat.export.hf_directory import common_group, input_losses, integers_only, scale_losses
from qat.export.source import Matrix, Source

SCALE_DTYPE = torch.float16
"""Dtype of scales in both formats."""


@dataclass(frozen=True)
class Grid:
    """How all quantized weights of an output are held."""

    bits: int
    """Of a stored code."""
    group: int
    """Input features that share a scale; -1: all of a row."""
    symmetric: bool
    """Whether every zero point is 0."""

    def scale(self, matrix: Matrix) -> Tensor:
        """fp16 [N, G]."""
        group = matrix.codes.shape[1] if self.group == -1 else self.group
        return matrix.row_scale(group).to(SCALE_DTYPE)

    def zero_point(self, matrix: Matrix) -> Tensor:
        """int8 [N, G], signed as the codes are."""
        n, k = matrix.codes.shape
        group = k if self.group == -1 else self.group
        zero = matrix.zero_point
        if zero is None:
            return torch.zeros(n, k // group, dtype=torch.int8)
        return zero.expand(n, -1).repeat_interleave(matrix.group // group, dim=1)


def grid_of(source: Source, widths: Sequence[int]) -> Grid:
    """The smallest of a format's widths that holds all codes, and the largest common group."""
    specs = [info.spec for info in source.matrices.values()]
    widest = max(spec.bits for spec in specs)
    bits = next((width for width in widths if width >= widest), widths[-1])
    return Grid(bits, common_group(source), all(spec.symmetric for spec in specs))


def layout_losses(source: Source, name: str, widths: Sequence[int], along_k: bool) -> list[Loss]:
    """What a format of such a layout cannot carry.

    Args:
        source: the artifact.
        name: of the format, as it is written on the command line.
        widths: bits of a code that it knows, ascending.
        along_k: whether codes fill words along K (else along N); zero points always do along N.
    """
    losses = integers_only(source, f"format={name}")
    if losses:
        return losses
    grid = grid_of(source, widths)
    nearest = "format=compressed-tensors"
    inputs = input_losses(source)
    for layer, info in source.matrices.items():
        if info.spec.bits > widths[-1]:
            why = f"it has codes of {info.spec.bits} bits, the format has at most {widths[-1]}"
            wider = nearest if inputs else "format=gptq_v2"
            losses.append(Loss(layer, why, wider, writable=False))
        n, k = source.shape(layer)
        for features, what in [(n, "output"), (k, "input")][: 2 if along_k else 1]:
            if features * grid.bits % 32:
                why = f"its {features} {what} features of {grid.bits} bits do not fill 32-bit words"
                losses.append(Loss(layer, why, nearest, writable=False))
    return [*losses, *scale_losses(source, SCALE_DTYPE), *inputs]


def outside_blocks(name: str) -> bool:
    """Whether a layer is in no decoder block: the output head."""
    return not any(part.isdigit() for part in name.split("."))
