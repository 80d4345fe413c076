"""A frozen 4-bit linear layer with a LoRA adapter, in one operator.

Equation, with W_hat as in `nf4`, and A, B rounded to the dtype of x::

    t = round(x A^T)              y = x W_hat^T + bias + s t B^T

    grad_t = s grad_y B           grad_x = grad_y W_hat + grad_t A
    grad_A = grad_t^T x           grad_B = s grad_y^T t

Shape legend: M rows of activations, N output features, K input features, R rank.
``x_MK, a_RK, b_NR, t_MR, bias_N, y_MN``.

y is written once on the fused path of `nf4.choose`: the kernel adds s t B^T to its fp32 sums, and
one rounding ends it. On the others the adapter is accumulated into the base's y by one matmul
(``addmm`` with beta = 1): y is rounded twice. Separate layers write y three times (base, adapter,
sum) and round it at each. The paths are those of `nf4`, decided by phase.

Source: Hu et al., LoRA (arXiv:2106.09685); Dettmers et al., QLoRA (arXiv:2305.14314).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from qat_kernels import nf4_launch
from qat_kernels.nf4 import (
    check_linear,
    fuses,
    linear_4bit_backward_op,
    linear_4bit_op,
)
from qat_kernels.nf4_numerics import Packed4bit, Spec4bit, unpack

__all__ = ["linear_4bit_lora", "reference"]


def reference(
    x: Tensor,
    weight_NK: Tensor,
    a_RK: Tensor,
    b_NR: Tensor,
    scaling: float,
    bias_N: Tensor | None = None,
) -> Tensor:
    """The definition: all in fp32 but t, which is rounded to the dtype of x, as is the result.

    Args:
        x: [..., K], any float dtype.
        weight_NK: W_hat in the dtype of x (`nf4.dequantize_4bit`).
        a_RK: rounded to the dtype of x.
        b_NR: rounded to the dtype of x.
        scaling: s.
        bias_N: rounded to the dtype of x, or None.
    """
    x32 = x.float()
    t = functional.linear(x32, a_RK.to(x.dtype).float()).to(x.dtype).float()
    y = functional.linear(x32, weight_NK.float())
    y = y + scaling * functional.linear(t, b_NR.to(x.dtype).float())
    return (y if bias_N is None else y + bias_N.to(x.dtype).float()).to(x.dtype)


@torch.library.custom_op("qat_kernels::linear_4bit_lora", mutates_args=())
def linear_4bit_lora_op(
    x: Tensor,
    a_RK: Tensor,
    b_NR: Tensor,
    packed: Sequence[Tensor],
    bias: Tensor | None,
    scaling: float,
    quant_type: str,
    block_size: int,
    weight_dtype: torch.dtype,
) -> Tensor:
    """The operator behind `linear_4bit_lora`: x [..., K] -> [..., N] in x's dtype."""
    n, k = b_NR.shape[0], x.shape[-1]
    x_MK = x.reshape(-1, k)
    # the dtype of x decides; autocast was for the caller to apply
    with torch.autocast(x.device.type, enabled=False):
        t_MR = x_MK @ a_RK.to(x.dtype).T
        tensors, spec = unpack(packed, quant_type, block_size)
        if fuses(x, spec, n, weight_dtype, adapter=True):
            bias_N = None if bias is None else bias.to(x.dtype)
            adapter = nf4_launch.Adapter(t_MR, b_NR, scaling)
            y_MN = nf4_launch.matmul(x_MK, tensors, spec, n, bias_N, adapter)
        else:
            y = linear_4bit_op(x, packed, bias, quant_type, block_size, n, weight_dtype)
            y_MN = y.view(-1, n).addmm_(t_MR, b_NR.to(x.dtype).T, alpha=scaling)
    return y_MN.view(*x.shape[:-1], n)


