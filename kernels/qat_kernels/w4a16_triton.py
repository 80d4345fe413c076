r"""The Triton kernels of `w4a16`: a fused matmul, the sum of its parts, and dequantizing.

Equation, for feature n and row m (u = q + 2^(bits-1), the stored code; g the group of k)::

    y[m, n] = sum_g s[n, g] * sum_{k in g} (u[n, k] - 2^(bits-1) - z[n, g]) * x[m, k]
              + bias[n] + residual[m, n]

Products and sums are fp32; codes minus their offset are integers below 2^8 and exact in bf16 and
fp16, so the tensor cores multiply exact values; the result is rounded once. W is the left operand
(W x X^T), because M is small and tensor cores want 16 rows there.

Codes lie in planes, see `w4a16_planes`.
In a register, two words lie side by side. A shift and one ``lop3`` leave two codes in the mantissas
of 128 (bf16, 0x4300) or 1024 (fp16, 0x6400), and one fused multiply-add takes the offset away:
2.75 instructions for two weights.

The order of K is fixed. A weight may be cut along K into ``splits`` parts (as many as its shape
says, never M): their fp32 sums go to memory and a second kernel adds them in order. No atomics, so
results repeat, and a row does not depend on the others.

Shape legend: M rows, N features, K inputs, C chunks, W words of a chunk, F fields, G groups.
"""

from __future__ import annotations

from typing import Any

from qat_kernels.support import jit, triton
from qat_kernels.w4a16_planes import FIELDS

if triton is not None:
    import triton.language as tl


def dequant_asm(bits: int, half_type: str, zero: bool) -> tuple[str, ...]:
    """PTX that turns a register of two words into two weights, one text for each field.

    Operands: $0 two weights (bf16 or fp16), $1 two words, then the high bits (3 bits), then two
    offsets (with zero points). Exact: every value is an integer that the type holds.
    """
    bf16 = half_type == "bf16"
    magic, one = (0x4300, 0x3F80) if bf16 else (0x6400, 0x3C00)
    signed = bits == 8 and bf16
    field_bits = 2 if bits == 3 else bits
    # -(magic + 2^(bits-1)): the last bit of the mantissa is worth 1 at 128 (bf16) and 1024 (fp16)
    offset = 0x8000 | (magic + (1 << (bits - 1)))
    mask = 0x7F if signed else (1 << field_bits) - 1

    def pair(value: int) -> str:
        return f"0x{value:04X}{value:04X}"

    texts = []
    for f in range(FIELDS[bits]):
        lines = [f"shr.b32 t, $1, {f * field_bits};"]
        if bits == 3:
            # the high bit to position 2, then (low & 3) | (high & 4), then the magic number
            move = f"shl.b32 h, $2, {2 - f};" if f <= 2 else f"shr.b32 h, $2, {f - 2};"
            lines += [move, f"and.b32 h, h, {pair(4)};"]
            lines += [f"lop3.b32 t, t, {pair(3)}, h, 0xEA;", f"or.b32 t, t, {pair(magic)};"]
        elif signed:
            # q = (128 + q7) - 128 or - 256: the sign bit is the lowest exponent bit of 128 -> 256
            lines += [f"lop3.b32 h, t, {pair(0x80)}, {pair(0xC300)}, 0xEA;"]
            lines += [f"lop3.b32 t, t, {pair(mask)}, {pair(magic)}, 0xEA;"]
        elif bits == 8:
            # signed bytes to u = q + 128: the top bit flips
            lines += [f"lop3.b32 t, t, {pair(mask)}, {pair(magic | 0x80)}, 0x6A;"]
        else:
            lines += [f"lop3.b32 t, t, {pair(mask)}, {pair(magic)}, 0xEA;"]
        if signed:
            minus = "h"
        elif zero:
            minus = "$3" if bits == 3 else "$2"
        else:
            lines += [f"mov.b32 h, {pair(offset)};"]
            minus = "h"
        lines += [f"mov.b32 one, {pair(one)};"]
        lines += [f"fma.rn.{'bf16x2' if bf16 else 'f16x2'} $0, t, one, {minus};"]
        texts.append("{ .reg .b32 t, h, one; " + " ".join(lines) + " }")
    return tuple(texts)


_ASM: Any = dequant_asm if triton is None else triton.constexpr_function(dequant_asm)


