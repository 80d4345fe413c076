"""LoRA layers that compute in either of two ways, with one set of parameters.

    plain     y = x W4^T + s (drop(x) A^T) B^T        W4: the frozen base, NF4 or 16 bit
    merged    y = x Q(W')^T,   W' = W + s (B A - B0 A0)    Q: fake-quantization of the scheme

Plain is LoRA (Hu et al., arXiv:2106.09685) on a frozen 4-bit base, QLoRA (Dettmers et al.,
arXiv:2305.14314), computed by PEFT. Merged is what will be shipped: the same quantizer as in
quantization-aware training, applied to the merged weight, with the straight-through gradient into
A and B. A model trained to its end in the merged form loses nothing when it is converted, because
conversion packs just these codes. W is the original 16-bit weight, read from disk in each pass, or
the dequantized base where there is none. B0 A0 is what the initialisation moved from the base into
the adapter (PiSSA, OLoRA, LoftQ), else zero. DoRA (Liu et al., arXiv:2402.09353):
W' = m / ||W + s B A||  (W + s B A), the norm per output row, a constant for the gradient.

Dropout perturbs only the adapter: merged adds s B A (drop(x) - x), which is zero in eval mode (and
under DoRA too, without the factor m / ||W'||, which is close to one).

Shapes: x [..., K], W [N, K], A [r, K], B [N, r], m [N].
"""

from collections.abc import Callable
from typing import Any

import torch
from peft import LoraConfig
from peft.tuners.lora.layer import Linear as PeftLoraLinear
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from qat.errors import UserError
from qat.fake_quant import InputFakeQuant, WeightFakeQuant, WeightRound
from qat.linear_4bit import Linear4bit
from qat.scheme import InputSpec, ObserverConfig
from qat_kernels import QuantSpec

ADAPTER = "default"
"""PEFT's name of the one adapter."""


class MergedLinear(nn.Module):
    """What both layers below share: the weight of the merged form and the quantizers on it.

    Subclasses hold `base_layer` (its bias is theirs), and define `update` if they change W.
    """

    base_layer: nn.Linear
    weight_fake_quant: WeightFakeQuant | WeightRound
    input_fake_quant: InputFakeQuant | None
    master: Callable[[], Tensor]
    """Gives W [N, K], any float dtype; see `qat.original.Master`."""

    def merge_with(
        self,
        master: Callable[[], Tensor],
        weight: QuantSpec | None,
        inputs: InputSpec | None,
        observer: ObserverConfig,
        keep_dtype: torch.dtype,
    ) -> None:
        """Say how the merged form is made.

        Args:
            master: gives W.
            weight: quantizes W'; None rounds it to ``keep_dtype``.
            inputs: quantizes x in the merged form, or None.
            observer: ranges of static input quantization.
            keep_dtype: dtype of what is not quantized.
        """
        self.master = master
        self.weight_fake_quant = WeightFakeQuant(weight) if weight else WeightRound(keep_dtype)
        self.weight_fake_quant.enable(False)
        self.input_fake_quant = None if inputs is None else InputFakeQuant(inputs, observer)
        if self.input_fake_quant is not None:
            self.input_fake_quant.enable(False)

    @property
    def bias(self) -> Tensor | None:
        """The base layer's bias [N]."""
        return self.base_layer.bias

    def update(self, w: Tensor) -> Tensor:
        """W' [N, K] of an fp32 W [N, K]: W itself."""
        return w

    def merged_weight(self) -> Tensor:
        """W' [N, K] in fp32, differentiable in the adapter's parameters."""
        device = self.weight_fake_quant.enabled.device
        # a matmul of A and B in lower precision would move codes
        with torch.autocast(device.type, enabled=False):
            return self.update(self.master().to(device).float())

    def merged_forward(self, x: Tensor) -> Tensor:
        """Y [..., N] of the merged form; only x is kept for the backward pass."""
        if self.input_fake_quant is not None:
            x = self.input_fake_quant(x)
        if not torch.is_grad_enabled():
            return self._multiply(x)
        # W' and Q(W') are made again in the backward pass: a layer at a time, never all of them
        y: Tensor = checkpoint(self._multiply, x, use_reentrant=False, preserve_rng_state=False)
        return y

    def _multiply(self, x: Tensor) -> Tensor:
        weight = self.weight_fake_quant(self.merged_weight())
        if not torch.is_autocast_enabled(x.device.type):
            weight = weight.to(x.dtype)
        bias = self.bias
        return functional.linear(x, weight, None if bias is None else bias.to(weight.dtype))

    @property
    def computes_merged(self) -> bool:
        """Whether the layer computes in the merged form."""
        return self.weight_fake_quant.active


