"""The compressed-tensors format: how trained codes and scales are named, shaped and declared.

Readers know two routes, and which one a model needs is decided here once (`layout`):

- *native*: each ``nn.Linear`` gets its scheme; scales are stored in bf16 and become fp32 when the
  model is loaded in fp32, so q * s is exact at every bit width.
- *dequantize* (``"dequantize": true``): every packed weight is unpacked while loading, whatever
  module owns it. q * s is computed in the stored dtype, hence fp32 scales. Asymmetric weights and
  subclasses of Linear need it; it knows one scheme for all dense layers and no input quantization.

Experts (3-D weights) are always stored packed per expert with fp32 scales.

Per weight [N, K] with G scales a row: ``weight_packed`` int32 [N, ceil(K * bits / 32)],
``weight_scale`` [N, G] (tensor: [1]), ``weight_shape`` int64 [2], ``weight_zero_point`` packed
along N, int32 [ceil(N * bits / 32), G] (tensor: int8 [1]). Layers with quantized inputs store
``weight`` int8 [N, K] instead, and static ones ``input_scale`` fp32 [1].

Source: the package compressed-tensors 0.20 and its integration in transformers 5.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qat.errors import UserError
from qat.prepare import Coverage, CoverageEntry
from qat_kernels import QuantSpec, pack

FORMAT_VERSION = "0.20.0"


@dataclass(frozen=True)
class Layout:
    """What the whole checkpoint declares."""

    dequantize: bool
    """Whether readers unpack at load time."""
    has_experts: bool
    """Whether 3-D experts are packed."""

    def scale_dtype(self, entry: CoverageEntry) -> torch.dtype:
        """Dtype in which a weight's scales are stored; their values are exact in both."""
        exact = self.dequantize or len(entry.shape) == 3
        if exact or (entry.weight and entry.weight.scale_dtype == "float32"):
            return torch.float32
        return torch.bfloat16

    def model_dtype(self, keep_dtype: str) -> str:
        """The config's dtype: readers multiply experts in the dtype of their fp32 scales."""
        return "float32" if self.has_experts else keep_dtype


def layout(coverage: Coverage) -> Layout:
    """Choose the route for a coverage.

    Raises:
        UserError: no reader of the format can load this combination exactly.
    """
    experts = [entry for entry in coverage.quantized if len(entry.shape) == 3]
    dense = [entry for entry in coverage.quantized if len(entry.shape) == 2]
    asymmetric = [e for e in coverage.quantized if e.weight and not e.weight.symmetric]
    subclasses = [e for e in dense if e.module_class != "Linear"]
    for entry in experts:
        if entry in asymmetric:
            raise UserError(
                f"scheme.weight.symmetric=false: the experts {entry.name} cannot be stored; "
                "readers drop the zero points of experts. Use symmetric=true, or a rule for them"
            )
    if len({entry.weight for entry in experts}) > 1:
        raise UserError(
            "scheme.rules: experts can be stored with one weight spec for all layers only; readers "
            "look for one. Remove the rules that give others (keeping some layers is possible)"
        )
    dequantize = bool(asymmetric or subclasses)
    if dequantize:
        why = (
            "asymmetric weights"
            if asymmetric
            else f"{subclasses[0].module_class} (a subclass of Linear)"
        )
        if len({entry.weight for entry in dense}) > 1:
            raise UserError(
                f"scheme.rules: a model with {why} can be stored with one weight spec for all "
                "linear layers only; remove the rules that give others"
            )
        if any(entry.input for entry in dense):
            raise UserError(
                f"scheme.input: a model with {why} cannot be stored with quantized inputs; use "
                "symmetric weights, or scheme.input=null"
            )
    return Layout(dequantize=dequantize, has_experts=bool(experts))


def _weights_args(spec: QuantSpec) -> dict[str, Any]:
    return {
        "num_bits": spec.bits,
        "type": "int",
        "symmetric": spec.symmetric,
        "strategy": spec.granularity,
        "group_size": spec.group_size if spec.granularity == "group" else None,
        "dynamic": spec.dynamic,
    }


def _format(entry: CoverageEntry) -> str:
    return "int-quantized" if entry.input else "pack-quantized"


def quantization_config(coverage: Coverage, head: str | None) -> dict[str, Any]:
    """The ``quantization_config`` of config.json; ``head`` is the output head's module name.

    Raises:
        UserError: see `layout`.
    """
    chosen = layout(coverage)
    groups: dict[tuple[Any, ...], list[CoverageEntry]] = {}
    for entry in coverage.quantized:
        groups.setdefault((entry.weight, entry.input, len(entry.shape)), []).append(entry)
    # one spec for all: a class target, which inference engines match after fusing layers
    one = len({key[:2] for key in groups}) == 1
    config_groups: dict[str, Any] = {}
    for members in list(groups.values())[: 1 if one else None]:
        first = members[0]
        if one:
            targets = ["Linear"]
        elif len(first.shape) == 3:
            targets = [r"re:.*\.experts\..*"]
        else:
            targets = [entry.module for entry in members]
        assert first.weight is not None
        config_groups[f"group_{len(config_groups)}"] = {
            "targets": targets,
            "format": _format(first),
            "weights": _weights_args(first.weight),
            "input_activations": _weights_args(first.input) if first.input else None,
            "output_activations": None,
        }
    quantized = {entry.module for entry in coverage.quantized}
    ignore = [
        entry.module
        for entry in coverage.entries
        if entry.matmul or (len(entry.shape) == 2 and entry.module_class.endswith("Router"))
    ]
    ignore = [*ignore, head] if head else ignore
    formats = {group["format"] for group in config_groups.values()}
    config = {
        "quant_method": "compressed-tensors",
        "version": FORMAT_VERSION,
        "format": formats.pop() if len(formats) == 1 else "mixed-precision",
        "quantization_status": "compressed",
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
        "ignore": [name for name in dict.fromkeys(ignore) if name not in quantized],
        "config_groups": config_groups,
    }
    return config | ({"dequantize": True} if chosen.dequantize else {})


def weight_tensors(
    entry: CoverageEntry,
    prefix: str,
    codes: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    chosen: Layout,
) -> dict[str, Tensor]:
    """The stored tensors of one weight matrix.

    Args:
        entry: its coverage entry.
        prefix: module name in the checkpoint, without a final dot.
        codes: int8 [N, K].
        scale: fp32 [N, G], [N, 1] or [1, 1].
        zero_point: int8, like scale, or None.
        chosen: the checkpoint's layout.
    """
    spec = entry.weight
    assert spec is not None
    stored_scale = scale.to(chosen.scale_dtype(entry))
    if spec.granularity == "tensor":
        stored_scale = stored_scale.reshape(1)
    if entry.input is not None:
        return {f"{prefix}.weight": codes, f"{prefix}.weight_scale": stored_scale}
    tensors = {
        f"{prefix}.weight_packed": pack(codes, spec.bits),
        f"{prefix}.weight_scale": stored_scale.contiguous(),
        f"{prefix}.weight_shape": torch.tensor(codes.shape, dtype=torch.int64),
    }
    if zero_point is not None:
        tensors[f"{prefix}.weight_zero_point"] = (
            zero_point.reshape(1)
            if spec.granularity == "tensor"
            else pack(zero_point.t().contiguous(), spec.bits).t().contiguous()
        )
    return tensors
