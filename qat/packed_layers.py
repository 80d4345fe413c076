"""The layers that stand in for ``nn.Linear`` when an artifact is served: weights stay packed.

Shapes: x [..., K], weight [N, K], y [..., N]. Both layers are for inference only.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional

from qat_kernels import QuantSpec
from qat_kernels.numerics import dequantize, fake_quantize_with, token_scale
from qat_kernels.w4a16 import PackedWeight, linear


class _QuantizedLinear(nn.Module):
    """What the quantized layers share: sizes, bias, and a stand-in for the weight."""

    def __init__(self, in_features: int, out_features: int, bias: Tensor | None) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.dtype = torch.float32
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)

    @property
    def weight(self) -> Tensor:
        """A meta tensor [N, K]: models ask a layer's weight for shape and dtype, not for values."""
        return torch.empty(self.out_features, self.in_features, dtype=self.dtype, device="meta")

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        """Refuse moves and casts: the packed form was made for one device and dtype."""
        probe = torch.empty(0, dtype=self.dtype, device=next(self.buffers()).device)
        moved = fn(probe)
        if moved.dtype != probe.dtype or moved.device != probe.device:
            raise RuntimeError(
                f"this layer was packed for {probe.dtype} on {probe.device}; "
                "load the artifact again with load_packed(..., dtype=, device=)"
            )
        return self

    def extra_repr(self) -> str:
        """Sizes, as nn.Linear prints them."""
        return f"{self.in_features}, {self.out_features}, bias={self.bias is not None}"


class PackedLinear(_QuantizedLinear):
    """y = x W^T + b with packed W: x [..., K] to [..., N], through `qat_kernels.w4a16.linear`."""

    codes: Tensor
    scale: Tensor
    zero_point: Tensor | None

    def __init__(self, weight: PackedWeight, bias: Tensor | None) -> None:
        super().__init__(weight.in_features, weight.out_features, bias)
        self.dtype = weight.dtype
        self.packed = weight
        # buffers, so that the model's memory is counted; not persistent, because this is not the
        # layout of the file
        self.register_buffer("codes", weight.codes, persistent=False)
        self.register_buffer("scale", weight.scale, persistent=False)
        self.register_buffer("zero_point", weight.zero_point, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """The layer's output [..., N] in the dtype of x."""
        return linear(x, self.packed, self.bias)

    def extra_repr(self) -> str:
        """Sizes, stored bits and the path that runs."""
        return f"{super().extra_repr()}, bits={self.packed.bits}, path={self.packed.path}"


class Int8Linear(_QuantizedLinear):
    """y = x_hat W^T + b with int8 codes of W [N, K] and int8 inputs (reference arithmetic).

    x_hat is x rounded to int8 per token (absmax / 127.5, any shape of x) or with the static
    ``input_scale``; in fp32 that is what compressed-tensors computes. Without an input spec x is
    left as it is. The weight is dequantized in each call.
    """

    codes: Tensor
    scale: Tensor
    zero_point: Tensor | None
    input_scale: Tensor | None

    def __init__(
        self,
        codes_NK: Tensor,
        scale: Tensor,
        zero_point: Tensor | None,
        input_scale: Tensor | None,
        input_spec: QuantSpec | None,
        bias: Tensor | None,
        dtype: torch.dtype,
    ) -> None:
        super().__init__(codes_NK.shape[1], codes_NK.shape[0], bias)
        self.dtype = dtype
        self.input_spec = input_spec
        self.register_buffer("codes", codes_NK, persistent=False)
        self.register_buffer("scale", scale, persistent=False)
        self.register_buffer("zero_point", zero_point, persistent=False)
        self.register_buffer("input_scale", input_scale, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """The layer's output [..., N] in the dtype of x."""
        if self.input_spec is not None:
            scale = token_scale(x) if self.input_scale is None else self.input_scale
            x = fake_quantize_with(x, scale, self.input_spec)[0].to(x.dtype)
        weight_NK = dequantize(self.codes, self.scale, self.zero_point).to(x.dtype)
        return functional.linear(x, weight_NK, self.bias)
