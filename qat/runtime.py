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
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from compressed_tensors.quantization import QuantizationConfig, QuantizationStrategy
from compressed_tensors.utils.match import match_named_modules, match_targets
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedModel

from qat.errors import UserError
from qat.packed_layers import Int8Linear, KeptLinear, PackedLinear
from qat.row_attention import attend_by_row
from qat.tensor_files import TensorFiles, read_json
from qat_kernels import QuantSpec, w4a16, w8a8
from qat_kernels.numerics import pack, unpack

log = logging.getLogger(__name__)

FORMATS = ("pack-quantized", "int-quantized")
"""Formats of compressed-tensors that the packed modules read."""
LAYER_TENSORS = ("packed", "scale", "zero_point", "shape")
"""Suffixes of ``weight_`` under which compressed-tensors stores a packed layer."""


class NotCovered(Exception):  # noqa: N818  (not an error: plain transformers takes over)
    """The packed modules do not cover this artifact; the message says why."""


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
    path = Path(artifact)
    config, quantization = read_artifact_config(path)
    device = torch.device(device)
    if quantization.get("quant_method") == "bitsandbytes" and (path / "adapter").is_dir():
        # imported here: an artifact needs neither PEFT nor the adapters' modules
        from qat.adapter_runtime import load_nf4

        return load_nf4(path, dtype, device)
    try:
        with ExitStack() as stack:
            files = TensorFiles(path, stack)
            layers = _parse(quantization)
            model = _skeleton(config, dtype)
            _swap_layers(model, layers, files, dtype, device)
            _fill(model, files, device, path)
            if device.type == "cpu" and dtype != torch.float32:
                _fix_rows(model)
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
    return model.eval().requires_grad_(False)


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


def _parse(quantization: dict[str, Any]) -> QuantizationConfig:
    """The compressed-tensors config, if the packed modules know everything in it."""
    method = quantization.get("quant_method")
    if method != "compressed-tensors":
        raise NotCovered(f"quant_method={method}")
    parsed = QuantizationConfig.model_validate(quantization)
    if parsed.kv_cache_scheme is not None:
        raise NotCovered("it quantizes the KV cache")
    for group in parsed.config_groups.values():
        found = group.format or parsed.format
        if found not in FORMATS:
            raise NotCovered(f"format={found}")
        weights, inputs = group.weights, group.input_activations
        if weights is None or weights.type != "int" or weights.actorder is not None:
            raise NotCovered(f"weights={weights}")
        if weights.strategy not in ("tensor", "channel", "group"):
            raise NotCovered(f"weights.strategy={weights.strategy}")
        if group.output_activations is not None or not _known_input(inputs):
            raise NotCovered(f"activations={inputs or group.output_activations}")
    return parsed


def _known_input(inputs: Any) -> bool:
    """Whether `Int8Linear` computes these input activations: symmetric int8, token or static."""
    if inputs is None:
        return True
    kind = "token" if inputs.dynamic is True else "tensor"
    int8 = inputs.type == "int" and inputs.num_bits == 8 and inputs.symmetric
    return bool(int8 and inputs.dynamic in (True, False) and inputs.strategy == kind)


def _skeleton(config: Any, dtype: torch.dtype) -> PreTrainedModel:
    """The model with parameters on meta and buffers (rotary frequencies ...) computed."""
    with init_empty_weights(include_buffers=False):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=dtype)
    return model


def _fix_rows(model: PreTrainedModel) -> None:
    """Let attention and the layers that stayed 16 bit compute alike in every batch."""
    attend_by_row(model)
    for name, module in list(model.named_modules()):
        if type(module) is nn.Linear:
            model.set_submodule(name, KeptLinear(module))


def _spec(arguments: Any) -> QuantSpec:
    size = {} if arguments.group_size is None else {"group_size": arguments.group_size}
    return QuantSpec(
        bits=arguments.num_bits,
        symmetric=arguments.symmetric,
        granularity=QuantizationStrategy(arguments.strategy).value,
        # the grid is how scales were found; here they are given
        grid="absmax",
        dynamic=arguments.dynamic is True,
        **size,
    )


def _swap_layers(
    model: PreTrainedModel,
    config: QuantizationConfig,
    files: TensorFiles,
    dtype: torch.dtype,
    device: torch.device,
) -> None:
    """Replace every quantized Linear of the skeleton, layer by layer."""
    targets = {target: g for g in config.config_groups.values() for target in g.targets}
    matched = list(match_named_modules(model, targets, config.ignore))
    stored = {n.removesuffix(".weight_scale") for n in files.names() if n.endswith(".weight_scale")}
    missing = sorted({name for name, _ in matched} - stored)
    unmatched = sorted(stored - {name for name, _ in matched})
    if unmatched:
        raise NotCovered(f"{len(unmatched)} quantized layers such as {unmatched[0]} are no Linear")
    if missing:
        raise UserError(
            f"{missing[0]}.weight_scale: missing ({len(missing)} such layers); the artifact is "
            "not complete"
        )
    reuse = w8a8.InputReuse()
    for name, module in matched:
        if type(module) is not nn.Linear:
            raise NotCovered(f"{name} is a {type(module).__name__}")
        group = targets[match_targets(name, module, targets)[0]]
        layer = _layer(name, module, group, files, dtype, device, reuse)
        model.set_submodule(name, layer)


