"""Which layers of an artifact are served packed, and how each is built from its stored tensors.

`qat.runtime.load_packed` and `qat.transformers_quantizer` both load by this plan: what is covered
is decided here and nowhere else.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from compressed_tensors.quantization import QuantizationConfig, QuantizationStrategy
from compressed_tensors.utils.match import match_named_modules, match_targets
from torch import Tensor, nn
from tqdm import tqdm
from transformers import PreTrainedModel

from qat.errors import UserError
from qat.mapped_tensors import release_freed_memory
from qat.packed_layers import Int8Linear, KeptLinear, PackedLinear
from qat.row_attention import attend_by_row
from qat.tensor_files import TensorFiles
from qat_kernels import QuantSpec, w4a16, w8a8
from qat_kernels.numerics import pack, unpack

FORMATS = ("pack-quantized", "int-quantized")
"""Formats of compressed-tensors that the packed modules read."""
LAYER_TENSORS = ("weight_packed", "weight_scale", "weight_zero_point", "weight_shape")
"""Names under which compressed-tensors stores a packed layer."""


class NotCovered(Exception):  # noqa: N818  (not an error: plain transformers takes over)
    """The packed modules do not cover this artifact; the message says why."""


@dataclass(frozen=True)
class PlannedLayer:
    """One ``nn.Linear`` of the skeleton that a packed layer replaces."""

    name: str
    module: nn.Linear
    """On the meta device: sizes and whether there is a bias."""
    group: Any
    """The group of the compressed-tensors config that names it."""

    def tensor_names(self, files: TensorFiles) -> set[str]:
        """Tensors of the file that belong to this layer."""
        # readers allocate zero points even for symmetric inputs, and some writers save them
        names = [*LAYER_TENSORS, "input_zero_point"]
        if f"{self.name}.weight_packed" not in files:
            names.append("weight")
        if self.module.bias is not None:
            names.append("bias")
        if self.static:
            names.append("input_scale")
        return {f"{self.name}.{leaf}" for leaf in names if f"{self.name}.{leaf}" in files}

    @property
    def static(self) -> bool:
        """Whether inputs are quantized with a stored scale."""
        inputs = self.group.input_activations
        return inputs is not None and not inputs.dynamic


def parse(quantization: dict[str, Any]) -> QuantizationConfig:
    """The compressed-tensors config. Raises NotCovered for what the packed modules do not know."""
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


def plan_layers(
    model: PreTrainedModel, config: QuantizationConfig, files: TensorFiles, path: Path
) -> list[PlannedLayer]:
    """The layers to replace; every tensor of the model and of the file is accounted for.

    Args:
        model: the skeleton, parameters on the meta device.
        config: from `parse`.
        files: the tensors.
        path: where they are, for messages.

    Raises:
        NotCovered: quantized layers that are no plain Linear, or tensors without a place.
        UserError: tensors are missing.
    """
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
    plan = []
    for name, module in matched:
        if type(module) is not nn.Linear:
            raise NotCovered(f"{name} is a {type(module).__name__}")
        group = targets[match_targets(name, module, targets)[0]]
        if f"{name}.weight_packed" in files and group.input_activations is not None:
            raise NotCovered(f"{name} has packed weights and quantized inputs")
        plan.append(PlannedLayer(name, module, group))
    _account(model, plan, files, path)
    return plan


def _account(
    model: PreTrainedModel, plan: list[PlannedLayer], files: TensorFiles, path: Path
) -> None:
    """Every tensor of the file has a place in the model, and every kept parameter has a tensor."""
    of_layers = set().union(*(layer.tensor_names(files) for layer in plan))
    replaced = {f"{layer.name}.{leaf}" for layer in plan for leaf in ("weight", "bias")}
    kept = {name for name, _ in model.named_parameters(remove_duplicate=False)} - replaced
    buffers = set(model.state_dict()) - kept - replaced
    unknown = sorted(files.names() - of_layers - kept - buffers)
    if unknown:
        raise NotCovered(f"{len(unknown)} tensors such as {unknown[0]} have no place in the model")
    absent = kept - files.names()
    missing = sorted(absent - {target for target, _ in ties(model, absent)})
    if missing:
        raise UserError(
            f"artifact={path}: {len(missing)} tensors are missing, the first is {missing[0]}; copy "
            "the artifact again, with all its files"
        )


def ties(model: PreTrainedModel, absent: set[str]) -> Iterator[tuple[str, str]]:
    """(name, tied to which) for the ``absent`` parameters that the file stores under another."""
    for target, source in model.all_tied_weights_keys.items():
        if source in absent and target not in absent:
            source, target = target, source
        if target in absent and source not in absent:
            yield target, source


def swap_layers(
    model: PreTrainedModel,
    plan: list[PlannedLayer],
    files: TensorFiles,
    dtype: torch.dtype,
    device: torch.device,
) -> None:
    """Put the packed layers in their places, one by one.

    Raises:
        UserError: a tensor is missing or does not fit its layer.
    """
    reuse = w8a8.InputReuse()
    for layer in tqdm(plan, desc="packed layers", leave=False, delay=2):
        model.set_submodule(layer.name, _build(layer, files, dtype, device, reuse))
        # else the holes that repacking leaves add up to the size of the model
        release_freed_memory()


def fix_rows(model: PreTrainedModel, dtype: torch.dtype, device: torch.device) -> None:
    """In 16 bit on the CPU, let attention and kept layers compute alike in every batch."""
    if device.type != "cpu" or dtype == torch.float32:
        return
    attend_by_row(model)
    for name, module in list(model.named_modules()):
        if type(module) is nn.Linear:
            model.set_submodule(name, KeptLinear(module))


def spec_of(arguments: Any) -> QuantSpec:
    """The spec of a weight from its compressed-tensors arguments; integer codes."""
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


def _build(
    layer: PlannedLayer,
    files: TensorFiles,
    dtype: torch.dtype,
    device: torch.device,
    reuse: w8a8.InputReuse,
) -> nn.Module:
    """The packed layer."""
    name, module, group = layer.name, layer.module, layer.group
    spec = spec_of(group.weights)
    shape = (module.out_features, module.in_features)
    packed = f"{name}.weight_packed" in files
    codes_name = f"{name}.weight_packed" if packed else f"{name}.weight"
    needed = [codes_name, f"{name}.weight_scale"]
    needed += [f"{name}.weight_zero_point"] * (not spec.symmetric)
    needed += [f"{name}.bias"] * (module.bias is not None) + [f"{name}.input_scale"] * layer.static
    for tensor_name in needed:
        if tensor_name not in files:
            raise UserError(f"{tensor_name}: missing; the artifact is not complete")
    codes = files.get(codes_name)
    scale = files.get(f"{name}.weight_scale")
    scale = scale.reshape(-1, 1) if spec.granularity == "tensor" else scale
    zero_point = None
    if not spec.symmetric:
        stored = files.get(f"{name}.weight_zero_point")
        zero_point = unpack_zero_point(stored, spec.bits, shape[0]).reshape(scale.shape)
    bias = None if module.bias is None else files.get(f"{name}.bias").to(device, dtype)
    if not packed and (codes.dtype != torch.int8 or tuple(codes.shape) != shape):
        raise UserError(
            f"{codes_name}: expected int8 {shape}, got {codes.dtype} {tuple(codes.shape)}"
        )
    try:
        if group.input_activations is None:
            words = codes if packed else pack(codes, spec.bits)
            weight = w4a16.prepare(words, scale, zero_point, spec, shape, device, dtype)
            return PackedLinear(weight, bias)
        input_scale = files.get(f"{name}.input_scale") if layer.static else None
        zero_point = None if zero_point is None else zero_point.to(device)
        int8 = w8a8.prepare(codes.to(device), scale, zero_point, input_scale, dtype=dtype)
        return Int8Linear(int8, bias, reuse)
    except ValueError as error:
        raise UserError(f"{name}: {error}") from error


def unpack_zero_point(stored: Tensor, bits: int, rows: int) -> Tensor:
    """int8 zero points from what is stored; those of groups and channels are packed along N."""
    if stored.dtype == torch.int32:
        return unpack(stored.t().contiguous(), bits, rows).t().contiguous()
    return stored.to(torch.int8)
