"""The one quantizer: every number that the project trains, ships and serves passes through here.

Integer quantization of a weight matrix ``w_NK`` (N output features, K input features) in groups::

    q = clamp(round(w / s) + z, q_min, q_max)        w_hat = (q - z) * s

in fp32: a true division (a reciprocal changes 0.36 % of int4 codes), round half to even, clamp.
``q_min = -2**(bits-1)`` and ``q_max = 2**(bits-1) - 1``; the zero point ``z`` lives in the same
range. Fake-quant is ``dequantize(quantize(w))``, convert is ``pack(quantize(w))``, and each
kernel's reference calls these functions: nothing else in the project does bit arithmetic.

Portable scales. An integer weight scale is rounded to bf16 and its magnitude kept within
[2^-17, 8160] *before* codes are computed. Eight significant bits above 2^-17 are exact in bf16,
fp16 (whose subnormals end at 2^-24) and fp32; 8160 is the largest bf16 number not above 8188, so
that 8 * s stays finite in fp16. One trained model is therefore lossless in all public formats.

Grids (how a scale follows from the largest values of a group):

=============  ======================================================================
signed_absmax  s = (largest-magnitude value) / q_min, possibly negative: the largest
               value lands on the code -2^(bits-1) exactly, and re-quantizing the result
               gives the same codes
absmax         s = absmax / ((2^bits - 1) / 2), the grid of compressed-tensors
mse            s = signed_absmax * r, with r in [0.3, 1] of least squared error per group
=============  ======================================================================

Asymmetric specs use min-max (zero included): s = (max - min) / (2^bits - 1) and
z = clamp(round(q_min - min / s)); their ``mse`` shrinks both ends by r.

Shape legend: N output features, K input features, G groups along K, P packed int32 words along K.
Leading dimensions (the experts of a mixture) are allowed everywhere: [..., N, K].
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

SCALE_MIN = 2.0**-17
"""Least magnitude of a portable scale."""
SCALE_MAX = 8160.0
"""Largest magnitude of a portable scale: the bf16 number below 65504 / 8."""
MSE_RATIOS = tuple(1.0 - 0.025 * i for i in range(29))
"""Shrink factors that ``grid=mse`` tries, the first of equals wins."""
CHUNK_ELEMENTS = 1 << 19
"""Elements handled at a time on the CPU: 2 MiB of fp32 stay in the L3 cache, so that the chain
of element-wise passes costs one trip to memory instead of one per pass."""

Granularity = Literal["tensor", "channel", "group", "token"]
Grid = Literal["signed_absmax", "absmax", "mse"]


@dataclass(frozen=True)
class QuantSpec:
    """How one tensor is quantized. Frozen: recipes, training, kernels and exporters read the same.

    Scale shapes for a tensor [..., N, K]: ``tensor`` [..., 1, 1], ``channel`` [..., N, 1],
    ``group`` [..., N, K / group_size]; for activations [..., K], ``token`` is [..., 1].

    >>> spec = QuantSpec(bits=4, granularity="group", group_size=32)
    >>> scale, zero_point = compute_scale(torch.ones(8, 64), spec)
    >>> tuple(scale.shape), zero_point
    ((8, 2), None)
    """

    family: Literal["int"] = "int"
    """Number family of the codes."""
    bits: int = 4
    """Bits per code, 2 to 8."""
    symmetric: bool = True
    """Symmetric around zero; false adds a zero point per scale."""
    granularity: Granularity = "group"
    """What shares one scale: tensor, channel (output row), group (of group_size inputs), token."""
    group_size: int = 32
    """Input features per group; read only when granularity is group."""
    grid: Grid = "signed_absmax"
    """How the scale follows from the values: signed_absmax, absmax, or mse (searches the clip)."""
    scale_dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Dtype to which scales are rounded before codes are computed; bfloat16 is portable."""
    dynamic: bool = False
    """Activations only: the scale is computed at run time for each token, not calibrated."""

    def __post_init__(self) -> None:
        """Raise ValueError for a combination that no quantizer carries, naming the field."""
        if not 2 <= self.bits <= 8:
            raise ValueError(
                f"bits={self.bits}: an int spec takes 2 to 8 bits (one bit has no zero)"
            )
        if self.group_size < 2:
            raise ValueError(f"group_size={self.group_size}: a group holds at least 2 values")
        if not self.symmetric and self.grid == "signed_absmax":
            raise ValueError(
                "grid=signed_absmax needs symmetric=true; use grid=absmax (min-max) or grid=mse "
                "with symmetric=false"
            )
        if self.dynamic != (self.granularity == "token"):
            raise ValueError(
                f"dynamic={str(self.dynamic).lower()} with granularity={self.granularity}: "
                "dynamic=true goes with granularity=token, and only with it"
            )

    @property
    def q_min(self) -> int:
        """Smallest code."""
        return -(1 << (self.bits - 1))

    @property
    def q_max(self) -> int:
        """Largest code."""
        return (1 << (self.bits - 1)) - 1

    def group_of(self, k: int) -> int:
        """Length of the runs along K that share a scale. Raises ValueError if K does not divide."""
        if self.granularity != "group":
            return k
        if k % self.group_size:
            raise ValueError(f"K = {k} is not a multiple of group_size = {self.group_size}")
        return self.group_size


