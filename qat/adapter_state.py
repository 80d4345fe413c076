"""What training changes in a model with adapters, what it does not, and how large both are."""

import hashlib
from collections.abc import Iterator
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from qat.fake_quant import Quantizer, TrainedRows
from qat.linear_4bit import Linear4bit
from qat.lora import LoraLinear, MergedLinear
from qat.observers import RangeObserver
from qat.original import Master


def trained_state(model: nn.Module) -> set[str]:
    """Names in the state dict of what training changes: adapters, saved modules, observers."""
    names = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    for owner_name, owner in model.named_modules():
        if isinstance(owner, Quantizer | RangeObserver):
            names |= {f"{owner_name}.{leaf}" for leaf in owner._buffers}
    return names


def trained_modules(model: nn.Module) -> dict[str, Tensor]:
    """Original parameter name → value in fp32, of the modules that train as a whole."""
    return {
        f"{owner_name}.{leaf}": held.original.detach()
        for owner_name, owner in model.named_modules()
        for leaf, held in _held(owner)
        if held.original.requires_grad
    }


def trained_rows(model: nn.Module) -> dict[str, TrainedRows]:
    """Module name → its trained rows; of tied modules the first."""
    found: dict[int, tuple[str, TrainedRows]] = {}
    for owner_name, owner in model.named_modules():
        for _, held in _held(owner):
            if isinstance(held[0], TrainedRows):
                found.setdefault(id(held[0]), (owner_name, held[0]))
    return dict(found.values())


def _held(owner: nn.Module) -> list[tuple[str, Any]]:
    """(parameter's name, its parametrizations) of a module."""
    if not parametrize.is_parametrized(owner):
        return []
    parametrizations: Any = owner.parametrizations
    return list(parametrizations.items())


def _frozen(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """(name, value) of what training does not change, the initial factors included; by name."""
    changing = trained_state(model)
    found = dict([*model.named_parameters(), *model.named_buffers()])
    for name in sorted(found.keys() - changing):
        value = found[name]
        # in fp32, so that the storage dtype does not matter: the values are the same; one at a time
        yield name, value.float() if value.is_floating_point() else value


def _merged_onto(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """(name, value) of the weights on disk that adapters are merged onto, one at a time."""
    for name, module in model.named_modules():
        if isinstance(module, MergedLinear):
            master = module.master
            if not (isinstance(master, Master) and master.packed is not None):
                yield f"{name}.master", master()


def base_sha256(model: nn.Module) -> str:
    """Identity of the frozen base: sha256 (hex) over names, shapes and bytes of its tensors.

    The original weights belong to it: rounding to 4 bits hides small differences between them,
    and the merge at the end does not.
    """
    digest = hashlib.sha256()
    for name, value in chain(_frozen(model), _merged_onto(model)):
        digest.update(f"{name} {tuple(value.shape)}\n".encode())
        flat = value.detach().cpu().contiguous().reshape(-1)
        digest.update(flat.view(torch.uint8).numpy().data)
    return digest.hexdigest()


def codes_sha256(model: nn.Module) -> str:
    """Identity of the 4-bit codes and statistics alone, which `nf4/` holds as they are."""
    digest = hashlib.sha256()
    for name, module in model.named_modules():
        if isinstance(module, Linear4bit):
            for leaf, value in module.named_buffers():
                digest.update(f"{name}.{leaf} {tuple(value.shape)}\n".encode())
                digest.update(value.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def summary(model: nn.Module, keep: torch.dtype) -> str:
    """Two lines on base and adapters, for people."""
    layers = sum(isinstance(module, LoraLinear) for module in model.modules())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    total = sum(p.numel() for p in model.parameters() if not p.requires_grad)
    total += sum(
        m.in_features * m.out_features for m in model.modules() if isinstance(m, Linear4bit)
    )
    return (
        f"base: {base_bits(model, keep):.3f} bits per weight of its linear layers\n"
        f"adapters: {layers} layers; {trained:,} parameters train, {trained / total:.2%} of the "
        "model's"
    )


def base_bits(model: nn.Module, keep: torch.dtype) -> float:
    """Bits per weight of the base's linear layers, absmax values included."""
    bits = weights = 0.0
    for module in model.modules():
        if isinstance(module, MergedLinear):
            base = module.base_layer
            count = base.in_features * base.out_features
            weights += count
            if isinstance(base, Linear4bit):
                bits += 8.0 * _buffer_bytes(base)
            else:
                bits += 8.0 * keep.itemsize * count
    return bits / weights


def stored_bytes(model: nn.Module, keep: torch.dtype) -> int:
    """Size of base and adapter together, as they are written."""
    size = 0
    for parameter in model.parameters():
        width = parameter.element_size() if parameter.requires_grad else keep.itemsize
        size += parameter.numel() * width
    for module in model.modules():
        if isinstance(module, Linear4bit):
            size += _buffer_bytes(module)
    return size


def _buffer_bytes(layer: Linear4bit) -> int:
    return sum(buffer.numel() * buffer.element_size() for buffer in layer.buffers())


def in_fp32(model: nn.Module) -> None:
    """Hold what was stored in 16 bit in fp32, for exact measurement; no value changes."""
    for parameter in model.parameters():
        parameter.data = parameter.data.float()


def has_adapters(model: nn.Module) -> bool:
    """Whether the model was made by `prepare_adapters`."""
    return any(isinstance(module, MergedLinear) for module in model.modules())
