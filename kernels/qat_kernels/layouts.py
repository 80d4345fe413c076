"""Packed layouts of other formats, as permutations around `qat_kernels.numerics.pack`.

The bit arithmetic stays in `pack` and `unpack`; here axes are swapped and columns reordered.

========  =============================  ==========================================
format    codes                          zero points
========  =============================  ==========================================
GPTQ      int32 [K b / 32, N], along K   int32 [G, N b / 32], along N; version 1
                                         stores z - 1, version 2 stores z
AWQ GEMM  int32 [K, N / 8], along N      int32 [G, N / 8], along N, both with the
                                         columns of a word in the order `AWQ_ORDER`
========  =============================  ==========================================

All formats store u = q + 2^(b-1), as `pack` does. Sources: GPTQ-for-LLaMa and AutoGPTQ (version 1),
GPTQModel (version 2, ``checkpoint_format``), AutoAWQ (``WQLinear_GEMM``).

Shape legend: N output features, K input features, G scales a row, b bits.
"""

import torch
from torch import Tensor

from qat_kernels.numerics import pack, unpack

AWQ_BITS = 4
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
"""Nibble i of a word holds column ``AWQ_ORDER[i]`` of its eight."""


def pack_along_k(codes: Tensor, bits: int) -> Tensor:
    """GPTQ's qweight int32 [K b / 32, N] from int8 codes [N, K].

    Raises:
        ValueError: K * bits is no multiple of 32, or a code does not fit (see `pack`).
    """
    _whole_words(codes.shape[1], bits, "input")
    return pack(codes, bits).t().contiguous()


def unpack_along_k(words: Tensor, bits: int) -> Tensor:
    """The inverse of `pack_along_k`: int8 [N, K]."""
    return unpack(words.t().contiguous(), bits, words.shape[0] * 32 // bits)


def pack_gptq_zeros(zero_point: Tensor, bits: int, version: int) -> Tensor:
    """GPTQ's qzeros int32 [G, N b / 32] from int8 zero points [N, G].

    Raises:
        ValueError: N * bits is no multiple of 32, or in version 1 a zero point is the least code:
            one less than it would wrap around in every reader.
    """
    _whole_words(zero_point.shape[0], bits, "output")
    if version == 1:
        least = -(2 ** (bits - 1))
        if int(zero_point.min()) <= least:
            raise ValueError(f"GPTQ version 1 stores z - 1: the zero point {least} would wrap")
        zero_point = zero_point - 1
    return pack(zero_point.t().contiguous(), bits)


def unpack_gptq_zeros(words: Tensor, bits: int, version: int) -> Tensor:
    """The inverse of `pack_gptq_zeros`: int8 [N, G]."""
    stored = unpack(words, bits, words.shape[1] * 32 // bits)
    return stored.t().contiguous() + (1 if version == 1 else 0)


def pack_awq(values: Tensor) -> Tensor:
    """AWQ's int32 [L, N / 8] from int8 [N, L]: codes (L = K) or zero points (L = G), 4 bits.

    Raises:
        ValueError: N is no multiple of 8, or a value does not fit 4 bits.
    """
    _whole_words(values.shape[0], AWQ_BITS, "output")
    columns = values.t().unflatten(1, (-1, len(AWQ_ORDER)))
    return pack(columns[..., list(AWQ_ORDER)].flatten(1), AWQ_BITS)


def unpack_awq(words: Tensor) -> Tensor:
    """The inverse of `pack_awq`: int8 [N, L]."""
    n = words.shape[1] * len(AWQ_ORDER)
    columns = unpack(words, AWQ_BITS, n).unflatten(1, (-1, len(AWQ_ORDER)))
    back = torch.tensor(AWQ_ORDER).argsort()
    values: Tensor = columns[..., back].flatten(1).t().contiguous()
    return values


def _whole_words(features: int, bits: int, what: str) -> None:
    if features * bits % 32:
        raise ValueError(f"{features} {what} features of {bits} bits do not fill 32-bit words")
