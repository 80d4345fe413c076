r"""Quantized KV cache: keys and values in int8 or int4, one scale per token and head.

Equations, for one cached vector x [D] (a key or a value of one token and one kv head)::

    int8:  s = bf16(max|x| / 127.5)         int4:  s = bf16(x_i / -8),  i = argmax |x|
    q = clamp(round(x / s), -2^(bits-1), 2^(bits-1) - 1)          x_hat = q * s

and decode attention, for one query token of query head h and its kv head h // G::

    out = sum_t p_t * v_hat_t        p = softmax_t(scale * q . k_hat_t)

over the tokens start <= t < end of the sequence, the last ``window`` of them at most.

int8 takes the scale of `numerics.token_scale`, the dynamic per-token int8 that activations use.
int4 takes the grid of the project's int4 weights, signed_absmax: the largest value lands on -8
exactly, the scale may be negative, and on Gaussian vectors of 64 ... 256 it has 0.6 to 0.7 dB more
SQNR than max|x| / 7.5 (measured: 20.4 against 19.8 at 64, 19.1 against 18.5 at 256). Scales are
bf16, rounded before codes are computed: 2 bytes instead of 4 (1.97 times smaller than a bf16 cache
at D = 128, int8, instead of 1.94), no SQNR lost (measured: below 0.05 dB), and q * s is exact in
fp32. A vector of zeros, or of values that would need a subnormal scale, is stored as zeros. One
that holds NaN or infinity gets the scale NaN and reads back as NaN.

Layout: codes int8 [B, H, C, D], or uint8 [B, H, C, D / 2] with u = q + 8 and element j in the low,
element j + D / 2 in the high four bits of byte j (so that each half is a contiguous vector);
scales bf16 [B, H, C]. An int8 vector takes D + 2 bytes, an int4 one D / 2 + 2.

Shape legend: B sequences, H kv heads, G query heads per kv head, T new tokens, C capacity in
tokens, D head size. Sources: online softmax, arXiv:2205.14135; split sequences, the Flash-Decoding
post of the same authors; per-token cache scales, arXiv:2402.02750.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qat_kernels.numerics import QuantSpec, token_scale
from qat_kernels.numerics import quantize as quantize_weight

NO_WINDOW = 2**30
"""Window that hides nothing."""
BITS = (8, 4)
"""Bits per code."""
SMALLEST = torch.finfo(torch.float32).tiny
"""Least magnitude of a scale, 2^-126: the smallest normal number."""
SPECS = {
    bits: QuantSpec(
        bits=bits,
        granularity="token",
        grid="absmax" if bits == 8 else "signed_absmax",
        scale_dtype="bfloat16",
        dynamic=True,
    )
    for bits in BITS
}
"""The numbers of each cache, in the terms of every other quantized tensor."""


def check_bits(bits: int) -> None:
    """Raise ValueError for other bits than a cache has."""
    if bits not in BITS:
        raise ValueError(f"bits={bits}: a KV cache has 8 or 4 bits")


def vector_scale(x: Tensor, bits: int) -> Tensor:
    """bf16 scale [...] of each vector of x [..., D], any float dtype; NaN where x is not finite."""
    x = x.detach().to(torch.float32)
    if bits == 8:
        scale = token_scale(x).squeeze(-1)
    else:
        low, high = x.amin(-1), x.amax(-1)
        scale = torch.where(high >= -low, high, low) / SPECS[bits].q_min
    rounded = scale.to(torch.bfloat16).to(torch.float32)
    rounded = torch.where(rounded.abs() < SMALLEST, torch.finfo(torch.float32).eps, rounded)
    return torch.where(rounded.isfinite(), rounded, torch.nan).to(torch.bfloat16)


def quantize(x: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Codes and scales of the vectors of x, in the layout of the buffers.

    Args:
        x: [..., D], any float dtype; D even for 4 bits.
        bits: 8 or 4.

    Returns:
        int8 codes [..., D] or packed uint8 [..., D / 2], and bf16 scales [...].

    Raises:
        ValueError: other bits, or an odd D with 4 bits.

    >>> codes, scale = quantize(torch.tensor([[4.0, 1.0, -8.0, 3.0]]), bits=4)
    >>> codes.tolist(), scale.tolist()
    ([[12, 185]], [1.0])
    """
    check_bits(bits)
    if bits == 4 and x.shape[-1] % 2:
        raise ValueError(f"head size {x.shape[-1]}: two 4-bit codes per byte need an even one")
    scale = vector_scale(x, bits)
    wide = scale.to(torch.float32).unsqueeze(-1)
    # NaN has no code: such vectors are zeros with the scale NaN
    clean = torch.where(wide.isnan(), 0.0, x.to(torch.float32))
    codes = quantize_weight(clean, torch.where(wide.isnan(), 1.0, wide), None, SPECS[bits])
    if bits == 4:
        low, high = (codes + 8).to(torch.uint8).chunk(2, -1)
        codes = low | (high << 4)
    return codes, scale