def check_finite(tensor: Tensor, name: str) -> None:
    """Raise ValueError, naming the parameter, if ``tensor`` (any shape) holds NaN or infinity."""
    # a sum over fp32 can overflow on finite input, so count instead
    bad = int((~torch.isfinite(tensor)).sum())
    if bad:
        raise ValueError(f"{name}: {bad} of {tensor.numel()} values are NaN or infinite")


def round_scale(scale: Tensor, spec: QuantSpec) -> Tensor:
    """Round raw fp32 scales to the grid of ``spec.scale_dtype``; shape kept, fp32 out.

    A scale whose magnitude is below SCALE_MIN becomes +SCALE_MIN (positive even when it was
    negative, so that quantizing the result again finds the same sign), one above SCALE_MAX keeps
    its sign.
    """
    if spec.scale_dtype == "bfloat16":
        scale = scale.to(torch.bfloat16).to(torch.float32)
    scale = scale.clamp(-SCALE_MAX, SCALE_MAX)
    return torch.where(scale.abs() < SCALE_MIN, SCALE_MIN, scale)


def _extremes(w_g: Tensor, spec: QuantSpec) -> tuple[Tensor, Tensor]:
    """(min, max) over each group of w_g [..., N, G, g], keeping dims; tensor: over N as well."""
    if spec.granularity == "tensor":
        return w_g.amin((-3, -2, -1), keepdim=True), w_g.amax((-3, -2, -1), keepdim=True)
    # two vectorised reductions beat torch.aminmax over a short last axis threefold
    return w_g.amin(-1, keepdim=True), w_g.amax(-1, keepdim=True)


def _largest(low: Tensor, high: Tensor) -> Tensor:
    """The largest-magnitude value, with its sign; the positive one of two equals."""
    return torch.where(high >= -low, high, low)


def scale_from_range(low: Tensor, high: Tensor, spec: QuantSpec) -> tuple[Tensor, Tensor | None]:
    """Scale and zero point for values that span [low, high]; any shape, fp32, shapes kept.

    Shared by weights (range of a group) and by observers (range of an activation).
    """
    if spec.symmetric:
        if spec.grid == "absmax":
            absmax = torch.maximum(high.abs(), low.abs())
            return round_scale(absmax / ((2**spec.bits - 1) / 2), spec), None
        return round_scale(_largest(low, high) / spec.q_min, spec), None
    low, high = low.clamp(max=0.0), high.clamp(min=0.0)
    # halves, because the difference of two huge values of opposite sign overflows fp32
    scale = round_scale((high / 2 - low / 2) / ((2**spec.bits - 1) / 2), spec)
    zero_point = (spec.q_min - low / scale).round_().clamp_(spec.q_min, spec.q_max)
    return scale, zero_point