class FrozenLinear(MergedLinear):
    """A frozen layer without an adapter: its merged form is Q(W)."""

    def __init__(self, base_layer: nn.Linear) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.in_features, self.out_features = base_layer.in_features, base_layer.out_features

    @property
    def weight(self) -> Tensor:
        """The base layer's weight, for code that asks a Linear for its dtype or device."""
        return self.base_layer.weight

    def forward(self, x: Tensor) -> Tensor:
        """Y = x W4^T + b or x Q(W)^T + b, [..., N]."""
        if self.computes_merged:
            return self.merged_forward(x)
        y: Tensor = self.base_layer(x)
        return y


class LoraLinear(PeftLoraLinear, MergedLinear):
    """PEFT's LoRA layer with the merged form beside its own.

    Args:
        base_layer: an nn.Linear that holds the 16-bit weight; the caller replaces it by the 4-bit
            one. Initialisations that take from the base change its weight.
        config: PEFT's configuration: rank, alpha, dropout, rsLoRA, DoRA, initialisation.
    """

    # PEFT's, which are untyped
    lora_A: Any  # noqa: N815
    lora_B: Any  # noqa: N815
    lora_dropout: Any
    lora_magnitude_vector: Any
    lora_alpha: dict[str, float]
    scaling: dict[str, float]
    use_rslora: dict[str, bool]

    initial_a: Tensor | None
    initial_b: Tensor | None

    def __init__(self, base_layer: nn.Linear, config: LoraConfig) -> None:
        super().__init__(
            base_layer, ADAPTER, config=config, r=config.r, lora_alpha=config.lora_alpha
        )
        for name in ("initial_a", "initial_b"):
            self.register_buffer(name, None, persistent=False)

    @property
    def factors(self) -> tuple[Tensor, Tensor]:
        """(A [r, K], B [N, r])."""
        return self.lora_A[ADAPTER].weight, self.lora_B[ADAPTER].weight

    @property
    def magnitude(self) -> Tensor | None:
        """DoRA's m [N], or None."""
        if ADAPTER not in self.lora_magnitude_vector:
            return None
        weight: Tensor = self.lora_magnitude_vector[ADAPTER].weight
        return weight

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Merge into a 16-bit base as PEFT does; a 4-bit base refuses.

        Raises:
            UserError: the base is 4-bit: rounding to its own codes would swallow the update.
        """
        if isinstance(self.base_layer, Linear4bit):
            raise UserError(
                "an adapter is not merged into a 4-bit base in place: rounding to the base's codes "
                "swallows most of a small update (of the gain of one whose norm is 2.8 % of the "
                "weights', 12 % was left). Add it to the original 16-bit weights and quantize "
                "once, as the artifact of a run is made, or write outputs=[merged]"
            )
        super().merge(safe_merge, adapter_names)

    def remember_initial(self) -> None:
        """Keep A0 and B0, because the initialisation took s B0 A0 from the base."""
        a, b = (factor.detach().clone() for factor in self.factors)
        self.initial_a, self.initial_b = a, b

    def update(self, w: Tensor) -> Tensor:
        """W' of an fp32 W; see the module docstring."""
        a, b = (factor.float() for factor in self.factors)
        delta = b @ a
        if self.initial_a is not None and self.initial_b is not None:
            delta = delta - self.initial_b.float() @ self.initial_a.float()
        value = w + delta * self.scaling[ADAPTER]
        if self.magnitude is None:
            return value
        scale: Tensor = self.magnitude.float() / value.detach().norm(dim=1)
        return scale[:, None] * value

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Plain by PEFT (by one operator where `_fuses`), or merged; [..., N]."""
        if not self.computes_merged:
            base = self.base_layer
            if isinstance(base, Linear4bit) and not (args or kwargs) and self._fuses(x):
                return base.adapted(x, *self.factors, self.scaling[ADAPTER])
            y: Tensor = super().forward(x, *args, **kwargs)
            return y
        y = self.merged_forward(x)
        dropout = self.lora_dropout[ADAPTER]
        if self.training and not isinstance(dropout, nn.Identity):
            y = y + self._noise(dropout(x) - x).to(y.dtype)
        return y

    def _fuses(self, x: Tensor) -> bool:
        """Whether one operator computes the plain form: vanilla LoRA without dropout, on a GPU.

        The adapter's matmuls must be in the dtype of x, as PEFT's are where they are cast anyway.
        """
        a, b = self.lora_A[ADAPTER], self.lora_B[ADAPTER]
        identity = isinstance(self.lora_dropout[ADAPTER], nn.Identity)
        return (
            x.is_cuda
            and (identity or not self.training)
            and not (self.disable_adapters or self.merged or self.lora_variant)
            and self.active_adapters == [ADAPTER]
            and (a.bias is None and b.bias is None)
            and (torch.is_autocast_enabled("cuda") or a.weight.dtype == x.dtype)
        )

    def _noise(self, x: Tensor) -> Tensor:
        """What dropout adds: the adapter's answer to the difference that it makes to x."""
        a, b = self.lora_A[ADAPTER], self.lora_B[ADAPTER]
        y: Tensor = b(a(x.to(a.weight.dtype))) * self.scaling[ADAPTER]
        return y