def dequantize(codes: Tensor, scale: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """[..., D] in ``dtype`` from codes and scales as `quantize` returns them; rounded once."""
    if codes.dtype == torch.uint8:
        codes = torch.cat(((codes & 15).to(torch.int8), (codes >> 4).to(torch.int8)), -1) - 8
    return (codes.to(torch.float32) * scale.to(torch.float32).unsqueeze(-1)).to(dtype)


def reference(
    q: Tensor,
    k_codes: Tensor,
    k_scale: Tensor,
    v_codes: Tensor,
    v_scale: Tensor,
    span: Tensor,
    scale: float,
    window: int = NO_WINDOW,
) -> Tensor:
    """The definition of decode attention that the kernel is tested against.

    Args:
        q: [B, H * G, D], one query token per sequence, any float dtype.
        k_codes: keys, with ``k_scale`` as `quantize` writes them: [B, H, C, ...] and [B, H, C].
        k_scale: see ``k_codes``.
        v_codes: values, likewise.
        v_scale: see ``v_codes``.
        span: int32 [2, B]: first slot of each sequence, and the slot behind its last one.
        scale: factor of the logits, 1 / sqrt(D) as a rule.
        window: most slots that are seen, counted from the end.

    Returns:
        [B, H * G, D] in q's dtype: fp32 arithmetic, rounded once; zeros for an empty sequence.
    """
    (b, hq, d), (h, capacity) = q.shape, k_codes.shape[1:3]
    k, v = dequantize(k_codes, k_scale), dequantize(v_codes, v_scale)
    q_BHGD = q.to(torch.float32).view(b, h, hq // h, d)
    slot = torch.arange(capacity, device=q.device)
    start, end = span.to(torch.int64).clamp(0, capacity).unsqueeze(-1).unbind(0)
    seen = (slot >= torch.maximum(start, end - window)) & (slot < end)
    # what is not seen may be memory that was never written: keep its NaN out of the sums
    k = torch.where(seen[:, None, :, None], k, 0.0)
    v = torch.where(seen[:, None, :, None], v, 0.0)
    logits = (q_BHGD @ k.transpose(-1, -2)) * scale
    logits = logits.masked_fill(~seen[:, None, None, :], -torch.inf)
    p = torch.softmax(logits, -1)
    p = torch.where(seen.any(-1)[:, None, None, None], p, 0.0)
    return (p @ v).reshape(b, hq, d).to(q.dtype)


def bytes_per_token(kv_heads: int, head_size: int, bits: int) -> int:
    """Bytes that one layer holds per token of one sequence, keys and values with their scales.

    >>> [bytes_per_token(8, 128, bits) for bits in (8, 4)]  # 4096 in bf16
    [2080, 1056]
    """
    return 2 * kv_heads * (head_size * bits // 8 + 2)
