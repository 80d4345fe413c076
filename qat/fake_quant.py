"""Modules that make a network compute with quantized weights and inputs while it trains.

- `FakeQuantLinear` stands in for an ``nn.Linear`` and shares its parameters.
- `WeightFakeQuant` is the weight's quantizer; weights that do not belong to an ``nn.Linear``
  (3-D experts, subclasses of Linear) get it as a `torch.nn.utils.parametrize` parametrization,
  which leaves the owner's forward as it is.
- `RoundTo` is the parametrization of everything that is kept: the forward pass sees it in the
  dtype in which it will be saved. `TrainedRows` lets some rows of a frozen matrix train.

Shapes: x [..., K], weight [N, K] or [E, N, K].
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import parametrize

from qat.errors import UserError
from qat.observers import RangeObserver
from qat.scheme import ObserverConfig
from qat_kernels import QuantSpec
from qat_kernels.fake_quant import (
    fake_quantize_activation_ste,
    fake_quantize_ste,
    round_to_ste,
)
from qat_kernels.numerics import token_scale


class Quantizer(nn.Module):
    """Base of the fake quantizers: a switch that lives in a buffer, mirrored for the forward pass.

    The mirror spares each forward a synchronization with the device.
    """

    enabled: Tensor

    def __init__(self) -> None:
        super().__init__()
        self._active = True
        self.register_buffer("enabled", torch.ones((), dtype=torch.bool))
        self.register_load_state_dict_post_hook(_mirror)  # type: ignore[no-untyped-call]

    @property
    def active(self) -> bool:
        """Whether quantization is on."""
        return self._active

    def enable(self, on: bool | Tensor) -> None:
        """Switch quantization on or off."""
        self._active = bool(on)
        self.enabled.fill_(self._active)


def _mirror(module: nn.Module, incompatible_keys: Any) -> None:
    """After loading a state dict: the switch's mirror follows its buffer."""
    assert isinstance(module, Quantizer)
    module.enable(module.enabled)


class WeightFakeQuant(Quantizer):
    """Fake-quantizes a weight [..., N, K], in fp32, with the straight-through gradient."""

    def __init__(self, spec: QuantSpec) -> None:
        super().__init__()
        self.spec = spec

    def forward(self, w: Tensor) -> Tensor:
        """The weight that the layer multiplies with; under autocast in the autocast dtype."""
        if not self._active:
            return w
        dtype = w.dtype
        if torch.is_autocast_enabled(w.device.type):
            # the matmul would cast it anyway: rounding here saves a pass and a copy
            dtype = torch.get_autocast_dtype(w.device.type)
        return fake_quantize_ste(w, self.spec, dtype)


class WeightRound(Quantizer):
    """Stands where a `WeightFakeQuant` would, for a weight that is shipped in 16 bit."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype

    def forward(self, w: Tensor) -> Tensor:
        """The weight rounded to ``dtype``, in w's dtype; the gradient passes unchanged."""
        return round_to_ste(w, self.dtype) if self._active else w


class InputFakeQuant(Quantizer):
    """Fake-quantizes a layer's input: dynamic int8 per token, or static with an observer."""

    def __init__(self, spec: QuantSpec, observer: ObserverConfig) -> None:
        super().__init__()
        self.spec = spec
        self.observer = None if spec.dynamic else RangeObserver(observer)
        self.calibrating = False

    def forward(self, x: Tensor) -> Tensor:
        """X [..., K] as the quantized layer sees it; while calibrating, x is only observed."""
        if self.observer is not None and (self.training or self.calibrating):
            self.observer.observe(x)
        if self.calibrating or not self._active:
            return x
        if self.spec.dynamic and x.ndim != 3:
            # compressed-tensors reduces over all but the first two axes: the rows of a [T, K] input
            # would share one scale there, and a token's result would depend on its neighbours
            raise UserError(
                f"scheme.input.dynamic=true: a layer of this model gets inputs of {x.ndim} axes, "
                "not [batch, token, feature], and readers would not quantize them per token. Use "
                "dynamic=false granularity=tensor, or keep these layers by a rule"
            )
        return fake_quantize_activation_ste(x, self.scale(x), self.spec)

    def scale(self, x: Tensor | None = None) -> Tensor:
        """fp32 scale: scalar for static, [..., 1] for dynamic (which needs x)."""
        if self.observer is not None:
            return self.observer.scale(self.spec)
        assert x is not None
        return token_scale(x)


class FakeQuantLinear(nn.Linear):
    """An ``nn.Linear`` with its weight (shared) and, where asked, its input fake-quantized."""

    def __init__(
        self,
        linear: nn.Linear,
        weight: QuantSpec,
        input_spec: QuantSpec | None,
        observer: ObserverConfig,
    ) -> None:
        # not Linear.__init__: it would allocate a second weight
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight = linear.weight
        self.bias = linear.bias
        self.weight_fake_quant = WeightFakeQuant(weight)
        self.input_fake_quant = None if input_spec is None else InputFakeQuant(input_spec, observer)
        self.train(linear.training)

    def forward(self, x: Tensor) -> Tensor:
        """Y = x_hat W_hat^T + b, [..., N]."""
        if self.input_fake_quant is not None:
            x = self.input_fake_quant(x)
        return functional.linear(x, self.weight_fake_quant(self.weight), self.bias)


class RoundTo(nn.Module):
    """Parametrization that shows a kept parameter rounded to the dtype in which it is saved.

    Args:
        dtype: the dtype.
        exact: the parameter is frozen and holds such values already: it passes without a copy.
    """

    def __init__(self, dtype: torch.dtype, exact: bool = False) -> None:
        super().__init__()
        self.dtype = dtype
        self.exact = exact

    def forward(self, x: Tensor) -> Tensor:
        """X rounded to ``dtype``, in x's dtype; the gradient passes unchanged."""
        return x if self.exact else round_to_ste(x, self.dtype)


class TrainedRows(nn.Module):
    """Parametrization of a frozen matrix [V, H] some rows of which are trained (new tokens).

    Args:
        rows: int64 [T], which ones.
        values: [T, H], what they start from.
    """

    rows: Tensor

    def __init__(self, rows: Tensor, values: Tensor) -> None:
        super().__init__()
        self.register_buffer("rows", rows, persistent=False)
        self.values = nn.Parameter(values)

    def forward(self, w: Tensor) -> Tensor:
        """W with the trained rows in place."""
        return w.index_copy(0, self.rows, self.values.to(w.dtype))


def parametrization_of(module: nn.Module, name: str) -> nn.Module | None:
    """The project's last parametrization of a parameter of ``module``, or None."""
    if parametrize.is_parametrized(module, name):
        parametrizations: Any = module.parametrizations
        added: nn.Module = parametrizations[name][-1]
        return added
    return None


def set_enabled(model: nn.Module, on: bool) -> None:
    """Switch all fake quantizers of a prepared model on or off."""
    for module in model.modules():
        if isinstance(module, Quantizer):
            module.enable(on)


def observers(model: nn.Module) -> list[RangeObserver]:
    """All observers of a prepared model, in module order."""
    return [module for module in model.modules() if isinstance(module, RangeObserver)]
