"""Quantize-on-write of a KV cache in Triton; numbers and layout: `qat_kernels.kv_cache_numerics`.

One launch quantizes the keys and values of new tokens [B, H, T, D] into the preallocated codes and
scales; a program takes ROWS vectors of each. The scale and its rounding to bf16 (on its bits), the
division and the rounding of the codes are the reference's, so codes are equal to the last bit.

Shape legend: B sequences, H kv heads, T new tokens, C capacity in tokens, D head size, R bytes per
cached vector (D, or D / 2 with two 4-bit codes per byte).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor

from qat_kernels.aot import Shipped
from qat_kernels.support import jit, on

try:
    import triton
    import triton.language as tl
except ImportError:  # no wheel for this platform: the CPU paths need none
    triton = None

ROWS, COLUMNS, WARPS = 8, 256, 4
"""Tile: vectors, and values of each (all head sizes of the decode kernel fit)."""


def _general(function: Any) -> Any:
    """`support.jit` for sizes that change from call to call: one binary serves them all."""
    if triton is None:
        return function
    return triton.jit(function, do_not_specialize=["rows", "H", "T", "capacity", "position"])


@jit
def _scale_of(low: tl.tensor, high: tl.tensor, bad: tl.tensor, BITS: tl.constexpr) -> tl.tensor:
    """The bf16 scale, as fp32, of vectors that span low ... high; bad is 0, or NaN."""
    if BITS == 8:
        scale = tl.div_rn(
            tl.maximum(tl.abs(low), tl.abs(high)), tl.full(low.shape, 127.5, low.dtype)
        )
    else:
        scale = tl.where(high >= -low, high, low) * -0.125
    # round half to even on the bits, which the interpreter computes like the GPU
    word = scale.to(tl.int32, bitcast=True)
    word = (word + 0x7FFF + ((word >> 16) & 1)) & -65536
    scale = word.to(tl.float32, bitcast=True)
    # the smallest normal number, 2^-126
    scale = tl.where(tl.abs(scale) < 1.1754943508222875e-38, 1.1920928955078125e-07, scale)
    return scale + bad


@jit
def _codes_of(x: tl.tensor, scale: tl.tensor, LOW: tl.constexpr, HIGH: tl.constexpr) -> tl.tensor:
    """Codes of x [rows, columns] fp32 as int32; zero where the scale is NaN."""
    t = tl.div_rn(x, tl.broadcast_to(scale[:, None], x.shape))
    # adding and subtracting 1.5 * 2^23 rounds half to even
    t = (t + 12582912.0) - 12582912.0
    t = tl.minimum(tl.maximum(t, LOW), HIGH)
    return tl.where((scale == scale)[:, None], t, 0.0).to(tl.int32)


@jit
def _write_rows(
    x_ptr: tl.tensor,
    codes_ptr: tl.tensor,
    scale_ptr: tl.tensor,
    source: tl.tensor,
    target: tl.tensor,
    ok: tl.tensor,
    D: tl.tensor,
    BITS: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    """Quantize the vectors at x_ptr + source into rows ``target`` of codes and scales."""
    if BITS == 8:
        d = tl.arange(0, COLUMNS)
        mask = ok[:, None] & (d < D)[None, :]
        x = tl.load(x_ptr + (source[:, None] + d[None, :]), mask=mask, other=0.0).to(tl.float32)
        bad = tl.sum(x * 0.0, 1)
        scale = _scale_of(tl.min(x, 1), tl.max(x, 1), bad, BITS)
        codes = _codes_of(x, scale, -128.0, 127.0).to(tl.int8)
        tl.store(codes_ptr + (target[:, None] * D + d[None, :]), codes, mask=mask)
    else:
        half = D // 2
        d = tl.arange(0, COLUMNS // 2)
        mask = ok[:, None] & (d < half)[None, :]
        place = x_ptr + (source[:, None] + d[None, :])
        x0 = tl.load(place, mask=mask, other=0.0).to(tl.float32)
        x1 = tl.load(place + half, mask=mask, other=0.0).to(tl.float32)
        bad = tl.sum(x0 * 0.0, 1) + tl.sum(x1 * 0.0, 1)
        low = tl.minimum(tl.min(x0, 1), tl.min(x1, 1))
        high = tl.maximum(tl.max(x0, 1), tl.max(x1, 1))
        scale = _scale_of(low, high, bad, BITS)
        u0 = _codes_of(x0, scale, -8.0, 7.0) + 8
        u1 = _codes_of(x1, scale, -8.0, 7.0) + 8
        tl.store(
            codes_ptr + (target[:, None] * half + d[None, :]),
            (u0 | (u1 << 4)).to(tl.uint8),
            mask=mask,
        )
    tl.store(scale_ptr + target, scale.to(scale_ptr.dtype.element_ty), mask=ok)


@_general
def write_kernel(
    k_ptr: tl.tensor,
    v_ptr: tl.tensor,
    k_codes_ptr: tl.tensor,
    k_scale_ptr: tl.tensor,
    v_codes_ptr: tl.tensor,
    v_scale_ptr: tl.tensor,
    rows: int,
    H: int,
    T: int,
    D: int,
    capacity: int,
    position: int,
    k_stride_b: int,
    k_stride_h: int,
    k_stride_t: int,
    v_stride_b: int,
    v_stride_h: int,
    v_stride_t: int,
    BITS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    """Quantize ROWS vectors of k and of v [B, H, T, D] into slots position ... position + T - 1.

    rows = B * H * T; the last stride of k and v is 1.
    """
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    ok = row < rows
    head = row // T
    t = row % T
    target = head * capacity + position + t
    b = head // H
    h = head % H
    k_source = b * k_stride_b + h * k_stride_h + t * k_stride_t
    _write_rows(k_ptr, k_codes_ptr, k_scale_ptr, k_source, target, ok, D, BITS, COLUMNS)
    v_source = b * v_stride_b + h * v_stride_h + t * v_stride_t
    _write_rows(v_ptr, v_codes_ptr, v_scale_ptr, v_source, target, ok, D, BITS, COLUMNS)


def launch_write(k: Tensor, v: Tensor, buffers: tuple[Tensor, ...], position: int) -> None:
    """Quantize k and v [B, H, T, D] (last stride 1) into slots position ... of the buffers.

    buffers: codes [B, H, C, R] and scales [B, H, C] of the keys, then of the values, contiguous.
    """
    (b, h, t, d), capacity = k.shape, buffers[0].shape[2]
    bits = 8 * buffers[0].shape[3] // d
    sizes = (b * h * t, h, t, d, capacity, position, *k.stride()[:3], *v.stride()[:3])
    grid = (triton.cdiv(b * h * t, ROWS),)
    tile = {"BITS": bits, "ROWS": ROWS, "COLUMNS": COLUMNS, "num_warps": WARPS}
    with on(k):
        write_kernel[grid](k, v, *buffers, *sizes, **tile)


def shipped() -> Iterator[Shipped]:
    """Both configurations of the launcher, for bf16; fp16 and fp32 input has the same layout."""
    strides = [f"{x}_stride_{axis}" for x in "kv" for axis in "bht"]
    sizes = dict.fromkeys(("rows", "H", "T", "D", "capacity", "position", *strides), "i32")
    for bits in (8, 4):
        codes = "*i8" if bits == 8 else "*u8"
        buffers = {
            "k_codes_ptr": codes,
            "k_scale_ptr": "*bf16",
            "v_codes_ptr": codes,
            "v_scale_ptr": "*bf16",
        }
        yield Shipped(
            name=f"kv_cache write int{bits}",
            kernel=write_kernel,
            types={"k_ptr": "*bf16", "v_ptr": "*bf16"} | buffers | sizes,
            constants={"BITS": bits, "ROWS": ROWS, "COLUMNS": COLUMNS},
            num_warps=WARPS,
            divisible=["D", *strides],
        )
