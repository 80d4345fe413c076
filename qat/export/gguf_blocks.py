"""GGUF blocks: 32 codes with their scale, packed from the trained (q, s) and never re-quantized.

Layouts (ggml-common.h), one block of 32 inputs, element j in the low nibble of byte j and element
j + 16 in its high nibble::

    Q4_0   18 bytes  fp16 d, 16 bytes u         w = d (u - 8)      u = q + 8
    Q4_1   20 bytes  fp16 d, fp16 m, 16 bytes u w = d u + m        m = -(z + 8) s
    Q8_0   34 bytes  fp16 d, 32 int8            w = d q

All three are exact where the scale (and m) is an fp16 number: levels have at most 8 bits, fp16 has
11, and the product fits the 24 bits of fp32 in which every reader dequantizes. Groups larger than
32 repeat their scale.

Shape legend: N output features, K input features, B = K / 32 blocks a row.
"""

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from qat.export.source import Matrix

BLOCK = 32
"""Inputs in a block."""

TypeName = Literal["Q4_0", "Q4_1", "Q8_0", "F16", "BF16", "F32"]

SMALLEST = {"Q4_0": 18, "Q4_1": 20, "Q8_0": 34}
"""Bytes of a block."""


@dataclass(frozen=True)
class Choice:
    """How one tensor is stored, and what that loses."""

    type: TypeName
    """GGML type."""
    problem: str | None = None
    """Why it is not exact, or None."""


def choose(matrix: Matrix) -> Choice:
    """The smallest type that carries a matrix exactly, else the nearest with its reason."""
    if matrix.group % BLOCK:
        reason = (
            f"its scales cover {matrix.group} inputs, a block of GGUF covers {BLOCK}; stored as "
            "the 16-bit weight"
        )
        return Choice(_values_type(matrix), reason)
    if matrix.zero_point is None:
        kind: TypeName = "Q4_0" if matrix.spec.bits <= 4 else "Q8_0"
    else:
        kind = "Q4_1" if _q4_1_is_exact(matrix) else "Q8_0"
        # q - z of 4 bits lies in -15 ... 15: Q8_0 holds it with the same scale and no zero point
        levels = matrix.levels
        if int(levels.min()) < -128 or int(levels.max()) > 127:
            return Choice(
                _values_type(matrix), "codes minus zero points exceed 8 bits; stored in 16 bits"
            )
    if _is_fp16(matrix.scale):
        return Choice(kind)
    if not bool(torch.isfinite(matrix.scale.half()).all()):
        return Choice(_values_type(matrix), "scales overflow fp16; stored as the weight")
    return Choice(kind, "scales are not fp16 numbers and are rounded to fp16")


def _q4_1_is_exact(matrix: Matrix) -> bool:
    """Whether d and m = -(z + 8) s are fp16 numbers, and z can be had back from them."""
    if matrix.spec.bits > 4 or matrix.zero_point is None:
        return False
    # z + 8 has 4 bits and s at most 24, but bf16 scales have 8: the product is exact in fp64
    minimum = (matrix.zero_point.double() + 8) * matrix.scale.double()
    return _is_fp16(matrix.scale) and _is_fp16(minimum) and bool((matrix.scale != 0).all())


def _is_fp16(values: Tensor) -> bool:
    return torch.equal(values.half().to(values.dtype), values)


def value_type(values: Tensor) -> TypeName:
    """The smallest of F16, BF16 and F32 that holds a tensor exactly; any shape."""
    if values.dtype == torch.bfloat16:
        return "F16" if _is_fp16(values) else "BF16"
    if _is_fp16(values):
        return "F16"
    return "BF16" if torch.equal(values.bfloat16().to(values.dtype), values) else "F32"


def _values_type(matrix: Matrix) -> TypeName:
    """For a dequantized weight: a 16-bit type that is exact, else F16 unless it overflows."""
    weight = matrix.weight()
    exact = value_type(weight)
    if exact != "F32":
        return exact
    return "F16" if bool(torch.isfinite(weight.half()).all()) else "F32"


