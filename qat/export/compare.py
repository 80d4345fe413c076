"""Read-back: what an outside reader found in an export, held against the artifact."""

import math
from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from qat.export.format import ReadMatrix, ReadTensor
from qat.export.source import Matrix, Source


@dataclass
class ReadBack:
    """The result of a comparison; every difference has its line."""

    reader: str
    """Package that read the files."""
    matrices: int = 0
    """Quantized weights compared."""
    codes_equal: int = 0
    """Of these, with equal codes (and zero points, where the format has them)."""
    scales_equal: int = 0
    """Of these, with equal scales."""
    values_equal: int = 0
    """Of these, with equal weights (fp32) as the reader computes them, or no such reader."""
    tensors: int = 0
    """Kept tensors compared."""
    tensors_equal: int = 0
    """Of these, equal."""
    not_compared: list[str] = field(default_factory=list)
    """Names that the reader did not give back."""
    differences: list[str] = field(default_factory=list)
    """One line for each name that differs."""
    relative_error: float = 0.0
    """Largest relative error of a tensor, ||w' - w|| / ||w||."""

    @property
    def exact(self) -> bool:
        """Whether everything was compared and is equal."""
        return not (self.differences or self.not_compared)

    def summary(self) -> str:
        """One line for people."""
        text = (
            f"read back with {self.reader}: codes {self.codes_equal}/{self.matrices}, scales "
            f"{self.scales_equal}/{self.matrices}, weights {self.values_equal}/{self.matrices}, "
            f"kept tensors {self.tensors_equal}/{self.tensors} equal"
        )
        if self.not_compared:
            text += f"; not compared: {', '.join(self.not_compared[:4])}"
        if self.differences:
            text += f"; largest relative error of a tensor {self.relative_error:.2e}"
        return text


def read_back(
    source: Source, found: Iterable[ReadMatrix | ReadTensor], reader: str, names: Iterable[str]
) -> ReadBack:
    """Compare what a reader found with the artifact, one tensor at a time.

    Args:
        source: the artifact.
        found: from `Format.read`.
        reader: its name and version.
        names: what must appear: modules of matrices, and kept tensors.
    """
    result = ReadBack(reader)
    left = set(names)
    for item in found:
        left.discard(item.name)
        if isinstance(item, ReadTensor):
            expected = source.tensor(item.name) if item.expected is None else item.expected
            _compare_tensor(result, expected, item)
        else:
            _compare_matrix(result, source.matrix(item.name), item)
    result.not_compared = sorted(left)
    return result


def relative_error(found: Tensor, expected: Tensor) -> float:
    """||found - expected|| / ||expected|| in fp64, inf where that is no number; equal shapes."""
    wanted = expected.to(torch.float64)
    error = float(torch.linalg.vector_norm(found.to(torch.float64) - wanted))
    norm = float(torch.linalg.vector_norm(wanted))
    error = error / norm if norm else error
    # a NaN would lose every comparison, and so be taken for the smallest error
    return math.inf if math.isnan(error) else error


def _compare_tensor(result: ReadBack, expected: Tensor, item: ReadTensor) -> None:
    result.tensors += 1
    if item.values.shape != expected.shape:
        shapes = f"{tuple(item.values.shape)}, expected {tuple(expected.shape)}"
        result.differences.append(f"{item.name}: shape {shapes}")
        result.relative_error = max(result.relative_error, 1.0)
        return
    # fp32 holds every value of every 16-bit dtype; a NaN must be found where it was
    found, wanted = item.values.to(torch.float32), expected.to(torch.float32)
    if _same(found, wanted):
        result.tensors_equal += 1
        return
    error = relative_error(found, wanted)
    result.relative_error = max(result.relative_error, error)
    result.differences.append(f"{item.name}: values differ, relative error {error:.2e}")


def _same(found: Tensor, wanted: Tensor) -> bool:
    """Whether all values are equal, and NaN stands in the same places; equal shapes."""
    nan = wanted.isnan()
    return torch.equal(found.isnan(), nan) and torch.equal(
        found.masked_fill(nan, 0), wanted.masked_fill(nan, 0)
    )


def _compare_matrix(result: ReadBack, matrix: Matrix, item: ReadMatrix) -> None:
    result.matrices += 1
    wrong = []
    if _codes_equal(matrix, item):
        result.codes_equal += 1
    else:
        wrong.append("codes")
    if item.scale is not None and _scales_equal(matrix, item.scale):
        result.scales_equal += 1
    else:
        wrong.append("scales")
    weight = matrix.weight()
    values = item.values
    if values is None or (values.shape == weight.shape and torch.equal(values.float(), weight)):
        result.values_equal += 1
    else:
        wrong.append("weights")
    if not wrong:
        return
    if values is not None and values.shape == weight.shape:
        error = relative_error(values, weight)
        result.relative_error = max(result.relative_error, error)
        wrong.append(f"relative error {error:.2e}")
    result.differences.append(f"{item.name}: {', '.join(wrong)} differ")


def _codes_equal(matrix: Matrix, item: ReadMatrix) -> bool:
    if item.codes is None or item.codes.shape != matrix.codes.shape:
        return False
    if item.zero_point is None:
        return torch.equal(item.codes.to(torch.int16), matrix.levels)
    if matrix.zero_point is None:
        expected = torch.zeros(1, 1, dtype=torch.int16)
    else:
        expected = matrix.zero_point.to(torch.int16)
    zero = item.zero_point.to(torch.int16)
    return torch.equal(item.codes.to(torch.int16), matrix.codes.to(torch.int16)) and torch.equal(
        _spread(zero, matrix), _spread(expected, matrix)
    )


def _scales_equal(matrix: Matrix, scale: Tensor) -> bool:
    return torch.equal(_spread(scale.float(), matrix), _spread(matrix.scale, matrix))


def _spread(per_group: Tensor, matrix: Matrix) -> Tensor:
    """[N or 1, G'] as [N, K], so that groups of different sizes compare."""
    n, k = matrix.codes.shape
    if per_group.ndim != 2 or per_group.shape[1] == 0 or k % per_group.shape[1]:
        return per_group
    return per_group.repeat_interleave(k // per_group.shape[1], dim=1).expand(n, k)