@linear_4bit_lora_op.register_fake
def _(
    x: Tensor,
    a_RK: Tensor,
    b_NR: Tensor,
    packed: Sequence[Tensor],
    bias: Tensor | None,
    scaling: float,
    quant_type: str,
    block_size: int,
    weight_dtype: torch.dtype,
) -> Tensor:
    return x.new_empty((*x.shape[:-1], b_NR.shape[0]))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, a_RK, b_NR, packed, bias, scaling, *options = inputs
    ctx.save_for_backward(x, a_RK, b_NR, *packed)
    ctx.bias_dtype = None if bias is None else bias.dtype
    ctx.scaling = scaling
    ctx.options = options


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    x, a_RK, b_NR, *packed = ctx.saved_tensors
    quant_type, block_size, weight_dtype = ctx.options
    need_x, need_a, need_b = ctx.needs_input_grad[:3]
    grad_x = grad_a = grad_b = grad_bias = None
    a, b = a_RK.to(x.dtype), b_NR.to(x.dtype)
    grad_MN, x_MK = grad.reshape(-1, b.shape[0]), x.reshape(-1, x.shape[-1])
    with torch.autocast(x.device.type, enabled=False):
        grad_t = grad_MN @ b * ctx.scaling
        if need_x:
            grad_x = linear_4bit_backward_op(
                grad_MN, packed, quant_type, block_size, x.shape[-1], weight_dtype
            )
            grad_x = torch.addmm(grad_x, grad_t, a).view(x.shape)
        if need_a:
            grad_a = (grad_t.T @ x_MK).to(a_RK.dtype)
        if need_b:
            # t again: a matmul of rank R, instead of a tensor kept
            grad_b = (grad_MN.T @ (x_MK @ a.T) * ctx.scaling).to(b_NR.dtype)
    if ctx.bias_dtype is not None and ctx.needs_input_grad[4]:
        grad_bias = grad_MN.sum(0, dtype=ctx.bias_dtype)
    return grad_x, grad_a, grad_b, [None] * len(packed), grad_bias, None, None, None, None


linear_4bit_lora_op.register_autograd(_backward, setup_context=_setup_context)


def linear_4bit_lora(
    x: Tensor,
    packed: Packed4bit,
    spec: Spec4bit,
    shape: Sequence[int],
    weight_dtype: torch.dtype,
    a_RK: Tensor,
    b_NR: Tensor,
    scaling: float,
    bias: Tensor | None = None,
) -> Tensor:
    """Return x W^T + bias + scaling (x A^T) B^T; see the module docstring.

    Differentiable in x, A, B, and in the bias if it requires a gradient; W is frozen, and
    dequantized again in the backward pass.

    Args:
        x: [..., K], any float dtype.
        packed: the weight.
        spec: how it was quantized.
        shape: (N, K).
        weight_dtype: W is rounded to this dtype (fp32, bf16 or fp16), then cast to that of x.
        a_RK: [R, K], any float dtype; rounded to that of x.
        b_NR: [N, R], likewise.
        scaling: the adapter's factor, alpha / R or the like.
        bias: [N], cast to the dtype of x, or None.

    Returns:
        [..., N] in the dtype of x, also under autocast.

    Raises:
        ValueError: shapes do not fit, x, A or B holds no floats, or they are on other devices.
    """
    tensors = check_linear(x, packed, spec, shape, bias)
    n, k = shape
    if a_RK.ndim != 2 or tuple(a_RK.shape[1:]) != (k,) or b_NR.shape != (n, a_RK.shape[0]):
        raise ValueError(
            f"A {tuple(a_RK.shape)} and B {tuple(b_NR.shape)} do not fit a weight {(n, k)}: "
            f"expected (R, {k}) and ({n}, R)"
        )
    for name, factor in (("A", a_RK), ("B", b_NR)):
        if not factor.is_floating_point() or factor.device != x.device:
            raise ValueError(f"{name} is {factor.dtype} on {factor.device}: floats on {x.device}")
    y: Tensor = linear_4bit_lora_op(
        x, a_RK, b_NR, tensors, bias, scaling, spec.quant_type, spec.block_size, weight_dtype
    )
    return y
