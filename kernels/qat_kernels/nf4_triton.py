r"""Triton kernels on NF4 / FP4 weights: dequantize, and a matmul for few rows.

Equations, with T the 16 values of the data type, u the codes and a the absmax of a block (a fp32
number, or D[b] * n + offset under double quantization, its product and its sum rounded each)::

    W_hat[i] = round(T[u[i]] * a[i // g])              product in fp32, rounded once to the dtype
    y[m, n]  = round(sum_k x[m, k] W_hat[n, k] + scaling sum_r t[m, r] B[n, r] + bias[n])

Shape legend: M rows of activations, N output features, K input features, R rank of an adapter,
g values per block. ``x_MK, t_MR, B_NR, y_MN``; packed tensors as in `Packed4bit`.

The reference is `nf4_numerics.reference`, to which dequantizing is bit-equal; the matmul takes the
same W_hat and sums in fp32, in an order of K that depends on nothing but N and K: a row's result
does not depend on the other rows.

How the matmul gets along with 4 to 5 instructions per weight. A block of 64 weights has 16 values
of W_hat. Each lane owns whole blocks: it makes the 16 products once (16 multiplications, 8 packed
roundings), keeps their low and their high bytes in four registers each, and looks codes up with
``prmt``, four at a time: codes 0 ... 7 and 8 ... 15 of both planes, a choice between the two by the
codes' top bits, and an interleaving of the planes. So W_hat is rounded as in training at no cost
per weight. In mma.sync's layout the four lanes of a row then hold four different blocks, so K is
permuted within a tile of 256, for weights and x alike, by the order in which shared memory is
filled; that order also keeps its banks apart. W is the left operand (W x X^T), since M is small.
Four warps take four parts of K (a batched dot, which compiles to mma.sync, not to the wgmma that
ptxas before 13.3 miscompiles), and their sums are added in a fixed order.

The compiler is not told about lanes and blocks: every step is elementwise or a view, right in any
layout. Codes are loaded as bytes, since it derives the width of a lane's share from them.

Sources: Dettmers et al., QLoRA (arXiv:2305.14314); bitsandbytes 0.50.2 (layout, numerics).
"""

from __future__ import annotations

import struct

import torch

from qat_kernels.nf4_numerics import NESTED_BLOCK, codebook
from qat_kernels.support import interpreted, jit, triton

if triton is not None:
    import triton.language as tl

SPAN = 32
"""Weights of 16 bytes of codes, and the least g."""


def table_ptx(quant_type: str, packed: str) -> str:
    """PTX: $0 ... $3 low and $4 ... $7 high bytes of the 16 products with absmax $8, by code."""
    lines = [".reg .f32 f<16>; .reg .b32 p<8>;"]
    for i, value in enumerate(codebook(quant_type, torch.device("cpu")).tolist()):
        bits = struct.unpack("<I", struct.pack("<f", value))[0]
        lines.append(f"mul.rn.f32 f{i}, $8, 0f{bits:08X};")
    lines += [f"cvt.rn.{packed}.f32 p{i}, f{2 * i + 1}, f{2 * i};" for i in range(8)]
    for i in range(4):
        lines.append(f"prmt.b32 ${i}, p{2 * i}, p{2 * i + 1}, 0x6420;")
        lines.append(f"prmt.b32 ${i + 4}, p{2 * i}, p{2 * i + 1}, 0x7531;")
    return "{ " + "\n".join(lines) + " }"


def lookup_ptx() -> str:
    """PTX: $0 ... $7 the values of the 8 codes in word $8 from the table $9 ... $16."""
    lines = [
        ".reg .b32 s, m, a, b, c, d;",
        "and.b32 s, $8, 0x77777777;",
        # for byte i of the result: i, or i + 4 where the code is 8 or more
        "shr.u32 m, $8, 1;",
        "lop3.b32 m, m, 0x44444444, 0x32103210, 0xEA;",
    ]
    for first in (0, 4):
        planes = zip("abcd", ((9, 10), (11, 12), (13, 14), (15, 16)))
        lines += [f"prmt.b32 {out}, ${low}, ${high}, s;" for out, (low, high) in planes]
        lines += ["prmt.b32 a, a, b, m;", "prmt.b32 c, c, d, m;"]
        # the first value of a pair is in the high nibble
        lines += ["prmt.b32 b, a, c, 0x4051;", "prmt.b32 d, a, c, 0x6273;"]
        lines += [f"mov.b32 {{${first},${first + 1}}}, b;"]
        lines += [f"mov.b32 {{${first + 2},${first + 3}}}, d;"]
        if not first:
            lines += ["shr.u32 s, s, 16;", "shr.u32 m, m, 16;"]
    return "{ " + "\n".join(lines) + " }"


