"""What a trained model ships: its weights as conversion and the check must see them.

The traversal knows both ways to train (a prepared model of `qat.prepare`, adapters of
`qat.adapters`) and gives original names, so that nobody after it needs to.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from qat.fake_quant import (
    FakeQuantLinear,
    InputFakeQuant,
    RoundTo,
    WeightFakeQuant,
    parametrization_of,
)
from qat.lora import MergedLinear


@dataclass(frozen=True)
class Quantized:
    """One quantized parameter of a trained model."""

    name: str
    """Name in the original model's state dict."""
    weight: Tensor
    """What gets quantized [..., N, K]: the master weight, or the merged one (fp32)."""
    quantizer: WeightFakeQuant
    """Its quantizer."""
    inputs: InputFakeQuant | None
    """The quantizer of the layer's input, or None."""


@torch.no_grad()
def quantized_parameters(model: nn.Module, active_only: bool = False) -> Iterator[Quantized]:
    """All quantized parameters of a model, in module order; merged weights are made one by one.

    Args:
        model: a prepared model or one with adapters.
        active_only: leave out adapters that compute in their plain form: nothing is quantized
            there yet, and merging all of them takes time.
    """
    for owner_name, owner in model.named_modules():
        if isinstance(owner, FakeQuantLinear):
            name, quantizer = f"{owner_name}.weight", owner.weight_fake_quant
            yield Quantized(name, owner.weight, quantizer, owner.input_fake_quant)
        elif isinstance(owner, MergedLinear):
            merged = owner.weight_fake_quant
            if isinstance(merged, WeightFakeQuant) and (merged.active or not active_only):
                name = f"{owner_name}.weight"
                yield Quantized(name, owner.merged_weight(), merged, owner.input_fake_quant)
        else:
            for name, original, added in _parametrized(owner):
                if isinstance(added, WeightFakeQuant):
                    yield Quantized(f"{owner_name}.{name}", original, added, None)


@torch.no_grad()
def kept_parameters(model: nn.Module) -> Iterator[tuple[str, Tensor, torch.dtype]]:
    """(original name, value, dtype to save) of all kept parameters; tied ones each time."""
    for owner_name, owner in model.named_modules():
        prefix = f"{owner_name.removesuffix('.base_layer')}." if owner_name else ""
        if isinstance(owner, MergedLinear) and not isinstance(
            owner.weight_fake_quant, WeightFakeQuant
        ):
            yield f"{prefix}weight", owner.merged_weight(), owner.weight_fake_quant.dtype
        for name, _, added in _parametrized(owner):
            if isinstance(added, RoundTo):
                yield f"{prefix}{name}", getattr(owner, name), added.dtype


def _parametrized(owner: nn.Module) -> Iterator[tuple[str, Tensor, nn.Module | None]]:
    """(name, master parameter, last parametrization) of a module's parametrized parameters."""
    if parametrize.is_parametrized(owner):
        parametrizations: Any = owner.parametrizations
        for name in parametrizations:
            yield name, parametrizations[name].original, parametrization_of(owner, name)
