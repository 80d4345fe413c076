"""Several LoRA adapters over one 4-bit base: a tree of modules for each, sharing the base's memory.

A tree has the layers of its own adapter (rank, targets, DoRA, trained rows may differ); codes and
scales of the base, and whatever else is equal, are the tensors of the first tree.
"""

from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.utils import parametrize
from tqdm import tqdm
from transformers import PreTrainedModel

from qat.adapter_runtime import load_nf4
from qat.errors import UserError
from qat.runtime import load_packed


def load_adapted(
    base: Path, name: str, adapters: dict[str, str], dtype: torch.dtype, device: torch.device
) -> dict[str, PreTrainedModel]:
    """The base with its own adapter under ``name``, then with each of ``adapters``.

    While one is loaded its base exists twice; afterwards once for all.

    Args:
        base: the ``nf4/`` directory of an adapter run.
        name: of its own adapter.
        adapters: names and directories: the ``nf4/`` of other runs on the same base, or the
            ``adapter/`` in them.
        dtype: of activations and of what is not 4-bit.
        device: where to.

    Raises:
        UserError: a name twice, no adapter in a directory, or one of another base.
    """
    folders = {key: _folder(key, Path(value)) for key, value in adapters.items()}
    if name in folders:
        raise UserError(
            f"adapters.{name}: this is the name of the model itself; choose another, or give the "
            "model another with name="
        )
    first = load_packed(base, dtype, device)
    _bake(first)
    models = {name: first}
    for key, folder in tqdm(folders.items(), desc="adapters", delay=2, leave=False):
        model = load_nf4(base, dtype, device, adapter=folder)
        _bake(model)
        _share(model, first)
        model.generation_config = first.generation_config
        models[key] = model
    return models


def _folder(name: str, path: Path) -> Path:
    """The directory that holds the adapter's own files."""
    for folder in (path, path / "adapter"):
        if (folder / "adapter_config.json").is_file():
            if not (folder / "base.json").is_file():
                raise UserError(
                    f"adapters.{name}={path}: has no base.json, which says on which 4-bit base it "
                    "was trained; give the nf4/ directory of an adapter run"
                )
            return folder
    raise UserError(
        f"adapters.{name}={path}: holds no adapter_config.json; give the nf4/ directory of an "
        "adapter run"
    )


def _bake(model: nn.Module) -> None:
    """Replace what is computed in each pass from a frozen parameter by its value."""
    baked: dict[int, list[nn.Parameter]] = {}
    for module in list(model.modules()):
        if not parametrize.is_parametrized(module):
            continue
        held: Any = module.parametrizations
        for leaf in list(held):
            original: nn.Parameter = held[leaf].original
            value = getattr(module, leaf).detach()
            # a tied weight stays one
            known = baked.setdefault(id(original), [original])
            same = next((p for p in known if torch.equal(p, value)), None)
            if same is None:
                same = nn.Parameter(value.clone(), requires_grad=False)
                known.append(same)
            parametrize.remove_parametrizations(module, leaf, leave_parametrized=False)
            setattr(module, leaf, same)


def _share(model: nn.Module, first: nn.Module) -> None:
    """Take the tensors of ``first`` where they are equal and stand at the same place."""
    places = dict(first.named_modules())
    for name, module in model.named_modules():
        other = places.get(name)
        if other is None or "lora_" in name:
            continue
        for mine, theirs in (
            (module._buffers, other._buffers),
            (module._parameters, other._parameters),
        ):
            for leaf, value in mine.items():
                twin = theirs.get(leaf)
                if value is None or twin is None or value is twin:
                    continue
                if value.dtype == twin.dtype and torch.equal(value, twin):
                    mine[leaf] = twin
