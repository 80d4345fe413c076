"""A frozen linear layer on a 4-bit weight, the base under an adapter.

Plain buffers behind an operator, and no parameter `weight`: nothing repacks them in eval mode (as
bitsandbytes' own layer does on CPUs with AVX512-BF16, which breaks its gradients and its saving),
no optimizer, checkpoint rule or FSDP wrapper meets a tensor subclass, and `torch.compile` sees one
opaque operator. The numerics are those of `qat_kernels.nf4`.
"""

from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor, nn

from qat_kernels.nf4 import (
    DTYPES,
    NESTED_BLOCK,
    Packed4bit,
    Spec4bit,
    check_packed,
    dequantize_4bit,
    linear_4bit,
    quantize_4bit,
)
from qat_kernels.nf4_lora import linear_4bit_lora

BUFFERS = ("codes", "absmax", "nested_absmax", "offset")
"""Names of the layer's buffers, which are the fields of `Packed4bit`."""


class Linear4bit(nn.Linear):
    """y = x @ W^T + bias with W [N, K] stored in 4 bits; only x (and a bias) has a gradient.

    Buffers, all in the state dict and never changed by ``.to(dtype)``, ``.half()`` and the like:
    ``codes`` uint8 [ceil(N * K / 2)], ``absmax`` fp32 [B], or uint8 [B] beside ``nested_absmax``
    fp32 [ceil(B / 256)] and ``offset`` fp32 [] under double quantization. The bias is a parameter
    that requires no gradient.

    Built from a weight (`from_weight`), without values (`meta`), or on quantized ones:

    Args:
        packed: the quantized weight, whose tensors become the buffers.
        spec: how it was quantized.
        shape: (N, K).
        dtype: dtype to which the dequantized weight is rounded (fp32, bf16 or fp16).
        bias: [N], or None.

    Raises:
        ValueError: ``packed`` does not fit spec and shape, or another dtype than the three.
    """

    codes: Tensor
    absmax: Tensor
    nested_absmax: Tensor | None
    offset: Tensor | None

    def __init__(
        self,
        packed: Packed4bit,
        spec: Spec4bit,
        shape: tuple[int, int],
        dtype: torch.dtype,
        bias: Tensor | None = None,
    ) -> None:
        check_packed(packed, spec, shape)
        if dtype not in DTYPES:
            raise ValueError(f"weight dtype {dtype}: float32, bfloat16 or float16")
        # not nn.Linear's: it would allocate the 16-bit weight
        nn.Module.__init__(self)
        self.out_features, self.in_features = shape
        self.spec = spec
        self.weight_dtype = dtype
        for name, tensor in zip(BUFFERS, packed):
            self.register_buffer(name, tensor)
        frozen = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)
        self.register_parameter("bias", frozen)

    @classmethod
    def from_weight(
        cls, w: Tensor, spec: Spec4bit, dtype: torch.dtype, bias: Tensor | None = None
    ) -> Self:
        """Quantize w [N, K] (fp32, bf16 or fp16).

        Args:
            w: the weight, on the device where the layer shall live.
            spec: how to quantize it.
            dtype: dtype to which the dequantized weight is rounded (fp32, bf16 or fp16).
            bias: [N], or None.

        Raises:
            ValueError: w is no matrix of such values, or holds NaN or infinity.
        """
        if w.ndim != 2:
            raise ValueError(f"a linear weight has two dimensions, got {tuple(w.shape)}")
        return cls(quantize_4bit(w, spec), spec, (w.shape[0], w.shape[1]), dtype, bias)

    @classmethod
    def meta(
        cls,
        in_features: int,
        out_features: int,
        spec: Spec4bit,
        dtype: torch.dtype,
        bias: bool = False,
    ) -> Self:
        """The layer without its values, on the meta device: for predictions and for loading."""
        numel = in_features * out_features
        blocks = spec.blocks(numel)
        stored = torch.uint8 if spec.double_quant else torch.float32
        nested = offset = None
        if spec.double_quant:
            nested = torch.empty(-(-blocks // NESTED_BLOCK), dtype=torch.float32, device="meta")
            offset = torch.empty((), dtype=torch.float32, device="meta")
        packed = Packed4bit(
            torch.empty((numel + 1) // 2, dtype=torch.uint8, device="meta"),
            torch.empty(blocks, dtype=stored, device="meta"),
            nested,
            offset,
        )
        bias_N = torch.empty(out_features, dtype=dtype, device="meta") if bias else None
        return cls(packed, spec, (out_features, in_features), dtype, bias_N)

    @property
    def packed(self) -> Packed4bit:
        """The buffers as one value."""
        return Packed4bit(self.codes, self.absmax, self.nested_absmax, self.offset)

    @property
    def shape(self) -> tuple[int, int]:
        """(N, K)."""
        return self.out_features, self.in_features

    # a parameter in nn.Linear; here it is computed, at each access, and cannot be assigned
    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """The dequantized weight [N, K] in ``weight_dtype``: a new, plain tensor."""
        return dequantize_4bit(self.packed, self.spec, self.shape, self.weight_dtype)

    def _operand(self, x: Tensor) -> tuple[Tensor, torch.dtype]:
        """(x in the dtype of the matmul, dtype that W is rounded to)."""
        device = x.device.type
        if device != "meta" and torch.is_autocast_enabled(device):
            x = x.to(torch.get_autocast_dtype(device))
        # fp32 rounded to x's dtype is what dequantizing to that dtype gives, without the fp32 copy
        return x, x.dtype if self.weight_dtype is torch.float32 else self.weight_dtype

    def forward(self, x: Tensor) -> Tensor:
        """Map x [..., K] to [..., N] in the dtype of x, or in autocast's where that is on."""
        x, dtype = self._operand(x)
        return linear_4bit(x, self.packed, self.spec, self.shape, dtype, self.bias)

    def adapted(self, x: Tensor, a: Tensor, b: Tensor, scaling: float) -> Tensor:
        """`forward` plus scaling (x A^T) B^T, in one operator; differentiable in x, A and B.

        Args:
            x: [..., K].
            a: A [R, K], any float dtype: computed in that of `forward`'s result.
            b: B [N, R], likewise.
            scaling: the adapter's factor.

        Raises:
            ValueError: shapes do not fit.
        """
        x, dtype = self._operand(x)
        return linear_4bit_lora(
            x, self.packed, self.spec, self.shape, dtype, a, b, scaling, self.bias
        )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        before: dict[str, Any] = {name: self._buffers[name] for name in BUFFERS}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, old in before.items():
            new = self._buffers[name]
            if old is not None and new is not None and new.dtype != old.dtype:
                # a cast would change the weight; only the move to another device is meant
                self._buffers[name] = old.to(new.device)
        return self

    def reset_parameters(self) -> None:
        """Do nothing: the layer is frozen."""

    def extra_repr(self) -> str:
        """What `print(model)` shows between the parentheses."""
        spec = self.spec
        double = ", double_quant" if spec.double_quant else ""
        return (
            f"{super().extra_repr()}, {spec.quant_type}, block_size={spec.block_size}{double}, "
            f"{self.weight_dtype}"
        )