def _layer(
    name: str,
    module: nn.Linear,
    group: Any,
    files: TensorFiles,
    dtype: torch.dtype,
    device: torch.device,
    reuse: w8a8.InputReuse,
) -> nn.Module:
    """The quantized layer for one Linear (on meta)."""
    spec = _spec(group.weights)
    shape = (module.out_features, module.in_features)
    packed = f"{name}.weight_packed" in files
    codes_name = f"{name}.weight_packed" if packed else f"{name}.weight"
    needed = [codes_name, f"{name}.weight_scale"]
    static = group.input_activations is not None and not group.input_activations.dynamic
    needed += [f"{name}.weight_zero_point"] * (not spec.symmetric)
    needed += [f"{name}.bias"] * (module.bias is not None) + [f"{name}.input_scale"] * static
    for tensor_name in needed:
        if tensor_name not in files:
            raise UserError(f"{tensor_name}: missing; the artifact is not complete")
    if packed and group.input_activations is not None:
        raise NotCovered(f"{name} has packed weights and quantized inputs")
    codes = files.get(codes_name)
    scale = files.get(f"{name}.weight_scale")
    scale = scale.reshape(-1, 1) if spec.granularity == "tensor" else scale
    zero_point = None if spec.symmetric else _zero_point(name, files, spec, shape, scale)
    bias = None if module.bias is None else files.get(f"{name}.bias").to(device, dtype)
    files.used.update(f"{name}.weight_{suffix}" for suffix in LAYER_TENSORS)
    # readers allocate zero points even for symmetric inputs, and some writers save them
    files.used.add(f"{name}.input_zero_point")
    if not packed and (codes.dtype != torch.int8 or tuple(codes.shape) != shape):
        raise UserError(
            f"{codes_name}: expected int8 {shape}, got {codes.dtype} {tuple(codes.shape)}"
        )
    try:
        if group.input_activations is None:
            words = codes if packed else pack(codes, spec.bits)
            weight = w4a16.prepare(words, scale, zero_point, spec, shape, device, dtype)
            return PackedLinear(weight, bias)
        input_scale = files.get(f"{name}.input_scale") if static else None
        zero_point = None if zero_point is None else zero_point.to(device)
        int8 = w8a8.prepare(codes.to(device), scale, zero_point, input_scale, dtype=dtype)
        return Int8Linear(int8, bias, reuse)
    except ValueError as error:
        raise UserError(f"{name}: {error}") from error


def _zero_point(
    name: str, files: TensorFiles, spec: QuantSpec, shape: tuple[int, int], scale: Tensor
) -> Tensor:
    """int8 zero points of the shape of scale; group and channel ones are packed along N."""
    stored = files.get(f"{name}.weight_zero_point")
    if stored.dtype == torch.int32:
        return unpack(stored.t().contiguous(), spec.bits, shape[0]).t().contiguous()
    return stored.to(torch.int8).reshape(scale.shape)


def _set(model: nn.Module, name: str, value: nn.Parameter | Tensor) -> None:
    owner, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(owner), leaf, value)


def _fill(model: PreTrainedModel, files: TensorFiles, device: torch.device, path: Path) -> None:
    """Load what is kept, tie weights, and account for every tensor of model and file."""
    missing = []
    kept = {name for name, p in model.named_parameters(remove_duplicate=False) if p.is_meta}
    persistent = set(model.state_dict().keys()) - kept
    for name in sorted(kept):
        expected = model.get_parameter(name)
        if name not in files:
            missing.append(name)
            continue
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
    missing = _tie(model, missing)
    unknown = sorted(files.names() - files.used)
    if unknown:
        raise NotCovered(f"{len(unknown)} tensors such as {unknown[0]} have no place in the model")
    if missing:
        raise UserError(
            f"artifact={path}: {len(missing)} tensors are missing, the first is {missing[0]}; copy "
            "the artifact again, with all its files"
        )


def _tie(model: PreTrainedModel, missing: list[str]) -> list[str]:
    """Tie what the file stores once; returns what is still missing."""
    left = set(missing)
    for target, source in model.all_tied_weights_keys.items():
        if source in left and target not in left:
            source, target = target, source
        if target in left and source not in left:
            _set(model, target, model.get_parameter(source))
            left.discard(target)
    return sorted(left)


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
