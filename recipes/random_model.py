"""A random model directory of any size, written shard by shard and never whole in memory."""

import json
import shutil
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm
from transformers import AutoModelForCausalLM, LlamaConfig

from qat.errors import UserError
from recipes.config import ModelShape

SHARD_BYTES = 1 << 30
"""Tensors of a shard, but for one that is larger: what is in memory at a time."""


def write_random_model(
    shape: ModelShape, directory: Path, seed: int, device: torch.device | str = "cpu"
) -> int:
    """Write config.json and bf16 safetensors of a random Llama; the number of its parameters.

    Matrices are normal with the configuration's `initializer_range`, norms are ones. Takes two
    bytes of disk a parameter (an 8 B model: 16 GB).

    Args:
        shape: the model.
        directory: an existing directory.
        seed: of the values, which depend on the device's kind too.
        device: where random numbers are made; a GPU is faster.

    Raises:
        UserError: the disk has too little room.
    """
    config = LlamaConfig(
        **asdict(shape), architectures=["LlamaForCausalLM"], dtype="bfloat16", use_cache=False
    )
    with torch.device("meta"):
        skeleton = AutoModelForCausalLM.from_config(config)
    skeleton.tie_weights()
    parameters = dict(skeleton.named_parameters())
    total: int = sum(parameter.numel() for parameter in parameters.values())
    free = shutil.disk_usage(directory).free
    if 2 * total > free:
        raise UserError(
            f"output_dir: the random model takes {2 * total / 1e9:.1f} GB of disk in {directory}, "
            f"which has {free / 1e9:.1f} GB left; give a directory on another disk, or a smaller "
            "shape"
        )
    config.save_pretrained(directory)
    generator = torch.Generator(device).manual_seed(seed)
    shards = _shards(parameters)
    weight_map: dict[str, str] = {}
    for number, names in enumerate(tqdm(shards, desc="random model", leave=False), start=1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        values = {
            name: _values(parameters[name], config.initializer_range, generator) for name in names
        }
        save_file(values, directory / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(names, file)
    index = {"metadata": {"total_size": 2 * total}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index), "utf-8")
    return total


def _shards(parameters: dict[str, torch.nn.Parameter]) -> list[list[str]]:
    """Names in order, as many together as a shard holds."""
    shards: list[list[str]] = []
    room = 0
    for name, parameter in parameters.items():
        size = 2 * parameter.numel()
        if size > room:
            shards.append([])
            room = SHARD_BYTES
        shards[-1].append(name)
        room -= size
    return shards


def _values(parameter: Tensor, spread: float, generator: torch.Generator) -> Tensor:
    """Values for a parameter on the meta device: bf16, on the CPU."""
    if parameter.ndim < 2:
        return torch.ones(parameter.shape, dtype=torch.bfloat16)
    drawn = torch.randn(
        parameter.shape, generator=generator, device=generator.device, dtype=torch.bfloat16
    )
    return drawn.mul_(spread).cpu()