def token_scale(x: Tensor) -> Tensor:
    """fp32 scale [..., 1] of activations [..., K] for dynamic int8: absmax / 127.5 per token.

    The arithmetic of compressed-tensors (a token of zeros gets the fp32 epsilon), because that is
    what readers compute at run time; it is never stored, so it is not on the portable grid.
    """
    low, high = torch.aminmax(x.detach().to(torch.float32), dim=-1, keepdim=True)
    absmax = torch.maximum(low.abs(), high.abs())
    scale = absmax / 127.5
    return torch.where(scale == 0, torch.finfo(torch.float32).eps, scale)


def fake_quantize_with(x: Tensor, scale: Tensor, spec: QuantSpec) -> tuple[Tensor, Tensor]:
    """Symmetric fake-quant of x (any shape) with a given, broadcastable fp32 scale.

    Returns the fp32 values and the bool mask of what was not clipped (the straight-through
    gradient), both of x's shape. For activations, whose scale is calibrated or per token.
    """
    t = x.detach().to(torch.float32) / scale
    inside = (t >= spec.q_min - 0.5).logical_and_(t <= spec.q_max + 0.5)
    return t.round_().clamp_(spec.q_min, spec.q_max).mul_(scale), inside


def _codes(
    w_g: Tensor, scale: Tensor, zero_point: Tensor | None, spec: QuantSpec, out: Tensor
) -> Tensor:
    """The codes of w_g [..., N, G, g] fp32, still fp32, written into ``out`` (may be w_g)."""
    torch.div(w_g, scale, out=out).round_()
    if zero_point is not None:
        out.add_(zero_point)
    return out.clamp_(spec.q_min, spec.q_max)


def _squared_error(
    w_g: Tensor, scale: Tensor, zero_point: Tensor | None, spec: QuantSpec
) -> Tensor:
    codes = _codes(w_g, scale, zero_point, spec, torch.empty_like(w_g))
    if zero_point is not None:
        codes = codes.sub_(zero_point)
    error = codes.mul_(scale).sub_(w_g).square_()
    over = (-3, -2, -1) if spec.granularity == "tensor" else (-1,)
    return error.sum(over, keepdim=True)


def _search_mse(
    w_g: Tensor, low: Tensor, high: Tensor, spec: QuantSpec
) -> tuple[Tensor, Tensor | None]:
    scale, zero_point = scale_from_range(low, high, spec)
    best = _squared_error(w_g, scale, zero_point, spec)
    for ratio in MSE_RATIOS[1:]:
        scale_r, zero_point_r = scale_from_range(low * ratio, high * ratio, spec)
        error = _squared_error(w_g, scale_r, zero_point_r, spec)
        better = error < best
        best = torch.where(better, error, best)
        scale = torch.where(better, scale_r, scale)
        if zero_point is not None and zero_point_r is not None:
            zero_point = torch.where(better, zero_point_r, zero_point)
    return scale, zero_point


def _grouped(w: Tensor, spec: QuantSpec) -> Tensor:
    """View w [..., N, K] as [..., N, G, g]."""
    return torch.unflatten(w, -1, (-1, spec.group_of(w.shape[-1])))


def _qparams(w_g: Tensor, spec: QuantSpec) -> tuple[Tensor, Tensor | None]:
    """fp32 scale and zero point [..., N, G, 1] (tensor: [..., 1, 1, 1]) of w_g [..., N, G, g]."""
    low, high = _extremes(w_g, spec)
    if spec.grid == "mse":
        return _search_mse(w_g, low, high, spec)
    return scale_from_range(low, high, spec)


def compute_scale(w: Tensor, spec: QuantSpec) -> tuple[Tensor, Tensor | None]:
    """Scale and zero point of a weight.

    Args:
        w: [..., N, K], any float dtype; read in fp32.
        spec: how to quantize; granularity tensor, channel or group.

    Returns:
        fp32 scale [..., N, G] (G = 1 for channel; [..., 1, 1] for tensor), and for asymmetric
        specs the int8 zero point of the same shape, else None.

    Raises:
        ValueError: K is not a multiple of the group, or the granularity is for activations.
    """
    if spec.granularity == "token":
        raise ValueError("granularity=token is for activations, not for weights")
    scale, zero_point = _qparams(_grouped(w.detach().to(torch.float32), spec), spec)
    return scale.squeeze(-1), None if zero_point is None else zero_point.squeeze(-1).to(torch.int8)