def pack(matrix: Matrix, kind: TypeName) -> np.ndarray[Any, Any]:
    """Rows of a quantized weight as they stand in the file.

    Returns:
        uint8 [N, bytes] for blocks and BF16, else fp16 or fp32 [N, K].
    """
    if kind not in SMALLEST:
        return pack_values(matrix.weight(), kind)
    n, k = matrix.codes.shape
    scale = matrix.row_scale(BLOCK)
    parts = [_fp16_bytes(scale)]
    if kind == "Q8_0":
        levels = matrix.levels.to(torch.int8).numpy().reshape(n, k // BLOCK, BLOCK)
        parts.append(levels.view(np.uint8))
    else:
        if kind == "Q4_1":
            assert matrix.zero_point is not None
            zero = matrix.zero_point.expand(n, -1).repeat_interleave(matrix.group // BLOCK, dim=1)
            parts.append(_fp16_bytes(-(zero.double() + 8) * scale.double()))
        unsigned = (matrix.codes + 8).to(torch.uint8).numpy().reshape(n, k // BLOCK, 2, 16)
        parts.append(unsigned[:, :, 0] | (unsigned[:, :, 1] << np.uint8(4)))
    return np.concatenate(parts, axis=2).reshape(n, -1)


def _fp16_bytes(values: Tensor) -> np.ndarray[Any, Any]:
    """[N, B] as uint8 [N, B, 2]."""
    half: np.ndarray[Any, Any] = values.half().contiguous().numpy()
    return half.view(np.uint8).reshape(*values.shape, 2)


def pack_values(values: Tensor, kind: TypeName) -> np.ndarray[Any, Any]:
    """A tensor stored as values: fp16 or fp32 of its shape, BF16 as bytes [..., 2 K]."""
    result: np.ndarray[Any, Any]
    if kind == "BF16":
        result = values.bfloat16().contiguous().view(torch.uint8).numpy()
    else:
        dtype = torch.float16 if kind == "F16" else torch.float32
        result = values.to(dtype).contiguous().numpy()
    return result


@dataclass(frozen=True)
class Unpacked:
    """A block-quantized tensor as the gguf package reads it."""

    codes: Tensor
    """int16 [N, K]; levels (no zero point) unless ``zero_point`` is given."""
    scale: Tensor
    """fp32 [N, B]."""
    zero_point: Tensor | None
    """int16 [N, B], for Q4_1."""
    values: Tensor
    """fp32 [N, K]."""


def unpack(data: np.ndarray[Any, Any], kind: TypeName) -> Unpacked:
    """Read blocks with gguf's own dequantizer; uint8 [N, bytes].

    Codes are what it gives for the same blocks with d = 1 (and m = 0).
    """
    from gguf import GGMLQuantizationType
    from gguf.quants import dequantize

    type_ = GGMLQuantizationType[kind]
    # a copy in memory: slices of a memory map are slow
    data = np.array(data)
    values = torch.from_numpy(dequantize(data, type_))
    n = data.shape[0]
    blocks = data.reshape(n, -1, SMALLEST[kind])
    scale = _halves(blocks, 0)
    minimum = _halves(blocks, 2) if kind == "Q4_1" else None
    blocks[:, :, :2] = np.frombuffer(np.float16(1).tobytes(), dtype=np.uint8)
    if minimum is not None:
        blocks[:, :, 2:4] = 0
    units = dequantize(blocks.reshape(n, -1), type_)
    codes = torch.from_numpy(units.astype(np.int16))
    if minimum is None:
        return Unpacked(codes, scale, None, values)
    zero = torch.where(scale == 0, 0.0, -minimum / scale) - 8
    return Unpacked(codes - 8, scale, zero.round().to(torch.int16), values)


def _halves(blocks: np.ndarray[Any, Any], at: int) -> Tensor:
    """The fp16 number at byte ``at`` of each block, fp32 [N, B]."""
    halves = np.ascontiguousarray(blocks[:, :, at : at + 2]).view(np.float16)
    return torch.from_numpy(halves[:, :, 0].astype(np.float32))


def permutation(rows: int, heads: int) -> Tensor:
    """Row order of q and k in the llama architecture; int64 [rows].

    transformers rotates the two halves of a head, llama.cpp neighbouring pairs, so row i of the
    first half and row i of the second half become neighbours. Whole rows move, so packed blocks and
    biases move alike.

    >>> permutation(8, 2).tolist()
    [0, 2, 1, 3, 4, 6, 5, 7]
    """
    return torch.arange(rows).reshape(heads, 2, -1).swapaxes(1, 2).reshape(-1)