if triton is not None:
    _NF4_BF16 = tl.constexpr(table_ptx("nf4", "bf16x2"))
    _NF4_FP16 = tl.constexpr(table_ptx("nf4", "f16x2"))
    _FP4_BF16 = tl.constexpr(table_ptx("fp4", "bf16x2"))
    _FP4_FP16 = tl.constexpr(table_ptx("fp4", "f16x2"))
    _LOOKUP = tl.constexpr(lookup_ptx())
    # no other instruction is sure not to be fused into one rounding
    _UNNEST = tl.constexpr("{ .reg .f32 p; mul.rn.f32 p, $1, $2; add.rn.f32 $0, p, $3; }")
    _EIGHT_BF16 = tl.constexpr((tl.bfloat16,) * 8)
    _EIGHT_FP16 = tl.constexpr((tl.float16,) * 8)
    _INTERPRETED = tl.constexpr(interpreted())
    _NESTED_BITS = tl.constexpr(NESTED_BLOCK.bit_length() - 1)
    _SPAN = tl.constexpr(SPAN)


@jit
def _load_absmax(
    absmax_ptr: tl.tensor,
    nested_ptr: tl.tensor,
    offset_ptr: tl.tensor,
    map_ptr: tl.tensor,
    block: tl.tensor,
    mask: tl.tensor,
    NESTED: tl.constexpr,
) -> tl.tensor:
    """The fp32 absmax of blocks ``block``; zero, or the offset, where masked."""
    if mask is None:
        absmax = tl.load(absmax_ptr + block)
    else:
        absmax = tl.load(absmax_ptr + block, mask=mask, other=0)
    if NESTED:
        value = tl.load(map_ptr + absmax.to(tl.int32))
        if mask is None:
            scale = tl.load(nested_ptr + (block >> _NESTED_BITS))
        else:
            scale = tl.load(nested_ptr + (block >> _NESTED_BITS), mask=mask, other=0.0)
        offset = tl.load(offset_ptr)
        if _INTERPRETED:
            absmax = value * scale + offset
        else:
            absmax = tl.inline_asm_elementwise(
                _UNNEST, "=f,f,f,f", [value, scale, offset], dtype=tl.float32, is_pure=True, pack=1
            )
    return absmax


@jit
def _word(byte: tl.tensor) -> tl.tensor:
    """Little-endian words [...] of bytes [..., 2, 2]: no instruction where they lie in one."""
    even, odd = tl.split(byte)
    b0, b2 = tl.split(even)
    b1, b3 = tl.split(odd)
    low = b0.to(tl.uint32) | (b1.to(tl.uint32) << 8)
    return low | (b2.to(tl.uint32) << 16) | (b3.to(tl.uint32) << 24)