def quantize(w: Tensor, scale: Tensor, zero_point: Tensor | None, spec: QuantSpec) -> Tensor:
    """int8 codes of w [..., N, K] for the scale [..., N, G] that `compute_scale` returned."""
    w_g = _grouped(w.detach().to(torch.float32), spec)
    zero = None if zero_point is None else zero_point.unsqueeze(-1).to(torch.float32)
    codes = _codes(w_g, scale.unsqueeze(-1), zero, spec, torch.empty_like(w_g))
    return codes.flatten(-2).to(torch.int8)


def dequantize(q: Tensor, scale: Tensor, zero_point: Tensor | None) -> Tensor:
    """fp32 weight (q - z) * s, [..., N, K], from int8 codes and scale, zero point [..., N, G]."""
    q_g = q.to(torch.float32).unflatten(-1, (scale.shape[-1], -1))
    if zero_point is not None:
        q_g = q_g - zero_point.unsqueeze(-1).to(torch.float32)
    w: Tensor = q_g * scale.unsqueeze(-1).to(torch.float32)
    return w.flatten(-2)


def fake_quantize(w: Tensor, spec: QuantSpec, out_dtype: torch.dtype = torch.float32) -> Tensor:
    """dequantize(quantize(w)) without the detour over int8: equal values, one pass over memory.

    Args:
        w: [..., N, K], any float dtype.
        spec: how to quantize; scales are computed from w.
        out_dtype: dtype of the result; values are rounded to it once, at the end.

    Returns:
        [..., N, K] in ``out_dtype``.
    """
    out = torch.empty_like(w, dtype=out_dtype, memory_format=torch.contiguous_format)
    buffer = torch.empty(0)
    for w_c, out_c in _chunks((w.detach(), out), spec):
        w_g, out_g = _grouped(w_c.to(torch.float32), spec), _grouped(out_c, spec)
        scale, zero_point = _qparams(w_g, spec)
        direct = out_dtype == torch.float32
        if not direct and buffer.shape != w_g.shape:
            buffer = torch.empty_like(w_g)
        codes = _codes(w_g, scale, zero_point, spec, out_g if direct else buffer)
        if zero_point is not None:
            codes.sub_(zero_point)
        codes.mul_(scale)
        if not direct:
            out_g.copy_(codes)
    return out


def clip_gradient(
    grad: Tensor, w: Tensor, spec: QuantSpec, out_dtype: torch.dtype | None = None
) -> Tensor:
    """Straight-through gradient: grad inside [q_min - 1/2, q_max + 1/2] * s, zero outside.

    grad and w [..., N, K]; returns ``out_dtype`` (default: grad's dtype). The scale is computed
    again from w, so that nothing but the weight has to live until the backward pass. The half step
    on either side matters: read strictly, half of the groups' largest weights would get none.
    """
    out = torch.empty_like(grad, dtype=out_dtype, memory_format=torch.contiguous_format)
    # allocated once: fresh memory for each chunk costs more than the arithmetic
    t, inside = torch.empty(0), torch.empty(0)
    for w_c, grad_c, out_c in _chunks((w.detach(), grad, out), spec):
        w_g, out_g = _grouped(w_c.to(torch.float32), spec), _grouped(out_c, spec)
        scale, zero_point = _qparams(w_g, spec)
        if t.shape != w_g.shape:
            t = torch.empty_like(w_g)
        if out.dtype == torch.float32:
            inside = out_g
        elif inside.shape != w_g.shape:
            inside = torch.empty_like(w_g)
        torch.div(w_g, scale, out=t)
        if zero_point is not None:
            t.add_(zero_point)
        # 1.0 where clamping changes nothing; comparing in place stays in vectorised fp32
        torch.clamp(t, spec.q_min - 0.5, spec.q_max + 0.5, out=inside).eq_(t)
        torch.mul(inside, _grouped(grad_c, spec), out=out_g)
    return out


