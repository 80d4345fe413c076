"""Fake-quantization with a straight-through estimator: the training-time view of the quantizer.

    forward   w_hat = dequantize(quantize(w))
    backward  dL/dw = dL/dw_hat  where  (q_min - 1/2) <= w / s + z <= (q_max + 1/2),  else 0

No gradient flows through a computed scale. Shapes: w_NK [..., N, K]. The estimator is that of
Bengio et al., arXiv:1308.3432, with the clipping mask of Jacob et al., arXiv:1712.05877.
"""

from typing import Any

import torch
from torch import Tensor

from qat_kernels.numerics import QuantSpec, clip_gradient, fake_quantize, fake_quantize_with


class _FakeQuantize(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, w: Tensor, spec: QuantSpec, out_dtype: torch.dtype) -> Tensor:
        ctx.save_for_backward(w)
        ctx.spec = spec
        return fake_quantize(w, spec, out_dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (w,) = ctx.saved_tensors
        return clip_gradient(grads[0].to(w.dtype), w, ctx.spec), None, None


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


def fake_quantize_ste(w: Tensor, spec: QuantSpec, out_dtype: torch.dtype | None = None) -> Tensor:
    """Fake-quantized weight with the straight-through gradient; only w is saved for backward.

    Args:
        w: [..., N, K], any float dtype.
        spec: how to quantize; the scale is computed from w.
        out_dtype: dtype of the result (default: w's); the fp32 values are rounded to it once.
    """
    result: Tensor = _FakeQuantize.apply(w, spec, out_dtype or w.dtype)  # type: ignore[no-untyped-call]
    return result


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
