"""Convert: the trained codes and scales, packed and written shard by shard.

``(q, s) = quantize(master weight)`` is computed here from the same parameters, by the same
function, as in the last training step; nothing is rounded a second time. Kept parameters are
written in the dtype in which training saw them.
"""

import json
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerFast
from transformers.core_model_loading import revert_weight_conversion

from qat.compressed_tensors import layout, quantization_config, weight_tensors
from qat.prepare import Coverage, CoverageEntry
from qat.scheme import Scheme
from qat.trained import kept_parameters, quantized_parameters
from qat_kernels import compute_scale, quantize

SHARD_BYTES = 4 << 30
"""Tensors are written out whenever this much has been collected."""

log = logging.getLogger(__name__)


def head_name(model: PreTrainedModel) -> str | None:
    """Module name of the output head, or None."""
    return _name_of(model, model.get_output_embeddings())


def _name_of(model: PreTrainedModel, wanted: nn.Module | None) -> str | None:
    return next((name for name, module in model.named_modules() if module is wanted), None)


@dataclass(frozen=True)
class TrainedMatrix:
    """One quantized weight matrix as it will be stored, before packing."""

    entry: CoverageEntry
    """Coverage entry of the parameter (one for all experts of a layer)."""
    prefix: str
    """Module name in the checkpoint, without a final dot."""
    codes: Tensor
    """int8 [N, K]."""
    scale: Tensor
    """fp32 [N, G], [N, 1] or [1, 1]."""
    zero_point: Tensor | None
    """int8, like scale, or None."""
    input_scale: Tensor | None = None
    """fp32 [1] for static input quantization."""


@torch.no_grad()
def trained_matrices(model: PreTrainedModel, coverage: Coverage) -> Iterator[TrainedMatrix]:
    """The trained (q, s) of a prepared model, one matrix at a time."""
    entries = {entry.name: entry for entry in coverage.entries}
    for item in quantized_parameters(model):
        entry = entries[item.name]
        scale, zero_point = compute_scale(item.weight, item.quantizer.spec)
        codes = quantize(item.weight, scale, zero_point, item.quantizer.spec)
        if codes.ndim == 3:
            yield from _experts(model, entry, codes, scale)
            continue
        static = None
        if item.inputs is not None and item.inputs.observer is not None:
            static = item.inputs.scale().reshape(1).to(torch.float32)
        yield TrainedMatrix(entry, entry.module, codes, scale, zero_point, static)


def checkpoint_tensors(model: PreTrainedModel, coverage: Coverage) -> Iterator[dict[str, Tensor]]:
    """The tensors of the packed checkpoint, one matrix at a time; tied parameters once."""
    chosen = layout(coverage)
    for matrix in trained_matrices(model, coverage):
        tensors = weight_tensors(
            matrix.entry, matrix.prefix, matrix.codes, matrix.scale, matrix.zero_point, chosen
        )
        if matrix.input_scale is not None:
            tensors[f"{matrix.prefix}.input_scale"] = matrix.input_scale
        yield tensors
    for name, value in kept_tensors(model, coverage):
        yield {name: value}


def kept_tensors(model: PreTrainedModel, coverage: Coverage) -> Iterator[tuple[str, Tensor]]:
    """(name, value) of everything stored unpacked: kept parameters, then persistent buffers.

    Parameters that readers tie by themselves appear once; ones that share their values although
    the configuration does not tie them appear under each name, as copies.
    """
    names = {entry.name for entry in coverage.entries}
    ties: dict[str, str] = model.all_tied_weights_keys
    tied = {*ties, *ties.values()}
    for name, value, dtype in kept_parameters(model):
        if name in names:
            yield name, value.detach().to(dtype).contiguous()
        elif name not in tied:
            yield name, value.detach().to(dtype, copy=True).contiguous()
    for name, value in model.state_dict().items():
        if _is_model_buffer(model, name):
            yield name, value.detach().clone()


@torch.no_grad()
def merged_tensors(
    model: PreTrainedModel, coverage: Coverage, dtype: torch.dtype
) -> Iterator[tuple[str, Tensor]]:
    """(name, value) of the merged model before it is quantized, its weights in ``dtype``.

    One at a time: parameters, tied ones once, then persistent buffers.
    """
    for item in quantized_parameters(model):
        yield item.name, item.weight.detach().to(dtype).contiguous()
    yield from kept_tensors(model, coverage)


def _is_model_buffer(model: PreTrainedModel, name: str) -> bool:
    """Whether a state-dict entry is a persistent buffer of the original model."""
    owner_name, _, leaf = name.rpartition(".")
    owner = model.get_submodule(owner_name)
    # the bases too: a parametrized module has a class of its own
    ours = any(cls.__module__.startswith("qat.") for cls in type(owner).__mro__)
    return not ours and leaf in owner._buffers