def _chunks(tensors: tuple[Tensor, ...], spec: QuantSpec) -> Iterator[tuple[Tensor, ...]]:
    """Equally shaped tensors [..., N, K] cut into matrices that fit the cache (on the CPU).

    Rows are independent but for granularity ``tensor``, which is cut into its whole matrices.
    """
    *_, n, k = tensors[0].shape
    if spec.granularity == "tensor":
        yield from zip(*(tensor.reshape(-1, n, k) for tensor in tensors))
        return
    rows = [tensor.reshape(-1, k) for tensor in tensors]
    step = max(1, CHUNK_ELEMENTS // max(k, 1)) if rows[0].device.type == "cpu" else len(rows[0])
    for start in range(0, len(rows[0]), max(step, 1)):
        yield tuple(tensor[start : start + step] for tensor in rows)


def pack(q: Tensor, bits: int) -> Tensor:
    """Pack int8 codes [..., N, K] into int32 words [..., N, ceil(K * bits / 32)].

    A dense little-endian bit stream of u = q + 2**(bits-1): element i occupies the bits
    i*bits ... i*bits + bits - 1 of the row, across word borders where bits does not divide 32
    (the layout of compressed-tensors' ``pack-quantized``). Unused bits at the end are zero.

    Raises:
        ValueError: q is not int8, bits is not in 2 ... 8, or a code does not fit.
    """
    if q.dtype != torch.int8 or not 2 <= bits <= 8:
        raise ValueError(f"pack takes int8 codes of 2 to 8 bits, got {q.dtype} and bits={bits}")
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    if q.numel() and not (low <= int(q.min()) and int(q.max()) <= high):
        raise ValueError(f"codes outside {low} ... {high} do not fit {bits} bits")
    k = q.shape[-1]
    u = (q.to(torch.int16) - low).to(torch.uint8)
    u = torch.nn.functional.pad(u, (0, -k % 32)).unflatten(-1, (-1, 32))
    words = torch.zeros((*u.shape[:-1], bits), dtype=torch.int64, device=q.device)
    for i in range(32):
        word, shift = divmod(i * bits, 32)
        value = u[..., i].to(torch.int64) << shift
        words[..., word] |= value & 0xFFFFFFFF
        if shift + bits > 32:
            words[..., word + 1] |= value >> 32
    # into the signed range by arithmetic: an int64 above 2^31 does not convert portably
    words = torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)
    return words.flatten(-2)[..., : -(-k * bits // 32)].contiguous()


def unpack(packed: Tensor, bits: int, k: int) -> Tensor:
    """The inverse of `pack`: int8 codes [..., N, k] from int32 words [..., N, ceil(k*bits/32)].

    Raises:
        ValueError: not int32, or the number of words does not fit ``k`` and ``bits``.
    """
    if packed.dtype != torch.int32 or packed.shape[-1] != -(-k * bits // 32):
        raise ValueError(
            f"expected int32 [..., {-(-k * bits // 32)}] for {k} codes of {bits} bits, "
            f"got {packed.dtype} {tuple(packed.shape)}"
        )
    low = -(2 ** (bits - 1))
    words = packed.to(torch.int64) & 0xFFFFFFFF
    words = torch.nn.functional.pad(words, (0, -packed.shape[-1] % bits)).unflatten(-1, (-1, bits))
    codes = torch.empty((*words.shape[:-1], 32), dtype=torch.int8, device=packed.device)
    for i in range(32):
        word, shift = divmod(i * bits, 32)
        value = words[..., word] >> shift
        if shift + bits > 32:
            value = value | (words[..., word + 1] << (32 - shift))
        codes[..., i] = ((value & (2**bits - 1)) + low).to(torch.int8)
    return codes.flatten(-2)[..., :k].contiguous()
