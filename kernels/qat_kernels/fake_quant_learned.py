r"""Fake-quantization with a learned scale (LSQ), or one that is given for good.

Equation, with m = 1 where q_min - 1/2 <= w / s + z <= q_max + 1/2, else 0, and n the number of
values that share a scale::

    w_hat = (clamp(round(w / s) + z, q_min, q_max) - z) * s
    dw    = dw_hat * m
    ds    = sum(dw_hat * (w_hat / s - m * w / s)) / sqrt(n * q_max)

Shape legend: w_NK, grad_NK [..., N, K], scale_NG and zero_point_NG [..., N, G], G = K / group.
The kernel is that of `qat_kernels.fake_quant_triton`, the choice of path that of
`qat_kernels.fake_quant`. The sum over a group has a fixed order on each path; its last bits depend
on the path, nothing else does.

Source: Esser et al., arXiv:1902.08153 (learned step size quantization), whose clipping bounds are
widened by half a step as everywhere in this package.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from qat_kernels import fake_quant_launch, numerics
from qat_kernels.fake_quant import (
    check_weight,
    decode,
    encode,
    float_dtype,
    is_plain,
    reference,
    use_kernel,
)
from qat_kernels.numerics import QuantSpec, round_scale


def _check_scale(w: Tensor, scale: Tensor, zero_point: Tensor | None, spec: QuantSpec) -> None:
    *leading, n, k = w.shape
    groups = k // max(spec.group_of(k), 1)
    expected = (*leading, 1, 1) if spec.granularity == "tensor" else (*leading, n, groups)
    if tuple(scale.shape) != expected or not scale.is_floating_point():
        raise ValueError(
            f"scale: expected a float tensor {list(expected)} for a weight {list(w.shape)}, got "
            f"{scale.dtype} {list(scale.shape)}"
        )
    if (zero_point is None) != spec.symmetric:
        raise ValueError(
            f"zero_point goes with symmetric=false, and only with it; here symmetric="
            f"{str(spec.symmetric).lower()}"
        )
    if zero_point is not None and (zero_point.dtype, zero_point.shape) != (torch.int8, scale.shape):
        raise ValueError(
            f"zero_point: expected int8 {list(scale.shape)}, got {zero_point.dtype} "
            f"{list(zero_point.shape)}"
        )
    for name, tensor in (("scale", scale), ("zero_point", zero_point)):
        if tensor is not None and tensor.device != w.device:
            raise ValueError(f"{name} is on {tensor.device}, the weight on {w.device}")


def _launch_forward(
    w: Tensor, scale: Tensor, zero_point: Tensor | None, spec: QuantSpec, out_dtype: torch.dtype
) -> Tensor:
    launch = fake_quant_launch.launch
    return launch("forward", w, spec, out_dtype, scale=scale, zero_point=zero_point)[0]


def _launch_backward(
    grad: Tensor, w: Tensor, scale: Tensor, zero_point: Tensor | None, spec: QuantSpec
) -> tuple[Tensor, Tensor]:
    launch = fake_quant_launch.launch
    return launch("learned", w, spec, w.dtype, grad=grad, scale=scale, zero_point=zero_point)


def _forward(
    w: Tensor, scale: Tensor, zero_point: Tensor | None, spec: QuantSpec, out_dtype: torch.dtype
) -> Tensor:
    """w_hat [..., N, K] in out_dtype."""
    check = functools.partial(self_test, False)
    if w.is_cuda and use_kernel("learned", w, spec, out_dtype, check):
        return _launch_forward(w, scale, zero_point, spec, out_dtype)
    out = torch.empty(w.shape, dtype=out_dtype, device=w.device)
    for _, w_g, scale_g, zero_g, out_g in _chunks(w, w, scale, zero_point, out, spec):
        codes = numerics._codes(w_g, scale_g, zero_g, spec, torch.empty_like(w_g))
        out_g.copy_(codes.sub_(zero_g).mul_(scale_g))
    return out


def _backward(
    grad: Tensor, w: Tensor, scale: Tensor, zero_point: Tensor | None, spec: QuantSpec
) -> tuple[Tensor, Tensor]:
    """Gradients of w, in its dtype, and of the scale, in its own."""
    check = functools.partial(self_test, True)
    if w.is_cuda and use_kernel("learned backward", w, spec, grad.dtype, check):
        grad_w, grad_scale = _launch_backward(grad, w, scale, zero_point, spec)
    else:
        grad_w, grad_scale = learned_gradients(grad, w, scale, zero_point, spec)
    return grad_w, grad_scale.to(scale.dtype)


def learned_gradients(
    grad: Tensor, w: Tensor, scale: Tensor, zero_point: Tensor | None, spec: QuantSpec
) -> tuple[Tensor, Tensor]:
    """Gradients of `fake_quantize_learned` in torch: the kernel's reference, and the CPU's path.

    grad and w [..., N, K], scale and zero_point [..., N, G]; returns the gradient of w in w's dtype
    and that of scale in fp32.
    """
    out = torch.empty(w.shape, dtype=w.dtype, device=w.device)
    sums = []
    for grad_g, w_g, scale_g, zero_g, out_g in _chunks(grad, w, scale, zero_point, out, spec):
        t = w_g / scale_g
        shifted = t + zero_g
        inside = torch.clamp(shifted, spec.q_min - 0.5, spec.q_max + 0.5).eq_(shifted)
        codes = numerics._codes(w_g, scale_g, zero_g, spec, shifted).sub_(zero_g)
        # not inside * t: far outside t can be infinite
        codes.sub_(t.masked_fill_(inside == 0, 0.0))
        grad_g = grad_g.to(torch.float32)
        out_g.copy_(inside.mul_(grad_g))
        sums.append(codes.mul_(grad_g).sum(-1))
    total = torch.cat(sums) if sums else torch.empty(0, device=w.device)
    if spec.granularity == "tensor":
        total = total.reshape(*scale.shape[:-2], -1, 1).sum(-2, keepdim=True)
    shared = w.numel() // max(scale.numel(), 1)
    return out, total.reshape(scale.shape).mul_((max(shared, 1) * spec.q_max) ** -0.5)


def _chunks(
    grad: Tensor, w: Tensor, scale: Tensor, zero_point: Tensor | None, out: Tensor, spec: QuantSpec
) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor, Tensor]]:
    """(grad, w fp32, scale, zero, out), [r, G, g] and [r, G, 1], in chunks that fit the cache."""
    if not w.numel():
        return
    *leading, n, k = w.shape
    group = spec.group_of(k)
    rounded = round_scale(scale.detach().to(torch.float32), spec)
    zero = torch.zeros_like(rounded) if zero_point is None else zero_point.to(torch.float32)
    rows = [tensor.detach().reshape(-1, k // group, group) for tensor in (grad, w)]
    rows += [t.expand(*leading, n, k // group).reshape(-1, k // group, 1) for t in (rounded, zero)]
    rows.append(out.view(-1, k // group, group))
    step = max(1, numerics.CHUNK_ELEMENTS // k) if w.device.type == "cpu" else len(rows[0])
    for start in range(0, len(rows[0]), step):
        grad_g, w_g, scale_g, zero_g, out_g = (tensor[start : start + step] for tensor in rows)
        yield grad_g, w_g.to(torch.float32), scale_g, zero_g, out_g


def self_test(
    backward: bool,
    spec: QuantSpec,
    group: int,
    dtype: torch.dtype,
    other: torch.dtype,
    device: torch.device,
) -> bool:
    """Whether the kernel's values on ``device`` equal the reference's on the CPU.

    The weights are multiples of a quarter step and the gradients small integers, so that every
    partial sum of the scale's gradient is exact. ``other`` is the result's or the gradient's dtype.
    """
    spec = replace(spec, granularity="channel")
    generator = torch.Generator().manual_seed(1)
    shape = (2 * fake_quant_launch.tile(group).rows + 3, group)
    grad = torch.randint(-2, 3, shape, generator=generator).to(other)
    row = torch.arange(shape[0])[:, None] % 5
    scale = torch.exp2(row - 3.0)
    zero_point = None if spec.symmetric else row.to(torch.int8) - 2
    w = torch.randint(-40, 40, shape, generator=generator).to(dtype) * (scale / 4).to(dtype)
    moved_zero = None if zero_point is None else zero_point.to(device)
    moved = (w.to(device), scale.to(device), moved_zero)
    if not backward:
        value = _launch_forward(*moved, spec, other)
        return torch.equal(value.cpu(), reference(w, spec, scale, zero_point, other))
    got = _launch_backward(grad.to(device), *moved, spec)
    expected = learned_gradients(grad, w, scale, zero_point, spec)
    return all(torch.equal(a.cpu(), b) for a, b in zip(got, expected))


@torch.library.custom_op("qat_kernels::fake_quantize_learned", mutates_args=())
def fake_quantize_learned_op(
    w: Tensor, scale: Tensor, zero_point: Tensor | None, spec: str, out_dtype: torch.dtype
) -> Tensor:
    """The operator behind `fake_quantize_learned`."""
    return _forward(w, scale, zero_point, decode(spec), out_dtype)


@torch.library.custom_op("qat_kernels::fake_quantize_learned_backward", mutates_args=())
def fake_quantize_learned_backward_op(
    grad: Tensor, w: Tensor, scale: Tensor, zero_point: Tensor | None, spec: str
) -> tuple[Tensor, Tensor]:
    """The gradients of `fake_quantize_learned_op`."""
    return _backward(grad, w, scale, zero_point, decode(spec))


@fake_quantize_learned_op.register_fake
def _(
    w: Tensor, scale: Tensor, zero_point: Tensor | None, spec: str, out_dtype: torch.dtype
) -> Tensor:
    return w.new_empty(w.shape, dtype=out_dtype)


@fake_quantize_learned_backward_op.register_fake
def _(
    grad: Tensor, w: Tensor, scale: Tensor, zero_point: Tensor | None, spec: str
) -> tuple[Tensor, Tensor]:
    return w.new_empty(w.shape), scale.new_empty(scale.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.spec, _ = inputs
    ctx.save_for_backward(*tensors)


def _op_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    w, scale, zero_point = ctx.saved_tensors
    grads = fake_quantize_learned_backward_op(grad, w, scale, zero_point, ctx.spec)
    return *grads, None, None, None


fake_quantize_learned_op.register_autograd(_op_backward, setup_context=_save)


class _FakeQuantizeLearned(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, w: Tensor, scale: Tensor, zero: Tensor | None, spec: QuantSpec, dtype: torch.dtype
    ) -> Tensor:
        ctx.save_for_backward(w, scale, zero)
        ctx.spec = spec
        return _forward(w, scale, zero, spec, dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        w, scale, zero_point = ctx.saved_tensors
        grad_w, grad_scale = _backward(grads[0], w, scale, zero_point, ctx.spec)
        return grad_w, grad_scale, None, None, None


def fake_quantize_learned(
    w: Tensor,
    scale: Tensor,
    spec: QuantSpec,
    zero_point: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """Fake-quantized weight with a given scale, which may be a parameter (learned step size, LSQ).

    The scale is rounded to the portable grid (`numerics.round_scale`) before it is used, and its
    gradient passes that rounding unchanged: the exported scale is the trained one.

    Args:
        w: [..., N, K], any float dtype, any strides.
        scale: [..., N, G] float (channel: G = 1; tensor: [..., 1, 1]); negative ones are allowed.
        spec: bits, symmetry, granularity and scale dtype; its grid is not read.
        zero_point: int8 of the shape of scale, fixed, for asymmetric specs, else None.
        out_dtype: dtype of the result (default: w's); the fp32 values are rounded to it once.

    Raises:
        ValueError: as `fake_quantize_ste`, or scale and zero_point do not fit the weight.
    """
    dtype = float_dtype(w, out_dtype)
    check_weight(w.shape, w.dtype, spec)
    _check_scale(w, scale, zero_point, spec)
    if not is_plain(w):
        operator: Callable[..., Tensor] = fake_quantize_learned_op
        return operator(w, scale, zero_point, encode(spec), dtype)
    run: Callable[..., Tensor] = _FakeQuantizeLearned.apply
    return run(w, scale, zero_point, spec, dtype)
