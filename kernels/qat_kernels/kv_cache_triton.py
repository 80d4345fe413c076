"""Decode attention over a quantized KV cache in Triton; equations: `qat_kernels.kv_cache_numerics`.

Two kernels:

decode   one query token per sequence. A program takes one kv head of one sequence, all query
         heads that share it (padded to 16 rows, the least of a tensor-core tile) and one split of
         the sequence, and leaves an unnormalised partial result with its maximum and its sum.
combine  adds up the splits of one query head, always over MAX_SPLITS rows in the same order.

A split is a range of the tokens that the sequence itself sees, counted from its own first one, and
its length follows from their number alone (`_chunk`). So a sequence's answer does not depend on
the batch, the padding, the capacity of the buffers or the GPU. No atomics.

Codes go to the dot exactly (integers to 128 are exact in bf16 and fp16). The scale of a key joins
its logit in fp32, the scale of a value its probability; the product is rounded to bf16 for the
second dot, whatever the query's dtype: in fp16 a small probability times a scale would underflow.

The tile has 16 rows, so it compiles to ``mma.sync`` everywhere: ``wgmma`` needs 64, and the ptxas
bundled with Triton 3.6 and 3.7 miscompiles it with register operands.

Shape legend: B sequences, H kv heads, G query heads per kv head, T tokens, C capacity in tokens,
D head size, R bytes per cached vector (D, or D / 2 with two 4-bit codes per byte), S splits.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from qat_kernels.aot import Shipped
from qat_kernels.support import interpreted, jit, on

try:
    import triton
    import triton.language as tl
except ImportError:  # no wheel for this platform: the CPU paths need none
    triton = None

HEAD_SIZES = (64, 80, 96, 128, 256)
"""Head sizes of the kernels."""
HEADS = 16
"""Query heads per program of decode."""
MIN_CHUNK, CHUNK_STEP = 256, 128
"""Least tokens per split, and what longer splits are a multiple of."""
MAX_SPLITS = 64
"""Most splits of a sequence; beyond MIN_CHUNK * MAX_SPLITS tokens the splits grow."""
COMBINE_COLUMNS = 64
"""Values of the result per program of combine."""
_CHUNKS = {"STEP": CHUNK_STEP, "MIN": MIN_CHUNK, "SPLITS": MAX_SPLITS}


def decode_tile(head_size: int, bits: int) -> tuple[int, int, int]:
    """(tokens per step, warps, pipeline stages) of decode: the largest without spills."""
    if head_size == 64:
        return 128, 4, 3
    few = head_size == 256 or (bits == 8 and head_size != 128)
    return 64, 4, 2 if few else 3


def _general(function: Any) -> Any:
    """`support.jit` for sizes that change from call to call: one binary serves them all."""
    if triton is None:
        return function
    sizes = {"B", "H", "G", "HG", "S", "capacity", "window"}
    names = sizes & set(inspect.signature(function).parameters)
    return triton.jit(function, do_not_specialize=sorted(names))


@jit
def _chunk(
    length: tl.tensor, STEP: tl.constexpr, MIN: tl.constexpr, SPLITS: tl.constexpr
) -> tl.tensor:
    """Tokens per split of a sequence that sees ``length`` tokens: MIN, or a multiple of STEP."""
    steps = tl.cdiv(tl.cdiv(length, SPLITS), STEP)
    return tl.maximum(steps * STEP, MIN)


@jit
def _span(
    span_ptr: tl.tensor, b: tl.tensor, B: tl.tensor, capacity: tl.tensor, window: tl.tensor
) -> tl.tensor:
    """First slot that sequence b sees, and how many; span int32 [2, B] holds starts and ends."""
    end = tl.minimum(tl.load(span_ptr + B + b), capacity)
    start = tl.maximum(tl.maximum(tl.load(span_ptr + b), 0), end - window)
    return start, tl.maximum(end - start, 0)


@jit
def _load_codes(
    codes_ptr: tl.tensor, t: tl.tensor, ok: tl.tensor, R: tl.constexpr, R_PAD: tl.constexpr
) -> tl.tensor:
    """Rows t of the codes [.., R], [len(t), R_PAD]; zeros beyond R and where not ok."""
    r = tl.arange(0, R_PAD)
    place = codes_ptr + (t[:, None] * R + r[None, :])
    if R == R_PAD:
        return tl.load(place, mask=ok[:, None], other=0)
    return tl.load(place, mask=ok[:, None] & (r < R)[None, :], other=0)


@jit
def _four_bits(u: tl.tensor, DTYPE: tl.constexpr) -> tl.tensor:
    """The code u - 8 in DTYPE for u in 0 ... 15; exact in each of its steps."""
    if tl.bfloat16 == DTYPE:
        # the four bits become the last ones of 128 + u: an OR instead of a conversion
        return (u.to(tl.uint16) | 0x4300).to(tl.bfloat16, bitcast=True) - 136.0
    if tl.float16 == DTYPE:
        return (u.to(tl.uint16) | 0x6400).to(tl.float16, bitcast=True) - 1032.0
    return u.to(DTYPE) - 8.0


@_general
def decode_kernel(
    q_ptr: tl.tensor,
    k_codes_ptr: tl.tensor,
    k_scale_ptr: tl.tensor,
    v_codes_ptr: tl.tensor,
    v_scale_ptr: tl.tensor,
    span_ptr: tl.tensor,
    partial_ptr: tl.tensor,
    stat_ptr: tl.tensor,
    B: int,
    H: int,
    G: int,
    capacity: int,
    window: int,
    qk_scale: float,
    BITS: tl.constexpr,
    D: tl.constexpr,
    R_PAD: tl.constexpr,
    BLOCK_T: tl.constexpr,
    HEADS: tl.constexpr,
    STEP: tl.constexpr,
    MIN: tl.constexpr,
    SPLITS: tl.constexpr,
    PV: tl.constexpr,
) -> None:
    """One split of one kv head for HEADS of its G query heads.

    q [B, H * G, D]; codes [B, H, C, R]; scales [B, H, C]; partial fp32 [B, H * G, S, D] and stat
    fp32 [B, H * G, S, 2] (maximum, sum) with S = grid size of axis 1. qk_scale includes log2(e).
    """
    bh = tl.program_id(0)
    split = tl.program_id(1)
    start, length = _span(span_ptr, bh // H, B, capacity, window)
    chunk = _chunk(length, STEP, MIN, SPLITS)
    first = split * chunk
    if first >= length:
        return
    last = tl.minimum(first + chunk, length)
    R: tl.constexpr = D * BITS // 8
    slot = bh.to(tl.int64) * capacity + start
    k_codes_ptr += slot * R
    v_codes_ptr += slot * R
    k_scale_ptr += slot
    v_scale_ptr += slot
    g = tl.program_id(2) * HEADS + tl.arange(0, HEADS)
    head = bh * G + g
    r = tl.arange(0, R_PAD)
    q_ok = (g < G)[:, None] & (r < R)[None, :]
    q_place = q_ptr + (head.to(tl.int64)[:, None] * D + r[None, :])
    q0 = tl.load(q_place, mask=q_ok, other=0.0)
    acc0 = tl.zeros((HEADS, R_PAD), tl.float32)
    if BITS == 4:
        q1 = tl.load(q_place + R, mask=q_ok, other=0.0)
        acc1 = tl.zeros((HEADS, R_PAD), tl.float32)
    peak = tl.full((HEADS,), float("-inf"), tl.float32)
    total = tl.zeros((HEADS,), tl.float32)
    for t0 in range(first, last, BLOCK_T):
        t = t0 + tl.arange(0, BLOCK_T)
        ok = t < last
        k = _load_codes(k_codes_ptr, t, ok, R, R_PAD)
        v = _load_codes(v_codes_ptr, t, ok, R, R_PAD)
        k_scale = tl.load(k_scale_ptr + t, mask=ok, other=0.0).to(tl.float32)
        v_scale = tl.load(v_scale_ptr + t, mask=ok, other=0.0).to(tl.float32)
        if BITS == 4:
            s = tl.dot(q0, tl.trans(_four_bits(k & 15, q0.dtype)), input_precision="ieee")
            s = tl.dot(q1, tl.trans(_four_bits(k >> 4, q0.dtype)), s, input_precision="ieee")
        else:
            s = tl.dot(q0, tl.trans(k.to(q0.dtype)), input_precision="ieee")
        s = s * (k_scale * qk_scale)[None, :]
        s = tl.where(ok[None, :], s, float("-inf"))
        higher = tl.maximum(peak, tl.max(s, 1))
        fade = tl.exp2(peak - higher)
        p = tl.exp2(s - higher[:, None])
        total = total * fade + tl.sum(p, 1)
        peak = higher
        p = (p * v_scale[None, :]).to(PV)
        acc0 = acc0 * fade[:, None]
        if BITS == 4:
            acc0 = tl.dot(p, _four_bits(v & 15, PV), acc0, input_precision="ieee")
            acc1 = acc1 * fade[:, None]
            acc1 = tl.dot(p, _four_bits(v >> 4, PV), acc1, input_precision="ieee")
        else:
            acc0 = tl.dot(p, v.to(PV), acc0, input_precision="ieee")
    row = head.to(tl.int64) * tl.num_programs(1) + split
    place = partial_ptr + (row[:, None] * D + r[None, :])
    tl.store(place, acc0, mask=q_ok)
    if BITS == 4:
        tl.store(place + R, acc1, mask=q_ok)
    tl.store(stat_ptr + row * 2, peak, mask=g < G)
    tl.store(stat_ptr + row * 2 + 1, total, mask=g < G)


@_general
def combine_kernel(
    partial_ptr: tl.tensor,
    stat_ptr: tl.tensor,
    span_ptr: tl.tensor,
    out_ptr: tl.tensor,
    B: int,
    HG: int,
    S: int,
    D: int,
    capacity: int,
    window: int,
    STEP: tl.constexpr,
    MIN: tl.constexpr,
    SPLITS: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    """Add up the splits of one query head: out [B, HG, D], zeros where nothing is seen."""
    head = tl.program_id(0)
    _, length = _span(span_ptr, head // HG, B, capacity, window)
    chunk = _chunk(length, STEP, MIN, SPLITS)
    s = tl.arange(0, SPLITS)
    used = s * chunk < length
    row = head.to(tl.int64) * S + s
    peak = tl.load(stat_ptr + row * 2, mask=used, other=float("-inf"))
    total = tl.load(stat_ptr + row * 2 + 1, mask=used, other=0.0)
    # an empty sequence has no maximum, and nothing to divide by
    top = tl.where(length > 0, tl.max(peak, 0), 0.0)
    weight = tl.where(used, tl.exp2(peak - top), 0.0)
    d = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    mask = used[:, None] & (d < D)[None, :]
    part = tl.load(partial_ptr + (row[:, None] * D + d[None, :]), mask=mask, other=0.0)
    whole = tl.where(length > 0, tl.sum(weight * total, 0), 1.0)
    out = tl.sum(weight[:, None] * part, 0)
    out = tl.div_rn(out, tl.full(out.shape, 0.0, tl.float32) + whole)
    place = out_ptr + head.to(tl.int64) * D + d
    tl.store(place, out.to(out_ptr.dtype.element_ty), mask=d < D)


def splits_of(capacity: int) -> int:
    """Splits that a sequence of up to ``capacity`` tokens can have."""
    return min(MAX_SPLITS, -(-capacity // MIN_CHUNK))


def launch_decode(
    q_BHD: Tensor, buffers: tuple[Tensor, ...], span: Tensor, scale: float, window: int
) -> Tensor:
    """Attention of one query token per sequence over the buffers: [B, H * G, D], q's dtype.

    q_BHD [B, H * G, D] contiguous; buffers as for `launch_write`; span int32 [2, B].
    """
    (b, hq, d), (_, h, capacity, row) = q_BHD.shape, buffers[0].shape
    out_dtype = q_BHD.dtype
    if interpreted():
        # its dot is wrong for 16-bit floats
        q_BHD = q_BHD.to(torch.float32)
    block_t, warps, stages = decode_tile(d, 8 * buffers[0].shape[3] // d)
    splits = splits_of(capacity)
    partial = q_BHD.new_empty(b, hq, splits, d, dtype=torch.float32)
    stat = q_BHD.new_empty(b, hq, splits, 2, dtype=torch.float32)
    out = torch.empty_like(q_BHD)
    with on(q_BHD):
        decode_kernel[(b * h, splits, triton.cdiv(hq // h, HEADS))](
            *(q_BHD, *buffers, span, partial, stat, b, h, hq // h, capacity, window),
            scale * 1.4426950408889634,
            BITS=8 * row // d,
            D=d,
            R_PAD=triton.next_power_of_2(row),
            HEADS=HEADS,
            PV=tl.float32 if interpreted() else tl.bfloat16,
            BLOCK_T=block_t,
            **_CHUNKS,
            num_warps=warps,
            num_stages=stages,
        )
        combine_kernel[(b * hq, triton.cdiv(d, COMBINE_COLUMNS))](
            *(partial, stat, span, out, b, hq, splits, d, capacity, window),
            COLUMNS=COMBINE_COLUMNS,
            **_CHUNKS,
            num_warps=4,
        )
    return out.to(out_dtype)


def shipped() -> Iterator[Shipped]:
    """Every configuration of the launchers, for bf16; fp16 has the same layout.

    Sizes such as B, H and the capacity are run-time integers that need no alignment.
    """
    counted = dict.fromkeys(("B", "H", "G", "capacity", "window"), "i32")
    for bits in (8, 4):
        codes = "*i8" if bits == 8 else "*u8"
        buffers = {
            "k_codes_ptr": codes,
            "k_scale_ptr": "*bf16",
            "v_codes_ptr": codes,
            "v_scale_ptr": "*bf16",
        }
        for d in HEAD_SIZES:
            block_t, warps, stages = decode_tile(d, bits)
            row = d * bits // 8
            yield Shipped(
                name=f"kv_cache decode int{bits} d{d}",
                kernel=decode_kernel,
                types={"q_ptr": "*bf16"}
                | buffers
                | {"span_ptr": "*i32", "partial_ptr": "*fp32", "stat_ptr": "*fp32"}
                | counted
                | {"qk_scale": "fp32"},
                constants={
                    "BITS": bits,
                    "D": d,
                    "R_PAD": triton.next_power_of_2(row),
                    "BLOCK_T": block_t,
                    "HEADS": HEADS,
                    "PV": tl.bfloat16,
                }
                | _CHUNKS,
                num_warps=warps,
                num_stages=stages,
                values=2 * block_t * d,
                # a vector of 80 4-bit codes starts at a multiple of 8 bytes
                wide_loads=row % 16 == 0,
                # miscompiled by the bundled ptxas, see above
                forbidden=["HGMMA"],
            )
    yield Shipped(
        name="kv_cache combine",
        kernel=combine_kernel,
        types={"partial_ptr": "*fp32", "stat_ptr": "*fp32", "span_ptr": "*i32", "out_ptr": "*bf16"}
        | dict.fromkeys(("B", "HG", "S", "D", "capacity", "window"), "i32"),
        constants={"COLUMNS": COMBINE_COLUMNS} | _CHUNKS,
        num_warps=4,
        divisible=["D"],
    )