@jit
def _value(
    word: tl.tensor, absmax: tl.tensor, codebook_ptr: tl.tensor, J: tl.constexpr, TYPE: tl.constexpr
) -> tl.tensor:
    """T[code J of each word] * absmax in fp32, rounded to TYPE; from a table in memory."""
    shift: tl.constexpr = J // 2 * 8 + 4 - J % 2 * 4
    value = tl.load(codebook_ptr + ((word >> shift) & 15).to(tl.int32)) * absmax
    if tl.bfloat16 == TYPE:
        # the interpreter's cast truncates; the compiler comes here for fp32 only
        bits = value.to(tl.uint32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
        value = bits.to(tl.float32, bitcast=True)
    if tl.float16 == TYPE:
        value = value.to(tl.float16).to(tl.float32)
    return value


@jit
def _spread(table: tl.tensor, AXIS: tl.constexpr, like: tl.tensor) -> tl.tensor:
    return tl.broadcast_to(tl.expand_dims(table, AXIS), like.shape)


@jit
def _weights(
    word: tl.tensor,
    absmax: tl.tensor,
    codebook_ptr: tl.tensor,
    AXIS: tl.constexpr,
    FP4: tl.constexpr,
    TYPE: tl.constexpr,
) -> tl.tensor:
    """W_hat [..., 2, 2, 2] of the 8 codes of each word; fp32 in the interpreter, else TYPE.

    absmax lacks the dimension AXIS of word: along it, words are of one block.
    """
    if _INTERPRETED or tl.float32 == TYPE:
        scale = _spread(absmax, AXIS, word)
        v0 = _value(word, scale, codebook_ptr, 0, TYPE)
        v1 = _value(word, scale, codebook_ptr, 1, TYPE)
        v2 = _value(word, scale, codebook_ptr, 2, TYPE)
        v3 = _value(word, scale, codebook_ptr, 3, TYPE)
        v4 = _value(word, scale, codebook_ptr, 4, TYPE)
        v5 = _value(word, scale, codebook_ptr, 5, TYPE)
        v6 = _value(word, scale, codebook_ptr, 6, TYPE)
        v7 = _value(word, scale, codebook_ptr, 7, TYPE)
    else:
        fp4: tl.constexpr = _FP4_BF16 if tl.bfloat16 == TYPE else _FP4_FP16
        nf4: tl.constexpr = _NF4_BF16 if tl.bfloat16 == TYPE else _NF4_FP16
        types: tl.constexpr = _EIGHT_BF16 if tl.bfloat16 == TYPE else _EIGHT_FP16
        l0, l1, l2, l3, h0, h1, h2, h3 = tl.inline_asm_elementwise(
            fp4 if FP4 else nf4,
            "=r,=r,=r,=r,=r,=r,=r,=r,f",
            [absmax],
            (tl.int32,) * 8,
            is_pure=True,
            pack=1,
        )
        v0, v1, v2, v3, v4, v5, v6, v7 = tl.inline_asm_elementwise(
            _LOOKUP,
            "=h,=h,=h,=h,=h,=h,=h,=h,r,r,r,r,r,r,r,r,r",
            [
                word,
                _spread(l0, AXIS, word), _spread(l1, AXIS, word),
                _spread(l2, AXIS, word), _spread(l3, AXIS, word),
                _spread(h0, AXIS, word), _spread(h1, AXIS, word),
                _spread(h2, AXIS, word), _spread(h3, AXIS, word),
            ],
            types, is_pure=True, pack=1,
        )  # fmt: skip
    even = tl.join(tl.join(v0, v4), tl.join(v2, v6))
    odd = tl.join(tl.join(v1, v5), tl.join(v3, v7))
    return tl.join(even, odd)


@jit
def dequantize_kernel(
    codes_ptr: tl.tensor,
    absmax_ptr: tl.tensor,
    nested_ptr: tl.tensor,
    offset_ptr: tl.tensor,
    map_ptr: tl.tensor,
    codebook_ptr: tl.tensor,
    out_ptr: tl.tensor,
    numel: int,
    BLOCK: tl.constexpr,
    G: tl.constexpr,
    FP4: tl.constexpr,
    NESTED: tl.constexpr,
    EVEN: tl.constexpr,
    TYPE: tl.constexpr,
) -> None:
    """BLOCK values of the flattened weight [numel]; EVEN: BLOCK divides numel.

    codes [ceil(numel / 2)], absmax [ceil(numel / G)], the 256 values of the dynamic map and the 16
    of the codebook in fp32, out [numel] of TYPE (of fp32 in the interpreter).
    """
    start = tl.program_id(0).to(tl.int64) * BLOCK
    codes_ptr += start // 2
    out_ptr += start
    pair = tl.arange(0, BLOCK // 2)
    value = tl.arange(0, BLOCK)
    # the 32 values of 16 bytes are of one block
    span = tl.arange(0, BLOCK // _SPAN)
    block = (start // _SPAN + span) // (G // _SPAN)
    if EVEN:
        byte = tl.load(codes_ptr + pair)
        absmax = _load_absmax(absmax_ptr, nested_ptr, offset_ptr, map_ptr, block, None, NESTED)
    else:
        left = numel - start
        byte = tl.load(codes_ptr + pair, mask=pair * 2 < left, other=0)
        ok = span * _SPAN < left
        absmax = _load_absmax(absmax_ptr, nested_ptr, offset_ptr, map_ptr, block, ok, NESTED)
    word = _word(tl.reshape(byte, (BLOCK // _SPAN, _SPAN // 8, 2, 2)))
    weight = _weights(word, absmax, codebook_ptr, 1, FP4, TYPE)
    weight = tl.reshape(weight, (BLOCK,)).to(out_ptr.dtype.element_ty)
    if EVEN:
        tl.store(out_ptr + value, weight)
    else:
        tl.store(out_ptr + value, weight, mask=value < left)


@jit
def _step(
    acc_SNM: tl.tensor,
    x_ptr: tl.tensor,
    codes_ptr: tl.tensor,
    absmax_ptr: tl.tensor,
    nested_ptr: tl.tensor,
    offset_ptr: tl.tensor,
    map_ptr: tl.tensor,
    codebook_ptr: tl.tensor,
    codes_offset: tl.tensor,
    x_offset: tl.tensor,
    x_ok: tl.tensor,
    chunk: tl.tensor,
    first: tl.tensor,
    chunks: tl.tensor,
    SHIFT: tl.constexpr,
    FP4: tl.constexpr,
    NESTED: tl.constexpr,
    TYPE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SPLIT: tl.constexpr,
    EVEN: tl.constexpr,
) -> tl.tensor:
    """Add a tile of SPLIT * 4 chunks from chunk ``first`` on; EVEN: it ends within K.

    The order in shared memory is that of the offsets, see `matmul_kernel`.
    """
    codes_ptr += first * 32
    x_ptr += first * 64
    block = (chunk + first) >> SHIFT
    if not EVEN:
        i = tl.arange(0, SPLIT * BLOCK_N * 128)
        inside = first + i // (BLOCK_N * 128) * 4 + i // 16 % 4 < chunks
        byte = tl.load(codes_ptr + codes_offset, mask=inside, other=0)
        i = tl.arange(0, SPLIT * BLOCK_M * 256)
        inside = first + i // (BLOCK_M * 256) * 4 + i // 8 % 4 < chunks
        x = tl.load(x_ptr + x_offset, mask=x_ok & inside, other=0.0)
        inside = first + tl.arange(0, SPLIT)[:, None] * 4 + tl.arange(0, 4)[None, :] < chunks
        ok = tl.broadcast_to(inside[:, None, :], block.shape)
        absmax = _load_absmax(absmax_ptr, nested_ptr, offset_ptr, map_ptr, block, ok, NESTED)
    else:
        byte = tl.load(codes_ptr + codes_offset)
        x = tl.load(x_ptr + x_offset, mask=x_ok, other=0.0)
        absmax = _load_absmax(absmax_ptr, nested_ptr, offset_ptr, map_ptr, block, None, NESTED)
    # [S, n / 4, half of a chunk's codes, n % 4, chunk, 4 words, 2, 2] -> [S, N, 8 words, chunk]
    byte = tl.reshape(byte, (SPLIT, BLOCK_N // 4, 2, 4, 4, 4, 2, 2))
    byte = tl.permute(byte, (0, 1, 3, 2, 5, 4, 6, 7))
    word = _word(tl.reshape(byte, (SPLIT, BLOCK_N, 8, 4, 2, 2)))
    w = _weights(word, absmax, codebook_ptr, 2, FP4, TYPE)
    # a chunk's 64 values are 4 quarters of 2 words of 4 pairs. A lane feeds mma with registers of
    # a pair, two by two: pairs 0 and 1, then 2 and 3, of its first word, then of its second. To
    # the dot, these are columns 8 lane + 2 step and 32 + 8 lane + 2 step of each quarter's 64.
    w = tl.reshape(w, (SPLIT, BLOCK_N, 4, 2, 4, 2, 2, 2))
    w_SNK = tl.reshape(tl.permute(w, (0, 1, 2, 6, 4, 3, 5, 7)), (SPLIT, BLOCK_N, 256))
    # [S, quarter, m / 4, word, m % 4, chunk, step, half, pair] -> [S, K, M], K in the same order
    x = tl.reshape(x, (SPLIT, 4, BLOCK_M // 4, 2, 4, 4, 2, 2, 2))
    x_SKM = tl.reshape(tl.permute(x, (0, 1, 7, 5, 3, 6, 8, 2, 4)), (SPLIT, 256, BLOCK_M))
    return tl.dot(w_SNK, x_SKM, acc_SNM, input_precision="ieee")


@jit
def matmul_kernel(
    x_ptr: tl.tensor,
    codes_ptr: tl.tensor,
    absmax_ptr: tl.tensor,
    nested_ptr: tl.tensor,
    offset_ptr: tl.tensor,
    map_ptr: tl.tensor,
    codebook_ptr: tl.tensor,
    bias_ptr: tl.tensor,
    t_ptr: tl.tensor,
    b_ptr: tl.tensor,
    y_ptr: tl.tensor,
    scaling: float,
    M: int,
    N: int,
    R: int,
    chunks: int,
    SHIFT: tl.constexpr,
    FP4: tl.constexpr,
    NESTED: tl.constexpr,
    TYPE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
    SPLIT: tl.constexpr,
    EVEN: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_ADAPTER: tl.constexpr,
) -> None:
    """One tile of y: BLOCK_N output features for BLOCK_M rows.

    x [M, K], codes [N * K / 2], absmax [N * K / 64 >> SHIFT], bias [N], t [M, R], b [N, R],
    y [M, N], all contiguous; K = 64 chunks. Warp s sums chunks 4 s ... 4 s + 3 of each 4 SPLIT.
    Addresses are 64 bits for the tile's origin and 32 bits within it.
    """
    n0 = tl.program_id(0) * BLOCK_N
    m0 = tl.program_id(1) * BLOCK_M
    codes_ptr += n0.to(tl.int64) * (chunks * 32)
    x_ptr += m0.to(tl.int64) * (chunks * 64)
    # rows behind the last are read as the last: their results are not stored
    last = N - 1 - n0
    # codes in 16 bytes: [S, n / 4, half of a chunk, n % 4, chunk, byte]. In this order, which is
    # that of shared memory, lanes read it without bank conflicts, and full sectors fill it
    i = tl.arange(0, SPLIT * BLOCK_N * 128)
    row = tl.minimum(i // 512 % (BLOCK_N // 4) * 4 + i // 64 % 4, last)
    column = i // (BLOCK_N * 128) * 128 + i // 16 % 4 * 32 + i // 256 % 2 * 16 + i % 16
    codes_offset = row * (chunks * 32) + column
    # x likewise: [S, quarter of a chunk, m / 4, half of that, m % 4, chunk, 8 values]
    i = tl.arange(0, SPLIT * BLOCK_M * 256)
    row = i // 256 % (BLOCK_M // 4) * 4 + i // 32 % 4
    column = i // (BLOCK_M * 256) * 256 + i // 8 % 4 * 64 + i // (BLOCK_M * 64) % 4 * 16
    x_offset = row * (chunks * 64) + column + i // 128 % 2 * 8 + i % 8
    x_ok = row < M - m0
    row = tl.minimum(tl.arange(0, BLOCK_N), last) + n0
    part = tl.arange(0, SPLIT)[:, None] * 4 + tl.arange(0, 4)[None, :]
    chunk = (row * chunks)[None, :, None] + part[:, None, :]
    acc_SNM = tl.zeros((SPLIT, BLOCK_N, BLOCK_M), tl.float32)
    whole = chunks // (4 * SPLIT) * (4 * SPLIT)
    for first in range(0, whole, 4 * SPLIT):
        acc_SNM = _step(
            acc_SNM, x_ptr, codes_ptr, absmax_ptr, nested_ptr, offset_ptr, map_ptr, codebook_ptr,
            codes_offset, x_offset, x_ok, chunk, first, chunks,
            SHIFT, FP4, NESTED, TYPE, BLOCK_M, BLOCK_N, SPLIT, True,
        )  # fmt: skip
    if not EVEN:
        # the last trip by itself: its masks would cost the loop a tenth of its instructions
        acc_SNM = _step(
            acc_SNM, x_ptr, codes_ptr, absmax_ptr, nested_ptr, offset_ptr, map_ptr, codebook_ptr,
            codes_offset, x_offset, x_ok, chunk, whole, chunks,
            SHIFT, FP4, NESTED, TYPE, BLOCK_M, BLOCK_N, SPLIT, False,
        )  # fmt: skip
    acc_NM = tl.sum(acc_SNM, 0)
    n = n0 + tl.arange(0, BLOCK_N)
    m = m0 + tl.arange(0, BLOCK_M)
    n_wide, m_wide = n.to(tl.int64), m.to(tl.int64)
    if HAS_ADAPTER:
        r = tl.arange(0, BLOCK_R)
        part_NM = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
        for r0 in range(0, R, BLOCK_R):
            r_ok = r0 + r < R
            b_offset = n_wide[:, None] * R + (r0 + r)[None, :]
            b_NR = tl.load(b_ptr + b_offset, mask=(n < N)[:, None] & r_ok[None, :], other=0.0)
            t_offset = m_wide[None, :] * R + (r0 + r)[:, None]
            t_RM = tl.load(t_ptr + t_offset, mask=(m < M)[None, :] & r_ok[:, None], other=0.0)
            part_NM = tl.dot(b_NR.to(t_RM.dtype), t_RM, part_NM, input_precision="ieee")
        acc_NM += part_NM * scaling
    if HAS_BIAS:
        acc_NM += tl.load(bias_ptr + n, mask=n < N, other=0.0).to(tl.float32)[:, None]
    ok = (m < M)[None, :] & (n < N)[:, None]
    y = acc_NM.to(y_ptr.dtype.element_ty)
    tl.store(y_ptr + m_wide[None, :] * N + n_wide[:, None], y, mask=ok)