@jit
def _weights(
    words: tl.tensor,
    high: tl.tensor,
    offset: tl.tensor,
    BITS: tl.constexpr,
    FIELD: tl.constexpr,
    TYPE: tl.constexpr,
    ZERO: tl.constexpr,
) -> tl.tensor:
    """Weights without their scale, (u - 2^(bits-1) - z): one field of a tile of words.

    ``offset`` [rows, 1] is -(magic + 2^(bits-1) + z) in the 16-bit type, or -(2^(bits-1) + z) where
    TYPE is fp32 (the interpreter, which has no inline assembly).
    """
    WIDTH: tl.constexpr = 2 if BITS == 3 else BITS
    if TYPE == "fp32":
        u = (words.to(tl.int32) >> (FIELD * WIDTH)) & ((1 << WIDTH) - 1)
        if BITS == 3:
            u = u | (((high.to(tl.int32) >> FIELD) & 1) << 2)
        if BITS == 8:
            u = u ^ 128
        result = u.to(tl.float32) + offset
    else:
        asm: tl.constexpr = _ASM(BITS, TYPE, ZERO)
        if BITS == 3:
            if ZERO:
                operands = [words, high, tl.broadcast_to(offset, words.shape)]
            else:
                operands = [words, high]
        elif ZERO:
            operands = [words, tl.broadcast_to(offset, words.shape)]
        else:
            operands = [words]
        # a register for the result and for each operand
        constraints: tl.constexpr = "=r,r" + ",r" * ((BITS == 3) + ZERO)
        result = tl.inline_asm_elementwise(
            asm[FIELD], constraints, operands, dtype=offset.dtype, is_pure=True, pack=2
        )
    return result


@jit
def matmul_kernel(
    x_ptr: tl.tensor,
    words_ptr: tl.tensor,
    high_ptr: tl.tensor,
    scale_ptr: tl.tensor,
    zero_ptr: tl.tensor,
    bias_ptr: tl.tensor,
    residual_ptr: tl.tensor,
    y_ptr: tl.tensor,
    M: int,
    N: int,
    K: int,
    CHUNKS: int,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    WIDTH: tl.constexpr,
    FIELDS: tl.constexpr,
    REPEAT: tl.constexpr,
    TYPE: tl.constexpr,
    ZERO: tl.constexpr,
    BIAS: tl.constexpr,
    RESIDUAL: tl.constexpr,
    SPLITS: tl.constexpr,
    EVEN_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
) -> None:
    """BLOCK_N features of BLOCK_M rows over one of SPLITS parts of K, chunk by chunk.

    x [M, K]; words and high [N, CHUNKS * WIDTH]; scale and zero [N, groups]; y [M, N], or fp32
    [SPLITS, M, N] where SPLITS > 1.
    """
    CHUNK: tl.constexpr = FIELDS * WIDTH
    # groups that begin in a chunk, and fields of each
    PARTS: tl.constexpr = CHUNK // GROUP if GROUP < CHUNK else 1
    PER_PART: tl.constexpr = FIELDS // PARTS
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    w = tl.arange(0, WIDTH)
    n_ok = n < N
    m_ok = m < M
    # rows past the end repeat the last one, so that loads need no mask; they are never stored
    n_row = tl.minimum(n, N - 1).to(tl.int64)
    m_row = tl.minimum(m, M - 1).to(tl.int64)
    groups = CHUNKS * PARTS if GROUP < CHUNK else CHUNKS // (GROUP // CHUNK)
    trips = CHUNKS // REPEAT
    first = tl.program_id(2) * trips // SPLITS
    last = (tl.program_id(2) + 1) * trips // SPLITS
    # the middle of the codes, and the magic number of the 16-bit type
    MAGIC: tl.constexpr = 128 if TYPE == "bf16" else (1024 if TYPE == "fp16" else 0)
    HALF: tl.constexpr = (1 << (BITS - 1)) + MAGIC
    acc_NM = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    words_at = words_ptr + n_row[:, None] * (CHUNKS * WIDTH) + w[None, :]
    high_at = high_ptr + n_row[:, None] * (CHUNKS * WIDTH) + w[None, :]
    x_at = x_ptr + m_row[None, :] * K + w[:, None]
    scale_at = scale_ptr + n_row * groups
    zero_at = zero_ptr + n_row * groups
    for trip in range(first, last):
        for r in tl.static_range(REPEAT):
            c = trip * REPEAT + r
            words = tl.load(words_at + c * WIDTH)
            high = words
            if BITS == 3:
                high = tl.load(high_at + c * WIDTH).to(tl.int16)
            for p in tl.static_range(PARTS):
                g = c * PARTS + p if GROUP < CHUNK else c // (GROUP // CHUNK)
                offset = tl.full((BLOCK_N, 1), -HALF, tl.float32)
                if ZERO:
                    zero_N = tl.load(zero_at + g)
                    offset = (-HALF - zero_N.to(tl.float32))[:, None]
                if TYPE != "fp32":
                    offset = offset.to(x_ptr.dtype.element_ty)
                part_NM = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
                for f in tl.static_range(PER_PART):
                    w_NW = _weights(words, high, offset, BITS, p * PER_PART + f, TYPE, ZERO)
                    k = c * CHUNK + (p * PER_PART + f) * WIDTH
                    if EVEN_K:
                        x_WM = tl.load(x_at + k)
                    else:
                        x_WM = tl.load(x_at + k, mask=(k + w < K)[:, None], other=0.0)
                    part_NM = tl.dot(w_NW, x_WM, part_NM, input_precision="ieee")
                scale_N = tl.load(scale_at + g).to(tl.float32)
                acc_NM += part_NM * scale_N[:, None]
    mask = m_ok[None, :] & n_ok[:, None]
    place = m_row[None, :] * N + n_row[:, None]
    if SPLITS > 1:
        y_ptr += tl.program_id(2).to(tl.int64) * M * N
    else:
        if BIAS:
            acc_NM += tl.load(bias_ptr + n_row).to(tl.float32)[:, None]
        if RESIDUAL:
            acc_NM += tl.load(residual_ptr + place, mask=mask, other=0.0).to(tl.float32)
    tl.store(y_ptr + place, acc_NM.to(y_ptr.dtype.element_ty), mask=mask)


