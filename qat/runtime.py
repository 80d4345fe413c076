"""Inference on packed weights: load an artifact without unpacking it in memory.

`load_packed` builds the transformers model with its parameters on the meta device, puts a
`PackedLinear` (``pack-quantized``) or an `Int8Linear` (``int-quantized``) in the place of each
quantized ``nn.Linear`` and fills in everything else from the memory-mapped safetensors. No
quantized layer ever exists in 16 bit. With ``dtype=torch.float32`` the model computes what plain
transformers computes from the same files, bit for bit.

In 16 bit on the CPU a sequence gets the same answer in every batch: quantized layers compute rows
one by one or in tiles of equal size, what is kept becomes `KeptLinear`, and `qat.row_attention`
skips padding instead of masking it. (Prefill of `qat_kernels.w4a16_cpu.PREFILL_TOKENS` and more
computes sequence by sequence: equal for prompts of equal length.)

What these modules do not cover (packed experts, subclasses of Linear, float formats, quantized
caches) is loaded by plain transformers, and a log line says so and why.
"""

import logging
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedModel

from qat.errors import UserError
from qat.mapped_tensors import MappedTensors, limit_primitive_caches, release_freed_memory
from qat.packed_plan import NotCovered, fix_rows, parse, plan_layers, swap_layers, ties
from qat.tensor_files import TensorFiles, read_json

log = logging.getLogger(__name__)


def load_packed(
    artifact: Path | str, dtype: torch.dtype = torch.bfloat16, device: torch.device | str = "cpu"
) -> PreTrainedModel:
    """The model of an artifact, in eval mode, its quantized layers packed in memory.

    Args:
        artifact: directory with ``config.json`` (holding a ``quantization_config``) and weights;
            or the ``nf4/`` of an adapter run, see `qat.adapter_runtime`.
        dtype: dtype of activations and of everything that is kept; float32 is the exact reference.
        device: where the model runs; packed layers cannot be moved later.

    Raises:
        UserError: no such directory, not an artifact, tensors missing, or a truncated file.
    """
    limit_primitive_caches()
    path = Path(artifact)
    config, quantization = read_artifact_config(path)
    device = torch.device(device)
    if quantization.get("quant_method") == "bitsandbytes" and (path / "adapter").is_dir():
        # imported here: an artifact needs neither PEFT nor the adapters' modules
        from qat.adapter_runtime import load_nf4

        nf4 = load_nf4(path, dtype, device)
        _finish(nf4, path)
        return nf4
    try:
        files = MappedTensors(path)
        layers = parse(quantization)
        model = _skeleton(config, dtype)
        swap_layers(model, plan_layers(model, layers, files, path), files, dtype, device)
        _fill(model, files, device, path)
        fix_rows(model, dtype, device)
    except NotCovered as reason:
        log.warning(
            "%s: the packed kernels do not cover it (%s); loading dequantized weights with plain "
            "transformers instead",
            path,
            reason,
        )
        model = _load_plain(path, dtype, device)
    if (path / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(path)
    _finish(model, path)
    return model.eval().requires_grad_(False)


def _finish(model: PreTrainedModel, path: Path) -> None:
    """Guard against saving what is not the file, and give back what repacking used."""
    # imported here: it imports this module
    from qat.transformers_quantizer import refuse_saving

    refuse_saving(model, path)
    release_freed_memory()


def read_artifact_config(path: Path) -> tuple[Any, dict[str, Any]]:
    """The transformers config without its ``quantization_config``, and that section.

    Raises:
        UserError: no such directory, or not an artifact.
    """
    if not path.is_dir():
        raise UserError(
            f"artifact={path}: no such directory; give the artifact/ folder of a finished run"
        )
    if not (path / "config.json").is_file():
        nested = path / "artifact"
        hint = (
            f"did you mean {nested}?"
            if (nested / "config.json").is_file()
            else ("give the artifact/ folder of a finished run")
        )
        raise UserError(f"artifact={path}: holds no config.json, so it is no artifact; {hint}")
    quantization = read_json(path / "config.json").get("quantization_config")
    if not isinstance(quantization, dict):
        raise UserError(
            f"artifact={path}: its config.json has no quantization_config, so its weights are not "
            "quantized; load it with transformers"
        )
    try:
        config = AutoConfig.from_pretrained(path)
    except (OSError, ValueError, KeyError) as error:
        first = str(error).strip().splitlines()[0]
        raise UserError(f"artifact={path}: config.json cannot be read ({first})") from error
    del config.quantization_config
    return config, quantization


def _skeleton(config: Any, dtype: torch.dtype) -> PreTrainedModel:
    """The model with parameters on meta and buffers (rotary frequencies ...) computed."""
    with init_empty_weights(include_buffers=False):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=dtype)
    return model


def _set(model: nn.Module, name: str, value: nn.Parameter | Tensor) -> None:
    owner, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(owner), leaf, value)


def _fill(model: PreTrainedModel, files: TensorFiles, device: torch.device, path: Path) -> None:
    """Load what is kept, and tie what the file stores once."""
    kept = {name for name, p in model.named_parameters(remove_duplicate=False) if p.is_meta}
    persistent = set(model.state_dict().keys()) - kept
    for name in sorted(kept & files.names()):
        expected = model.get_parameter(name)
        tensor = files.get(name)
        if tensor.shape != expected.shape:
            raise UserError(
                f"{name}: {tuple(tensor.shape)} in {path}, but its config.json says "
                f"{tuple(expected.shape)}"
            )
        _set(model, name, nn.Parameter(tensor.to(device, expected.dtype), requires_grad=False))
    for name, buffer in list(model.named_buffers()):
        if name in persistent and name in files:
            buffer = files.get(name).to(buffer.dtype)
        _set(model, name, buffer.to(device))
    for target, source in ties(model, kept - files.names()):
        _set(model, target, model.get_parameter(source))


def _load_plain(path: Path, dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
    try:
        model, info = AutoModelForCausalLM.from_pretrained(
            path, dtype=dtype, output_loading_info=True
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"artifact={path}: transformers cannot load it ({first})") from error
    if info["missing_keys"]:
        name = sorted(info["missing_keys"])[0]
        raise UserError(f"artifact={path}: tensors are missing, the first is {name}")
    moved: PreTrainedModel = model.to(device)
    return moved
