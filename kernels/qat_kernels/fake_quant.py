r"""Fake-quantization with a straight-through estimator: the training-time view of the quantizer.

Equation, with z = 0 for symmetric specs::

    forward   w_hat = (clamp(round(w / s) + z, q_min, q_max) - z) * s
    backward  dw = dw_hat   where  q_min - 1/2 <= w / s + z <= q_max + 1/2,   else 0

A computed scale gets no gradient; `qat_kernels.fake_quant_learned` has the learned one.

Shape legend: w_NK [..., N, K], scale_NG and zero_point_NG [..., N, G], G = K / group.

=============  ====================================================================================
triton         CUDA: one kernel for each direction, reads w once, saves nothing but w
vectorised     CPU: `numerics.fake_quantize` and `clip_gradient`, chunk by chunk in the cache
reference      the same functions where neither applies (grid=mse on CUDA, one scale per tensor)
=============  ====================================================================================

All three give the same values bit for bit. Every call works in eager, on fake tensors and under
``torch.compile(fullgraph=True)``. In eager on plain tensors the operators are bypassed: their
dispatch takes as long again as a small weight.

Sources: Bengio et al., arXiv:1308.3432 (the estimator); Jacob et al., arXiv:1712.05877 (the mask).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from qat_kernels import fake_quant_launch
from qat_kernels.numerics import (
    QuantSpec,
    clip_gradient,
    compute_scale,
    dequantize,
    fake_quantize,
    fake_quantize_with,
    quantize,
    round_scale,
)
from qat_kernels.support import Choice, kernels_run_on, verified


def reference(
    w: Tensor,
    spec: QuantSpec,
    scale: Tensor | None = None,
    zero_point: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """The definition that every path is tested against: dequantize(quantize(w)).

    Args:
        w: [..., N, K], any float dtype.
        spec: how to quantize.
        scale: [..., N, G] to be used after `numerics.round_scale`; None: computed from w.
        zero_point: int8 like scale, or None.
        out_dtype: dtype of the result (default: w's); rounded to it once.
    """
    if scale is None:
        scale, zero_point = compute_scale(w, spec)
    else:
        scale = round_scale(scale.detach().to(torch.float32), spec)
    value = dequantize(quantize(w, scale, zero_point, spec), scale, zero_point)
    return value.to(out_dtype or w.dtype)


# ------------------------------------------------------------------------------------ which path


def choose(
    shape: tuple[int, ...],
    device: torch.device,
    *,
    spec: QuantSpec | None = None,
    dtype: torch.dtype = torch.float32,
    learned: bool = False,
) -> Choice:
    """The path for a weight of ``shape`` [..., N, K] and ``dtype`` on ``device``.

    Args:
        shape: (..., N, K).
        device: where the weight lies.
        spec: how to quantize (default: `QuantSpec()`).
        dtype: dtype of the weight.
        learned: whether the scale is given rather than computed (`fake_quantize_learned`).

    Raises:
        ValueError: K is not a multiple of the group, the granularity is for activations, or the
            dtype is not a float.
    """
    spec = spec or QuantSpec()
    check_weight(shape, dtype, spec)
    if device.type == "cpu":
        if spec.granularity == "tensor":
            return Choice("reference", "one scale for the whole matrix: no chunks that fit a cache")
        return Choice("vectorised", "element-wise passes over chunks that stay in the CPU's cache")
    missing = kernels_run_on(device)
    if missing is not None:
        return missing
    if spec.granularity == "tensor":
        return Choice("reference", "granularity=tensor: one scale takes more than one program")
    if spec.grid == "mse" and not learned:
        return Choice("reference", "grid=mse searches 29 scales; the kernel computes one")
    if dtype not in fake_quant_launch.DTYPES:
        return Choice("reference", f"{dtype}: the kernel reads float32, bfloat16 and float16")
    return Choice("triton", "one pass over the weight, its scale computed in registers")


def check_weight(shape: tuple[int, ...], dtype: torch.dtype, spec: QuantSpec) -> None:
    """Raise ValueError if a weight of ``shape`` and ``dtype`` cannot be quantized by ``spec``."""
    if not dtype.is_floating_point:
        raise ValueError(f"fake-quantization takes float weights, not {dtype}")
    if len(shape) < 2:
        raise ValueError(f"a weight has the shape [..., N, K], not {list(shape)}")
    if spec.granularity == "token":
        raise ValueError("granularity=token is for activations, not for weights")
    spec.group_of(shape[-1])


def use_kernel(
    op: str,
    w: Tensor,
    spec: QuantSpec,
    other: torch.dtype,
    check: Callable[[QuantSpec, int, torch.dtype, torch.dtype, torch.device], bool],
) -> bool:
    """Whether the kernel runs ``op``; tests it on the device at its first use.

    ``other`` is the dtype of the result or of the incoming gradient; ``check`` takes the spec, the
    group, w's dtype, ``other`` and the device, and says whether the kernel computes right.
    """
    learned = op.startswith("learned")
    path = choose(tuple(w.shape), w.device, spec=spec, dtype=w.dtype, learned=learned).path
    if path != "triton" or not w.numel() or other not in fake_quant_launch.DTYPES:
        return False
    group = spec.group_of(w.shape[-1])
    name = f"fake_quant {op} {encode(spec)}, groups of {group}, {w.dtype}, {other}"
    return verified(name, w.device, lambda: check(spec, group, w.dtype, other, w.device))


def self_test(
    backward: bool,
    spec: QuantSpec,
    group: int,
    dtype: torch.dtype,
    other: torch.dtype,
    device: torch.device,
) -> bool:
    """Whether the kernel's values on ``device`` equal the reference's on the CPU."""
    spec = replace(spec, granularity="channel")
    w = trial_weight(group, spec).to(dtype)
    if not backward:
        got, _ = fake_quant_launch.launch("forward", w.to(device), spec, other)
        return torch.equal(got.cpu(), reference(w, spec, out_dtype=other))
    generator = torch.Generator().manual_seed(1)
    grad = torch.randn(w.shape, generator=generator).to(other)
    moved = {"grad": grad.to(device)}
    got, _ = fake_quant_launch.launch("backward", w.to(device), spec, dtype, **moved)
    return torch.equal(got.cpu(), clip_gradient(grad, w, spec, dtype))


def trial_weight(group: int, spec: QuantSpec) -> Tensor:
    """fp32 [R, group]: rows that try the quantizer's corners, more than one program handles."""
    rows = 2 * fake_quant_launch.tile(group).rows + 3
    generator = torch.Generator().manual_seed(group + spec.bits)
    w = torch.randn(rows, group, generator=generator)
    # magnitudes beyond both ends of the portable scales, within fp16
    w *= torch.exp2(torch.randint(-20, 14, (rows, 1), generator=generator).float())
    # half steps of a power of two: ties, and values at the borders of the mask
    half_steps = torch.randint(2 * spec.q_min, 2 * spec.q_max + 4, (group,), generator=generator)
    half_steps[0] = 2 * spec.q_min
    w[0] = half_steps / 2
    w[1] = -w[0]
    w[2] = 0.0
    return w


# ------------------------------------------------------------------- the arithmetic, on any device


def _computed_forward(w: Tensor, spec: QuantSpec, out_dtype: torch.dtype) -> Tensor:
    """w_hat [..., N, K] in out_dtype, with scales computed from w."""
    check = functools.partial(self_test, False)
    if w.is_cuda and use_kernel("forward", w, spec, out_dtype, check):
        return fake_quant_launch.launch("forward", w, spec, out_dtype)[0]
    return fake_quantize(w, spec, out_dtype) if w.numel() else w.new_empty(w.shape, dtype=out_dtype)


def _computed_backward(grad: Tensor, w: Tensor, spec: QuantSpec) -> Tensor:
    """The clipped gradient in w's dtype; grad may have another (that of autocast)."""
    check = functools.partial(self_test, True)
    if w.is_cuda and use_kernel("backward", w, spec, grad.dtype, check):
        return fake_quant_launch.launch("backward", w, spec, w.dtype, grad=grad)[0]
    return clip_gradient(grad, w, spec, w.dtype) if w.numel() else torch.empty_like(w)


# --------------------------------------------------------------------- operators of torch.library


def encode(spec: QuantSpec) -> str:
    """A spec as an operator's argument."""
    symmetric = "symmetric" if spec.symmetric else "asymmetric"
    kind = f"{spec.granularity} {spec.group_size} {spec.grid} {spec.scale_dtype}"
    return f"{spec.bits} {symmetric} {kind}"


@functools.lru_cache(maxsize=256)
def decode(text: str) -> QuantSpec:
    """The inverse of `encode`; ValueError if the text is none of its results."""
    bits, symmetric, granularity, group_size, grid, scale_dtype = text.split(" ")
    return QuantSpec(
        bits=int(bits),
        symmetric=symmetric == "symmetric",
        granularity=granularity,  # type: ignore[arg-type]
        group_size=int(group_size),
        grid=grid,  # type: ignore[arg-type]
        scale_dtype=scale_dtype,  # type: ignore[arg-type]
    )


@torch.library.custom_op("qat_kernels::fake_quantize", mutates_args=())
def fake_quantize_op(w: Tensor, spec: str, out_dtype: torch.dtype) -> Tensor:
    """The operator behind `fake_quantize_ste`; ``spec`` is `encode`d."""
    return _computed_forward(w, decode(spec), out_dtype)


@torch.library.custom_op("qat_kernels::fake_quantize_backward", mutates_args=())
def fake_quantize_backward_op(grad: Tensor, w: Tensor, spec: str) -> Tensor:
    """The gradient of `fake_quantize_op`."""
    return _computed_backward(grad, w, decode(spec))


@fake_quantize_op.register_fake
def _(w: Tensor, spec: str, out_dtype: torch.dtype) -> Tensor:
    return w.new_empty(w.shape, dtype=out_dtype)


@fake_quantize_backward_op.register_fake
def _(grad: Tensor, w: Tensor, spec: str) -> Tensor:
    return w.new_empty(w.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.spec, _ = inputs
    ctx.save_for_backward(*tensors)


def _op_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    (w,) = ctx.saved_tensors
    return fake_quantize_backward_op(grad, w, ctx.spec), None, None


fake_quantize_op.register_autograd(_op_backward, setup_context=_save)


# ---------------------------------------------------------------------------- eager, public calls


class _FakeQuantize(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, w: Tensor, spec: QuantSpec, out_dtype: torch.dtype) -> Tensor:
        ctx.save_for_backward(w)
        ctx.spec = spec
        return _computed_forward(w, spec, out_dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (w,) = ctx.saved_tensors
        return _computed_backward(grads[0], w, ctx.spec), None, None


class _FakeQuantizeWith(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, spec: QuantSpec) -> Tensor:
        value, inside = fake_quantize_with(x, scale, spec)
        ctx.save_for_backward(inside)
        return value.to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (inside,) = ctx.saved_tensors
        return grads[0] * inside, None, None


class _RoundTo(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, dtype: torch.dtype) -> Tensor:
        return x.to(dtype).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None


def is_plain(w: Tensor) -> bool:
    """Whether ``w`` is an ordinary tensor in eager, for which the operator's dispatch is spared."""
    return not torch.compiler.is_compiling() and type(w) in (Tensor, nn.Parameter)


def float_dtype(w: Tensor, out_dtype: torch.dtype | None) -> torch.dtype:
    """The result's dtype, w's by default; ValueError if it is not a float."""
    if out_dtype is not None and not out_dtype.is_floating_point:
        raise ValueError(f"out_dtype={out_dtype}: a float dtype")
    return out_dtype or w.dtype


def fake_quantize_ste(w: Tensor, spec: QuantSpec, out_dtype: torch.dtype | None = None) -> Tensor:
    """Fake-quantized weight with the straight-through gradient; only w is saved for backward.

    Args:
        w: [..., N, K], any float dtype, any strides.
        spec: how to quantize; the scale is computed from w.
        out_dtype: dtype of the result (default: w's); the fp32 values are rounded to it once.

    Raises:
        ValueError: K is not a multiple of the group, the granularity is for activations, w has
            fewer than two axes, or a dtype is not a float.
    """
    dtype = float_dtype(w, out_dtype)
    check_weight(w.shape, w.dtype, spec)
    run: Callable[..., Tensor] = _FakeQuantize.apply
    if not is_plain(w):
        operator: Callable[..., Tensor] = fake_quantize_op
        return operator(w, encode(spec), dtype)
    return run(w, spec, dtype)


def fake_quantize_activation_ste(x: Tensor, scale: Tensor, spec: QuantSpec) -> Tensor:
    """Fake-quantized activations x [..., K] with a given fp32 scale (scalar or [..., 1]).

    Gradient as for weights, none through the scale; saves one bool per element for backward.
    """
    result: Tensor = _FakeQuantizeWith.apply(x, scale, spec)  # type: ignore[no-untyped-call]
    return result


def round_to_ste(x: Tensor, dtype: torch.dtype) -> Tensor:
    """X rounded to ``dtype`` and back, any shape; the gradient passes unchanged."""
    result: Tensor = _RoundTo.apply(x, dtype)  # type: ignore[no-untyped-call]
    return result
