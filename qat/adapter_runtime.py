"""Inference on ``nf4/``: the 4-bit base with its adapter, computing what training computed."""

from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedModel

from qat.adapter_config import AdapterConfig
from qat.adapter_files import PREFIX
from qat.adapter_state import codes_sha256, trained_rows
from qat.adapters import prepare_adapters
from qat.bitsandbytes_format import spec_of
from qat.errors import UserError
from qat.lora import ADAPTER, LoraLinear
from qat.original import OriginalWeights
from qat.prepare import Coverage
from qat.scheme import Scheme
from qat.tensor_files import read_json

KEEP_NAMES = {torch.bfloat16: "bfloat16", torch.float16: "float16", torch.float32: "float32"}


def load_nf4(
    directory: Path, dtype: torch.dtype, device: torch.device, adapter: Path | None = None
) -> PreTrainedModel:
    """The model of an ``nf4/`` directory, in eval mode; its base stays in 4 bits.

    Args:
        directory: holds the base, and the adapter in ``adapter/``.
        dtype: of activations and of what is not 4-bit; fp32 computes what was trained.
        device: where to.
        adapter: directory of another adapter, trained on the same base, to take instead.

    Raises:
        UserError: files are missing or damaged, or the adapter does not belong to the base.
    """
    return load_nf4_with_coverage(directory, dtype, device, adapter)[0]


def load_nf4_with_coverage(
    directory: Path, dtype: torch.dtype, device: torch.device, adapter: Path | None = None
) -> tuple[PreTrainedModel, Coverage]:
    """The model of `load_nf4`, and the coverage with which its merged weights can be had."""
    original = OriginalWeights(str(directory))
    folder = adapter or directory / "adapter"
    try:
        peft: Any = LoraConfig.from_pretrained(str(folder))
        stored = load_file(folder / "adapter_model.safetensors")
    except (OSError, ValueError, SafetensorError) as error:
        raise UserError(f"{folder}: no adapter can be read ({error})") from error
    tensors = {name.removeprefix(PREFIX): value for name, value in stored.items()}
    scheme = Scheme(keep_dtype=KEEP_NAMES[original.dtype], min_coverage=0)  # type: ignore[arg-type]
    rows: list[int] = next(iter((peft.trainable_token_indices or {}).values()), [])
    model, coverage = prepare_adapters(
        original, _config(original, peft), scheme, 0, dtype, device, new_rows=rows
    )
    facts = read_json(folder / "base.json")
    if facts.get("codes_sha256") != codes_sha256(model):
        raise UserError(
            f"{folder}: this adapter was trained on another 4-bit base (sha256 of its codes in "
            "base.json); put the adapter's own nf4/ beside it"
        )
    _fill(model, tensors, folder)
    # the adapter's parameters in the dtype of the activations, as PEFT loads them
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    return model.eval().requires_grad_(False), coverage


def _config(original: OriginalWeights, peft: Any) -> AdapterConfig:
    """What `prepare_adapters` needs to build the same layers."""
    assert original.quantization is not None
    spec_of(original.quantization)  # raises if it is not 4-bit
    held = (original.packed(name) for name, _ in original.skeleton().named_parameters())
    # the block size stands beside the weights, not in config.json
    spec = next((layer.spec for layer in held if layer is not None), None)
    if spec is None:
        raise UserError(f"{original.model}: no 4-bit weight in it, which its config.json promises")
    targets = peft.target_modules
    return AdapterConfig(
        base=spec.quant_type,
        block_size=spec.block_size,
        double_quant=spec.double_quant,
        rank=peft.r,
        alpha=peft.lora_alpha,
        targets=[targets] if isinstance(targets, str) else sorted(targets),
        rslora=peft.use_rslora,
        dora=peft.use_dora,
        modules_to_save=sorted(peft.modules_to_save or []),
    )


def _fill(model: PreTrainedModel, tensors: dict[str, Tensor], folder: Path) -> None:
    """Give the adapter its values; each must have its place, and each place its value."""
    places: dict[str, Tensor] = {}
    for name, module in model.named_modules():
        if isinstance(module, LoraLinear):
            places[f"{name}.lora_A.weight"] = module.lora_A[ADAPTER].weight
            places[f"{name}.lora_B.weight"] = module.lora_B[ADAPTER].weight
            if module.magnitude is not None:
                places[f"{name}.lora_magnitude_vector"] = module.magnitude
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if name.endswith(".original") and parameter.requires_grad:
            owner, _, leaf = name.removesuffix(".original").rpartition(".parametrizations.")
            places[f"{owner}.{leaf}"] = parameter
    for name, rows in trained_rows(model).items():
        places[f"{name}.token_adapter.trainable_tokens_delta"] = rows.values
    if places.keys() != tensors.keys():
        odd = sorted(places.keys() ^ tensors.keys())
        raise UserError(f"{folder}: does not fit the base; {odd[0]} is on one side only")
    for name, place in places.items():
        if place.shape != tensors[name].shape:
            raise UserError(
                f"{folder}: does not fit the base; {name} is {tuple(tensors[name].shape)}, not "
                f"{tuple(place.shape)}"
            )
        place.data.copy_(tensors[name])
