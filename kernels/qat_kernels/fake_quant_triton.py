r"""Triton kernels of group fake-quantization: forward, clipped gradient, learned step size.

For every group of values w (along K) that share a scale s and a zero point z (0 if symmetric)::

    forward   w_hat = (clamp(round(w / s) + z, q_min, q_max) - z) * s
    backward  dw    = dw_hat   where  q_min - 1/2 <= w / s + z <= q_max + 1/2,   else 0
    learned   ds    = sum(dw_hat * (w_hat / s - (w / s where inside, else 0))) / sqrt(n * q_max)

``s`` follows from the group's values as in `numerics.scale_from_range`, or is given. Reads w once
and writes w_hat once; backward reads w and dw_hat and writes dw: the scale is computed again.

Shape legend: T groups (all rows of all matrices, one after the other), g values per group.
``w_TG, grad_TG, out_TG`` contiguous, ``scale_T`` fp32, ``zero_T`` int8. A program handles ROWS
groups, padded to BLOCK lanes (a power of two); longer groups than BLOCK are read in two passes.

The division is exact and straight-line. `div.rn` has a slow path behind a branch for each value,
which halts everything else; a portable scale allows better, because it has 8 significant bits::

    q0 = w * r         r = 1/s within 2 units in the last place
    e  = w - q0 * s    exact: at most 24 - 22 + 8 bits remain, one fused multiply-add
    t  = q0 + e * r    one more

Before its last rounding t is off by less than 2^-43 of its value. A quotient of 24 by 8 bits that
is no fp32 number and no midpoint of two differs from every midpoint by at least 2^-33 of its value,
and is never a midpoint (25 bits times s would not fit w's 24). So t is w / s correctly rounded.
For the same reason clamping moves in front of the division: q * s and (q + 1/2) * s are exact in
fp32, and w / s rounds to the half-integer h only if w = h * s; the mask of a symmetric spec
therefore compares w with the two bounds and divides nothing. Scales of 24 bits
(``scale_dtype=float32``) take `tl.div_rn`.

NaN spreads over its group as in the reference: maxima are taken of the values' bits as integers.

Sources: Markstein, IBM J. Res. Dev. 34 (1990), for the division; Esser et al., arXiv:1902.08153,
for the learned step size.
"""

from __future__ import annotations

from qat_kernels.numerics import SCALE_MAX, SCALE_MIN
from qat_kernels.support import interpreted, jit

try:
    import triton
    import triton.language as tl

    _MAX, _MIN = tl.constexpr(SCALE_MAX), tl.constexpr(SCALE_MIN)
    # adding and subtracting 1.5 * 2^23 rounds |x| < 2^22 half to even
    _MAGIC = tl.constexpr(12582912.0)
    _NAN = tl.constexpr(tl.PropagateNan.ALL)
    # the interpreter's fused multiply-add rounds twice
    _EMULATE = tl.constexpr(interpreted())
except ImportError:  # no wheel for this platform: nothing will launch a kernel
    triton = None


@jit
def _fma(a: tl.tensor, b: tl.tensor, c: tl.tensor) -> tl.tensor:
    """A * b + c rounded once."""
    if _EMULATE:
        return (a.to(tl.float64) * b.to(tl.float64) + c.to(tl.float64)).to(tl.float32)
    else:
        return tl.fma(a, b, c)


@jit
def _key(w: tl.tensor, MODE: tl.constexpr) -> tl.tensor:
    """An integer for each fp32 value, so that the greatest integer marks the value that counts."""
    if MODE == "signed_absmax":
        # magnitude first, then the sign, positive above negative
        bits = w.to(tl.uint32, bitcast=True)
        return ((bits << 1) | (bits >> 31)) ^ 1
    elif MODE == "absmax":
        return w.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    else:
        # the order of floats: negative ones have their magnitude's bits flipped
        bits = w.to(tl.int32, bitcast=True)
        return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@jit