def _experts(
    model: PreTrainedModel, entry: CoverageEntry, codes: Tensor, scale: Tensor
) -> Iterator[TrainedMatrix]:
    """The matrices of each expert, from codes [E, N, K] and scales [E, N, G].

    transformers keeps the experts of a layer in one tensor and knows how to name and slice them
    for a checkpoint; scales have the same leading axes, so the same slicing applies.
    """
    tensorwise = scale.shape[-2] != codes.shape[-2]
    if tensorwise:
        scale = scale.expand(-1, codes.shape[-2], -1)
    parts = revert_weight_conversion(model, {entry.name: codes})
    scales = revert_weight_conversion(model, {entry.name: scale.contiguous()})
    for name, part in parts.items():
        part_scale = scales[name][:1] if tensorwise else scales[name]
        prefix = name.removesuffix(".weight")
        yield TrainedMatrix(entry, prefix, part.contiguous(), part_scale.contiguous(), None)


def write_checkpoint(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    coverage: Coverage,
    scheme: Scheme,
    directory: Path,
) -> None:
    """Write weights, config.json and tokenizer files of the packed model into ``directory``.

    The result loads in plain transformers.

    Raises:
        UserError: the coverage cannot be stored, see `qat.compressed_tensors.layout`.
        OSError: the disk is full.
    """
    write_shards(checkpoint_tensors(model, coverage), directory, "convert")
    owners = {entry.module for entry in coverage.entries if entry.name.endswith(".weight")}
    values: dict[str, Any] = {
        "dtype": layout(coverage).model_dtype(scheme.keep_dtype),
        "quantization_config": quantization_config(coverage, head_name(model)),
    }
    if {head_name(model), _name_of(model, model.get_input_embeddings())} <= owners:
        # the head has its own weight: a flag that says otherwise would make readers drop it
        values["tie_word_embeddings"] = False
    write_config(model, values, directory)
    tokenizer.save_pretrained(directory)


def write_shards(tensors: Iterator[dict[str, Tensor]], directory: Path, name: str) -> None:
    """Write a stream of named tensors as safetensors files, with an index where there are several.

    Tensors are collected up to SHARD_BYTES and written, so that memory holds one shard.

    Args:
        tensors: parts of the checkpoint, each name once.
        directory: where to.
        name: shown by the progress bar.

    Raises:
        OSError: the disk is full.
    """
    shards: list[dict[str, Tensor]] = [{}]
    weight_map: dict[str, int] = {}
    total = size = 0
    for part in tqdm(tensors, desc=name, delay=2, leave=False, disable=None):
        for key, tensor in part.items():
            nbytes = tensor.numel() * tensor.element_size()
            if size and size + nbytes > SHARD_BYTES:
                save_file(shards[-1], _shard_path(directory, len(shards)), {"format": "pt"})
                shards[-1] = {}
                shards.append({})
                size = 0
            shards[-1][key] = tensor
            weight_map[key] = len(shards)
            size += nbytes
            total += nbytes
    save_file(shards[-1], _shard_path(directory, len(shards)), {"format": "pt"})
    _name_shards(directory, weight_map, len(shards), total)


def _shard_path(directory: Path, number: int) -> Path:
    return directory / f"model-{number:05d}.safetensors"


def _name_shards(directory: Path, weight_map: dict[str, int], count: int, total: int) -> None:
    """Give shards their final names, which contain their number, and write the index.

    safetensors creates files for the owner alone; they get the mode of the other files.
    """
    for number in range(1, count + 1):
        mode = (directory.stat().st_mode & 0o444) | 0o200
        _shard_path(directory, number).chmod(mode)
    if count == 1:
        _shard_path(directory, 1).rename(directory / "model.safetensors")
        return
    names = {}
    for number in range(1, count + 1):
        names[number] = f"model-{number:05d}-of-{count:05d}.safetensors"
        _shard_path(directory, number).rename(directory / names[number])
    index = {
        "metadata": {"total_size": total},
        "weight_map": {name: names[number] for name, number in weight_map.items()},
    }
    (directory / "model.safetensors.index.json").write_text(
        json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8"
    )


def write_config(model: PreTrainedModel, values: dict[str, Any], directory: Path) -> None:
    """Write config.json, with ``values`` put over the model's own, and generation_config.json."""
    model.config.save_pretrained(directory)
    path = directory / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config |= {"architectures": [type(model).__name__], "use_cache": True} | values
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    if model.can_generate():
        model.generation_config.save_pretrained(directory)
