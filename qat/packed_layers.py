"""The layers that stand in for ``nn.Linear`` when an artifact is served: weights stay packed.

Shapes: x [..., K], weight [N, K], y [..., N]. All layers are for inference only.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from qat_kernels import w4a16_cpu, w8a8
from qat_kernels.w4a16 import PackedWeight, linear
from qat_kernels.w8a8 import InputReuse, PackedInt8


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
    high: Tensor | None

    def __init__(self, weight: PackedWeight, bias: Tensor | None) -> None:
        super().__init__(weight.in_features, weight.out_features, bias)
        self.dtype = weight.dtype
        self.packed = weight
        # buffers, so that the model's memory is counted; not persistent, because this is not the
        # layout of the file
        for name in ("codes", "scale", "zero_point", "high"):
            self.register_buffer(name, getattr(weight, name), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """The layer's output [..., N] in the dtype of x."""
        return linear(x, self.packed, self.bias)

    def extra_repr(self) -> str:
        """Sizes, stored bits and the path that runs."""
        return f"{super().extra_repr()}, bits={self.packed.bits}, path={self.packed.path}"


class Int8Linear(_QuantizedLinear):
    """y = x_hat W^T + b with int8 codes of W and int8 inputs, through `qat_kernels.w8a8.linear`.

    x_hat is x [..., K] rounded to int8 per token (absmax / 127.5) or with a static scale. In fp32
    the result is what compressed-tensors computes. Layers with the same ``reuse`` quantize an input
    that they share once.
    """

    def __init__(
        self, weight: PackedInt8, bias: Tensor | None, reuse: InputReuse | None = None
    ) -> None:
        super().__init__(weight.in_features, weight.out_features, bias)
        self.dtype = weight.dtype
        self.packed = weight
        self.reuse = reuse
        self._register()

    def _register(self) -> None:
        for name in ("codes", "scale", "zero_point", "input_scale"):
            self.register_buffer(name, getattr(self.packed, name), persistent=False)

    def __getstate__(self) -> dict[str, Any]:
        """Without the buffers: those of oneDNN cannot be copied, and ``packed`` knows how to be."""
        return {**self.__dict__, "_buffers": {}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._register()

    def forward(self, x: Tensor) -> Tensor:
        """The layer's output [..., N] in the dtype of x."""
        return w8a8.linear(x, self.packed, self.bias, self.reuse)

    def extra_repr(self) -> str:
        """Sizes, the kind of inputs and the path that runs."""
        inputs = "dynamic" if self.packed.input_scale is None else "static"
        return f"{super().extra_repr()}, inputs={inputs}, path={self.packed.path}"


class KeptLinear(nn.Linear):
    """A 16-bit ``nn.Linear`` on the CPU whose rows do not depend on how many there are.

    ATen multiplies a single row by another routine (gemv) than several, and rounds differently:
    0.05 % of bf16 outputs changed. So a single row is computed as one of two. Where even that
    depends on their number (`rows_agree`), all rows go by `w4a16_cpu.linear_by_tiles`.
    """

    def __init__(self, linear: nn.Linear) -> None:
        # not Linear.__init__: it would allocate a second weight
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = linear.weight, linear.bias
        self.tiled = not self.rows_agree()
        self.train(linear.training)

    @torch.no_grad()
    def rows_agree(self) -> bool:
        """Whether 2, 5 and 33 rows give the same bits, on this machine and for this weight."""
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(33, self.in_features, generator=generator).to(self.weight.dtype)
        y = functional.linear(x, self.weight, self.bias)
        return all(
            torch.equal(functional.linear(x[:m], self.weight, self.bias), y[:m]) for m in (2, 5)
        )

    def forward(self, x: Tensor) -> Tensor:
        """The layer's output [..., N] in the dtype of x."""
        rows = x.numel() // self.in_features
        if rows == 0:
            return x.new_empty(*x.shape[:-1], self.out_features)
        if self.tiled:
            return w4a16_cpu.linear_by_tiles(x, self.weight, self.bias)
        if rows > 1:
            return functional.linear(x, self.weight, self.bias)
        both = functional.pad(x.reshape(1, -1), (0, 0, 0, 1))
        return functional.linear(both, self.weight, self.bias)[:1].view(*x.shape[:-1], -1)
