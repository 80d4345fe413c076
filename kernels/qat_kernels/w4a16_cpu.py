r"""The CPU paths of `qat_kernels.w4a16`: two ATen operations, and what prefill does instead.

Equations, for a row x of activations and an output feature n (codes q, scale s, zero point z)::

    int4pack  y[n] = bf16( sum_k x[k] * w[n, k] )     w = (q - z) * s, exact in fp32
    int8pack  y[n] = bf16( s[n] * sum_k x[k] * q[n, k] )
    prefill   y = x @ bf16(w)^T, one sequence at a time

The first two are ``_weight_int4pack_mm_for_cpu`` and ``_weight_int8pack_mm`` (fp32 sums, rounded
once). Their time grows with the number of rows, so prefill (`PREFILL_TOKENS` tokens of a sequence
or more) rounds the weight to bf16, a block of output features at a time, and multiplies with
oneDNN's bf16 matmul: the arithmetic of plain transformers on the dequantized bf16 model. The
crossover depends on the tokens of a sequence and not on the batch, and sequences are multiplied one
by one, so that a sequence gets the same result in every batch.

ATen's layout of 4-bit codes is not documented: `tile` finds it by converting row numbers.

Shape legend: M rows, T tokens of a sequence, N output features, N' the same padded, K input
features, G groups. Source: ATen/native/cpu/int4mm_kernel.cpp, int8mm_kernel.cpp.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor
from torch.nn import functional

from qat_kernels.support import Choice

INT4PACK_GROUPS = (256, 128, 64, 32)
"""Group sizes that the ATen op takes, the cheapest (fewest scales) first."""
INT4PACK_ROWS = 16
"""The ATen op takes N in multiples of this; rows of zeros fill up."""
INT8PACK_COLUMNS = 16
"""The 8-bit op reads K in vectors of this, beyond the end where it is no multiple (measured: it
crashes)."""
PREFILL_TOKENS = 64
"""Tokens of a sequence from which on the weight is dequantized: below, that costs more than it
saves. Measured on 2 cores with AVX512-BF16 and one sequence: equal at about 60 tokens."""
BLOCK_ELEMENTS = 1 << 20
"""Weights that prefill dequantizes at a time (2 MiB of bf16)."""
TILE_ROWS = 16
"""Rows that `linear_by_tiles` multiplies at a time."""
_CONVERT_ROWS = 256
"""Rows repacked at a time, a multiple of 64: the ATen converter reads one int32 per code."""
_INT32_MAX = 2**31 - 1


def choose(
    shape: tuple[int, int, int],
    bits: int,
    group_size: int | None,
    symmetric: bool,
    dtype: torch.dtype,
    tokens: int,
) -> Choice:
    """The path on the CPU; see `qat_kernels.w4a16.choose`."""
    _, _, k = shape
    if dtype != torch.bfloat16:
        return Choice("reference", "the ATen operations are fast in bfloat16 only")
    if torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"):
        # a scalar loop, and on ARM it truncates the result to bf16
        return Choice("reference", "the ATen operations take an x86 CPU with AVX2 or AVX-512")
    run = k if group_size is None else group_size
    whole = run == k
    if bits <= 4 and any(run % size == 0 for size in INT4PACK_GROUPS):
        path = "int4pack"
    elif whole and symmetric and k % INT8PACK_COLUMNS == 0:
        path = "int8pack"
    else:
        what = f"{bits}-bit codes {'' if symmetric else 'with zero points '}in groups of {run}"
        return Choice("reference", f"{what} (K = {k}) are not what an ATen operation takes")
    if tokens >= PREFILL_TOKENS:
        return Choice("dequantize", f"prefill of {tokens} tokens: bf16 weights, then a bf16 matmul")
    if path == "int4pack":
        return Choice(path, "ATen's 4-bit matmul, each row by itself")
    return Choice(path, "ATen's 8-bit matmul, each row by itself")


def exact_in_bf16(value: Tensor) -> bool:
    """Whether bf16 holds every value."""
    return torch.equal(value.to(torch.bfloat16).to(torch.float32), value)


def linear_by_tiles(x: Tensor, weight_NK: Tensor, bias_N: Tensor | None = None) -> Tensor:
    """functional.linear on the CPU, with rows that do not depend on how many there are.

    BLAS and oneDNN take another routine, and another order of additions, for other numbers of rows.
    So rows [..., K] are multiplied in tiles of `TILE_ROWS`, filled up with zeros, and prefill
    (x [..., T, K], T from `PREFILL_TOKENS` on) one sequence at a time.
    """
    rows, n = x.shape[:-1].numel(), weight_NK.shape[0]
    if x.ndim > 2 and x.shape[-2] >= PREFILL_TOKENS:
        parts = x.reshape(-1, *x.shape[-2:]).unbind()
    else:
        flat = functional.pad(x.reshape(rows, -1), (0, 0, 0, -rows % TILE_ROWS))
        parts = flat.split(TILE_ROWS)
    y_MN = torch.cat([functional.linear(part, weight_NK, bias_N) for part in parts])
    return y_MN[:rows].view(*x.shape[:-1], n)


# ---------------------------------------------------------------------------- 4-bit codes


def int4pack_operands(
    codes_NK: Tensor, scale: Tensor, zero_point: Tensor | None
) -> tuple[Tensor, Tensor] | None:
    """(codes, scale) for the 4-bit op, or None where it would not be exact or does not apply.

    Args:
        codes_NK: int8 in -8 ... 7.
        scale: fp32 [N or 1, G].
        zero_point: int8, like scale, or None.

    Returns:
        uint8 [N', K / 2] in ATen's layout, and bf16 [G', N', 2] holding (s, -z * s).
    """
    n, k = codes_NK.shape
    n_pad = -(-n // INT4PACK_ROWS) * INT4PACK_ROWS
    groups = [g for g in INT4PACK_GROUPS if (k // scale.shape[1]) % g == 0]
    if not groups or n_pad * k > _INT32_MAX:
        return None
    zero = torch.zeros_like(scale) if zero_point is None else zero_point.to(torch.float32)
    offset = -(zero * scale)
    if not (exact_in_bf16(scale) and exact_in_bf16(offset)):
        return None
    pair = torch.stack((scale, offset), -1).to(torch.bfloat16).expand(n, -1, 2)
    pair = pair.repeat_interleave(k // groups[0] // scale.shape[1], dim=1)
    pair = functional.pad(pair, (0, 0, 0, 0, 0, n_pad - n)).transpose(0, 1).contiguous()
    out = torch.empty(n_pad, k // 2, dtype=torch.uint8)
    for start in range(0, n, _CONVERT_ROWS):
        part = codes_NK[start : start + _CONVERT_ROWS].to(torch.int32) + 8
        part = functional.pad(part, (0, 0, 0, -part.shape[0] % INT4PACK_ROWS), value=8)
        out[start : start + part.shape[0]] = _convert(part)
    return out, pair


def _convert(codes: Tensor) -> Tensor:
    converted: Tensor = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1)
    return converted


def int4pack_linear(x_MK: Tensor, codes: Tensor, scale: Tensor, out_features: int) -> Tensor:
    """ATen's op on the operands of `int4pack_operands`: [M, N] bf16."""
    k, n = x_MK.shape[1], codes.shape[0]
    group = k // scale.shape[0]
    # the op indexes x and y with 32-bit integers; rows are independent, so slices change nothing
    rows = _INT32_MAX // max(k, n)
    if x_MK.shape[0] <= rows:
        y_MN: Tensor = torch.ops.aten._weight_int4pack_mm_for_cpu(x_MK, codes, group, scale)
    else:
        parts = [int4pack_linear(part, codes, scale, n) for part in torch.split(x_MK, rows)]
        y_MN = torch.cat(parts)
    return y_MN if n == out_features else y_MN[:, :out_features].contiguous()


@functools.cache
def tile(rows: int) -> tuple[int, tuple[int, ...]]:
    """(height, order) of the blocks that ATen's converter makes of ``rows`` rows.

    A block of ``height`` rows and K columns is stored as [K, height / 2] bytes; ``order`` names the
    row of each low nibble, then of each high nibble.

    Raises:
        RuntimeError: this version of torch stores codes in another way.
    """
    k = 32
    row = torch.arange(rows, dtype=torch.int32)[:, None].expand(rows, k)
    low, high = _convert((row & 15).contiguous()).flatten(), _convert(row >> 4).flatten()
    nibbles = torch.stack(((low & 15) | ((high & 15) << 4), (low >> 4) | ((high >> 4) << 4)))
    for height in (rows, rows // 2, rows // 4):
        if not height or rows % height or height % 2:
            continue
        blocks = nibbles.view(2, rows // height, k, height // 2)
        first = blocks[:, :1, :1] + (torch.arange(rows // height) * height).view(1, -1, 1, 1)
        if torch.equal(blocks.long(), first.expand_as(blocks).long()):
            return height, tuple(blocks[:, 0, 0].flatten().tolist())
    raise RuntimeError(f"torch {torch.__version__} stores 4-bit codes in an unknown layout")


def dequantize_int4pack(codes: Tensor, scale: Tensor, start: int, stop: int) -> Tensor:
    """Rows start ... stop of the weight, rounded once to bf16, as blocks [B, K, height].

    Args:
        codes: uint8 [N', K / 2] from `int4pack_operands`.
        scale: bf16 [G, N', 2].
        start: first row, a multiple of 64 (the height of the largest block).
        stop: row after the last; all blocks between have the same height.
    """
    height, order = tile(min(64, stop - start))
    k = 2 * codes.shape[1]
    bytes_ = codes[start:stop].view(-1, k, height // 2)
    u = torch.cat((bytes_ & 15, bytes_ >> 4), -1)
    if order != tuple(range(height)):
        u = u[..., torch.tensor(order).argsort()]
    pair = scale[:, start:stop].unflatten(1, (-1, height)).transpose(0, 1).unsqueeze(2)
    # contiguous: broadcasting from strided memory takes six times as long
    s, offset = pair[..., 0].contiguous(), pair[..., 1].contiguous()
    u = u.unflatten(1, (scale.shape[0], -1))
    if not bool(offset.any()):
        # u - 8 and s are exact in bf16: the product is rounded once
        w: Tensor = u.to(torch.bfloat16).sub_(8).mul_(s)
    else:
        w = u.to(torch.float32).sub_(8).mul_(s.float()).add_(offset.float()).to(torch.bfloat16)
    return w.flatten(1, 2)


def int4pack_prefill(x_BTK: Tensor, codes: Tensor, scale: Tensor, out_features: int) -> Tensor:
    """Prefill: dequantize to bf16 block by block, then matmuls: [B, T, N] bf16."""
    n, k = codes.shape[0], 2 * codes.shape[1]
    y = x_BTK.new_empty(*x_BTK.shape[:-1], n)
    step = max(64, BLOCK_ELEMENTS // k // 64 * 64)
    whole = n // 64 * 64
    starts = [*range(0, whole, step), *([whole] if n > whole else [])]
    for start, stop in zip(starts, [*starts[1:], n]):
        w = dequantize_int4pack(codes, scale, start, min(stop, n))
        for x_TK, y_TN in zip(x_BTK, y):
            # [B, T, height] of the blocks side by side
            y_TN[:, start:stop] = torch.matmul(x_TK, w).transpose(0, 1).flatten(1)
    return y if n == out_features else y[..., :out_features].contiguous()


# ---------------------------------------------------------------------------- 8-bit codes


def int8pack_operands(codes_NK: Tensor, scale: Tensor) -> tuple[Tensor, Tensor] | None:
    """(codes int8 [N, K], scale bf16 [N]) for the 8-bit op, or None where that does not apply.

    Args:
        codes_NK: int8.
        scale: fp32 [N or 1, 1].
    """
    fits = codes_NK.shape[1] % INT8PACK_COLUMNS == 0 and codes_NK.numel() <= _INT32_MAX
    if scale.shape[1] != 1 or not fits or not exact_in_bf16(scale):
        return None
    row = scale[:, 0].expand(codes_NK.shape[0]).to(torch.bfloat16).contiguous()
    return codes_NK.contiguous(), row


def int8pack_linear(x_MK: Tensor, codes_NK: Tensor, scale_N: Tensor) -> Tensor:
    """ATen's op on the operands of `int8pack_operands`: [M, N] bf16."""
    rows = _INT32_MAX // max(*codes_NK.shape)
    parts = [
        torch.ops.aten._weight_int8pack_mm(part, codes_NK, scale_N)
        for part in torch.split(x_MK, rows)
    ]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def int8pack_prefill(x_BTK: Tensor, codes_NK: Tensor, scale_N: Tensor) -> Tensor:
    """Prefill: dequantize to bf16 some rows at a time, then matmuls: [B, T, N] bf16."""
    n, k = codes_NK.shape
    y = x_BTK.new_empty(*x_BTK.shape[:-1], n)
    step = max(64, BLOCK_ELEMENTS // k)
    for start in range(0, n, step):
        part = slice(start, start + step)
        w_NK = codes_NK[part].to(torch.bfloat16).mul_(scale_N[part, None])
        for x_TK, y_TN in zip(x_BTK, y):
            y_TN[:, part] = functional.linear(x_TK, w_NK)
    return y