def _value(key: tl.tensor, MODE: tl.constexpr) -> tl.tensor:
    """The inverse of `_key`."""
    if MODE == "signed_absmax":
        return ((key >> 1) | ((key ^ 1) << 31)).to(tl.float32, bitcast=True)
    elif MODE == "absmax":
        return key.to(tl.float32, bitcast=True)
    else:
        return (key ^ ((key >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@jit
def _round_scale(scale: tl.tensor, PORTABLE: tl.constexpr) -> tl.tensor:
    """`numerics.round_scale` of fp32 scales."""
    if PORTABLE:
        # to bf16, half to even, by integers: the interpreter's cast truncates
        bits = scale.to(tl.uint32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
        scale = tl.where(scale != scale, scale, rounded.to(tl.float32, bitcast=True))
    # comparisons, because they leave NaN as it is
    scale = tl.where(scale > _MAX, _MAX, scale)
    scale = tl.where(scale < -_MAX, -_MAX, scale)
    return tl.where(tl.abs(scale) < _MIN, _MIN, scale)


@jit
def _clamp_between(x: tl.tensor, a: tl.tensor, b: tl.tensor) -> tl.tensor:
    """X within a and b, whichever is the smaller; NaN stays."""
    low, high = tl.minimum(a, b), tl.maximum(a, b)
    x = tl.maximum(x, low, propagate_nan=_NAN)
    return tl.minimum(x, high, propagate_nan=_NAN)


@jit
def _divide(
    w: tl.tensor,
    scale: tl.tensor,
    low: tl.tensor,
    high: tl.tensor,
    PORTABLE: tl.constexpr,
) -> tl.tensor:
    """W / scale correctly rounded and clamped to integers low ... high; w [T, g], others [T, 1]."""
    if PORTABLE:
        w = _clamp_between(w, scale * low, scale * high)
        reciprocal = 1.0 / scale
        first = w * reciprocal
        # the sign goes to the scale, of which there are fewer
        rest = _fma(first, -scale, w)
        return _fma(rest, reciprocal, first)
    else:
        scale, w = tl.broadcast(scale, w)
        return tl.clamp(tl.div_rn(w, scale), low, high, propagate_nan=_NAN)


@jit
def _qparams(
    low_T: tl.tensor,
    high_T: tl.tensor,
    scale_ptr: tl.tensor,
    zero_ptr: tl.tensor,
    t: tl.tensor,
    t_ok: tl.tensor,
    MODE: tl.constexpr,
    BITS: tl.constexpr,
    ZERO: tl.constexpr,
    PORTABLE: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:
    """fp32 scale and zero point of each group, from the reduced keys or from memory."""
    Q_MIN: tl.constexpr = -(2 ** (BITS - 1))
    HALF: tl.constexpr = (2**BITS - 1) / 2
    if MODE == "given":
        scale_T = _round_scale(tl.load(scale_ptr + t, mask=t_ok, other=1.0), PORTABLE)
        if ZERO:
            zero_T = tl.load(zero_ptr + t, mask=t_ok, other=0).to(tl.float32)
        else:
            zero_T = tl.zeros_like(scale_T)
    elif MODE == "minmax":
        low, high = _value(low_T, MODE), _value(high_T, MODE)
        low, high = tl.where(low > 0, 0.0, low), tl.where(high < 0, 0.0, high)
        half = tl.full(low.shape, HALF, tl.float32)
        scale_T = _divide(high * 0.5 - low * 0.5, half, 0.0, 2 * _MAX, True)
        scale_T = _round_scale(scale_T, PORTABLE)
        zero_T = Q_MIN - _divide(low, scale_T, 2.0 * Q_MIN, 0.0, PORTABLE)
        zero_T = tl.clamp(zero_T, Q_MIN * 1.0, -Q_MIN - 1.0, propagate_nan=_NAN)
        zero_T = (zero_T + _MAGIC) - _MAGIC
    else:
        largest = _value(high_T, MODE)
        if MODE == "absmax":
            half = tl.full(largest.shape, HALF, tl.float32)
            scale_T = _divide(largest, half, 0.0, 2 * _MAX, True)
        else:
            # a power of two: exact but for denormals, which become SCALE_MIN
            scale_T = largest * (1.0 / Q_MIN)
        scale_T = _round_scale(scale_T, PORTABLE)
        zero_T = tl.zeros_like(scale_T)
    return scale_T, zero_T


@jit
def _inside(
    w: tl.tensor,
    scale: tl.tensor,
    zero: tl.tensor,
    BITS: tl.constexpr,
    ASYMMETRIC: tl.constexpr,
    PORTABLE: tl.constexpr,
) -> tl.tensor:
    """Whether clamping the code of w would change it by at most half a step."""
    LOW: tl.constexpr = -(2 ** (BITS - 1)) - 0.5
    HIGH: tl.constexpr = 2 ** (BITS - 1) - 0.5
    if PORTABLE and not ASYMMETRIC:
        a, b = scale * LOW, scale * HIGH
        return (w >= tl.minimum(a, b)) & (w <= tl.maximum(a, b))
    else:
        # one code beyond the bounds on either side decides like everything farther out
        t = _divide(w, scale, LOW - 0.5 - zero, HIGH + 0.5 - zero, PORTABLE)
        if ASYMMETRIC:
            t += zero
        return (t >= LOW) & (t <= HIGH)


@jit
def _finish(
    w: tl.tensor,
    grad: tl.tensor,
    scale_T: tl.tensor,
    zero_T: tl.tensor,
    OP: tl.constexpr,
    BITS: tl.constexpr,
    ASYMMETRIC: tl.constexpr,
    PORTABLE: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:
    """What the operation writes for w [T, g], and for ``learned`` the terms of the scale's sum."""
    Q_MIN: tl.constexpr = -(2 ** (BITS - 1))
    scale, zero = scale_T[:, None], zero_T[:, None]
    low, high = Q_MIN - zero, -Q_MIN - 1 - zero
    if OP == "forward":
        t = _divide(w, scale, low, high, PORTABLE)
        out, term = ((t + _MAGIC) - _MAGIC) * scale, w
    elif OP == "backward":
        inside = _inside(w, scale, zero, BITS, ASYMMETRIC, PORTABLE)
        # a product, as in the reference: NaN and the sign of zero stay
        out, term = grad * inside.to(tl.float32), w
    else:
        t = _divide(w, scale, low - 1, high + 1, PORTABLE)
        shifted = t
        if ASYMMETRIC:
            shifted = t + zero
        inside = (shifted >= Q_MIN - 0.5) & (shifted <= -Q_MIN - 0.5)
        q = tl.clamp((t + _MAGIC) - _MAGIC, low, high, propagate_nan=_NAN)
        out = grad * inside.to(tl.float32)
        term = grad * tl.where(inside, q - t, q)
    return out, term


@jit
def fake_quant_kernel(
    w_ptr: tl.tensor,
    grad_ptr: tl.tensor,
    scale_ptr: tl.tensor,
    zero_ptr: tl.tensor,
    out_ptr: tl.tensor,
    scale_grad_ptr: tl.tensor,
    groups: int,
    OP: tl.constexpr,
    MODE: tl.constexpr,
    BITS: tl.constexpr,
    ZERO: tl.constexpr,
    PORTABLE: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    FACTOR: tl.constexpr,
) -> None:
    """ROWS groups of GROUP values; see the module docstring. Unused pointers are any pointer."""
    ASYMMETRIC: tl.constexpr = MODE == "minmax" or ZERO
    # 64 bits: a stack of experts can pass 2^31 values
    first = tl.program_id(0).to(tl.int64) * ROWS
    t = tl.arange(0, ROWS)
    t_ok = t < tl.minimum(groups - first, ROWS).to(tl.int32)
    scale_ptr += first
    zero_ptr += first
    w_ptr += first * GROUP
    grad_ptr += first * GROUP
    out_ptr += first * GROUP
    lane = tl.arange(0, BLOCK)
    offset = t[:, None] * GROUP + lane[None, :]
    ok = t_ok[:, None] & (lane < GROUP)[None, :] if BLOCK != GROUP else t_ok[:, None]
    grad = tl.zeros((ROWS, BLOCK), tl.float32)
    if BLOCK >= GROUP:
        w = tl.load(w_ptr + offset, mask=ok, other=0.0).to(tl.float32)
        if OP != "forward":
            grad = tl.load(grad_ptr + offset, mask=ok, other=0.0).to(tl.float32)
        key = _key(w, MODE)
        low_T, high_T = tl.min(key, 1), tl.max(key, 1)
        scale_T, zero_T = _qparams(
            *(low_T, high_T, scale_ptr, zero_ptr, t, t_ok), MODE, BITS, ZERO, PORTABLE
        )
        out, term = _finish(w, grad, scale_T, zero_T, OP, BITS, ASYMMETRIC, PORTABLE)
        tl.store(out_ptr + offset, out.to(out_ptr.dtype.element_ty), mask=ok)
    else:
        # zero is in every range, and the least of all magnitudes
        low = _key(grad, MODE)
        high = low
        if MODE != "given":
            for k in range(0, GROUP, BLOCK):
                w = tl.load(w_ptr + offset + k, mask=ok & (k + lane < GROUP)[None, :], other=0.0)
                key = _key(w.to(tl.float32), MODE)
                low, high = tl.minimum(low, key), tl.maximum(high, key)
        low_T, high_T = tl.min(low, 1), tl.max(high, 1)
        scale_T, zero_T = _qparams(
            *(low_T, high_T, scale_ptr, zero_ptr, t, t_ok), MODE, BITS, ZERO, PORTABLE
        )
        total = tl.zeros((ROWS, BLOCK), tl.float32)
        for k in range(0, GROUP, BLOCK):
            mask = ok & (k + lane < GROUP)[None, :]
            w = tl.load(w_ptr + offset + k, mask=mask, other=0.0).to(tl.float32)
            if OP != "forward":
                grad = tl.load(grad_ptr + offset + k, mask=mask, other=0.0).to(tl.float32)
            out, term = _finish(w, grad, scale_T, zero_T, OP, BITS, ASYMMETRIC, PORTABLE)
            tl.store(out_ptr + offset + k, out.to(out_ptr.dtype.element_ty), mask=mask)
            if OP == "learned":
                total += term
        term = total
    if OP == "learned":
        tl.store(scale_grad_ptr + first + t, tl.sum(term, 1) * FACTOR, mask=t_ok)