@jit
def reduce_kernel(
    part_ptr: tl.tensor,
    bias_ptr: tl.tensor,
    residual_ptr: tl.tensor,
    y_ptr: tl.tensor,
    M: int,
    N: int,
    BIAS: tl.constexpr,
    RESIDUAL: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """Write y [M, N], the sum over the parts [SPLITS, M, N], in order, plus bias and residual."""
    # M is a constant where it is 1
    size = tl.cast(M, tl.int64) * N
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    ok = i < size
    total = tl.load(part_ptr + i, mask=ok, other=0.0)
    for s in tl.static_range(1, SPLITS):
        total += tl.load(part_ptr + s * size + i, mask=ok, other=0.0)
    if BIAS:
        total += tl.load(bias_ptr + i % N, mask=ok, other=0.0).to(tl.float32)
    if RESIDUAL:
        total += tl.load(residual_ptr + i, mask=ok, other=0.0).to(tl.float32)
    tl.store(y_ptr + i, total.to(y_ptr.dtype.element_ty), mask=ok)


@jit
def dequantize_kernel(
    words_ptr: tl.tensor,
    high_ptr: tl.tensor,
    scale_ptr: tl.tensor,
    zero_ptr: tl.tensor,
    out_ptr: tl.tensor,
    N: int,
    K: int,
    CHUNKS: int,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    WIDTH: tl.constexpr,
    FIELDS: tl.constexpr,
    ZERO: tl.constexpr,
    EVEN_K: tl.constexpr,
    BLOCK_N: tl.constexpr,
) -> None:
    """One chunk of BLOCK_N rows of the weight [N, K]: (q - z) * s in fp32, rounded once."""
    CHUNK: tl.constexpr = FIELDS * WIDTH
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    c = tl.program_id(1)
    w = tl.arange(0, WIDTH)
    n_row = tl.minimum(n, N - 1).to(tl.int64)
    groups = CHUNKS * (CHUNK // GROUP) if GROUP < CHUNK else CHUNKS // (GROUP // CHUNK)
    place = n_row[:, None] * (CHUNKS * WIDTH) + (c * WIDTH + w)[None, :]
    words = tl.load(words_ptr + place)
    high = words
    if BITS == 3:
        high = tl.load(high_ptr + place).to(tl.int16)
    for f in tl.static_range(FIELDS):
        g = (c * CHUNK + f * WIDTH) // GROUP
        offset = tl.full((BLOCK_N, 1), -(1 << (BITS - 1)), tl.float32)
        if ZERO:
            offset -= tl.load(zero_ptr + n_row * groups + g).to(tl.float32)[:, None]
        q_NW = _weights(words, high, offset, BITS, f, "fp32", ZERO)
        value_NW = q_NW * tl.load(scale_ptr + n_row * groups + g).to(tl.float32)[:, None]
        k = c * CHUNK + f * WIDTH + w
        mask = (n < N)[:, None]
        if not EVEN_K:
            mask = mask & (k < K)[None, :]
        at = out_ptr + n_row[:, None] * K + k[None, :]
        tl.store(at, value_NW.to(out_ptr.dtype.element_ty), mask=mask)
