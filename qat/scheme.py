"""The quantization scheme: one frozen tree that every part of the project reads.

A `Scheme` says how weights and inputs of linear layers are quantized and which modules differ.
Rules are wildcards on module names (``model.layers.0.*``, ``*.down_proj``, ``lm_head``); the first
match wins. Without a rule, linear layers and experts are quantized, and embeddings, the output
head, norms and biases are kept in `keep_dtype`.
"""

import fnmatch
from dataclasses import dataclass, field
from typing import Literal

from qat_kernels import QuantSpec
from qat_kernels.numerics import Granularity, Grid


@dataclass(frozen=True)
class InputSpec(QuantSpec):
    """How inputs of linear layers are quantized; by default int8, dynamic, per token.

    Static ranges: granularity=tensor dynamic=false scale_dtype=bfloat16.
    """

    bits: int = 8
    """Bits per code; readers know 8."""
    granularity: Granularity = "token"
    """token (dynamic) or tensor (static)."""
    grid: Grid = "absmax"
    """Readers compute absmax."""
    scale_dtype: Literal["bfloat16", "float32"] = "float32"
    """float32 for dynamic scales, which are never stored; bfloat16 for static ones."""
    dynamic: bool = True
    """Compute the scale at run time for each token; false calibrates one scale per layer."""


@dataclass(frozen=True)
class Rule:
    """What to do with the modules whose name matches."""

    match: str
    """Wildcard on module names, for example ``*.mlp.down_proj`` or ``lm_head``."""
    action: Literal["quantize", "keep"] = "quantize"
    """quantize (with the specs below) or keep in 16 bit."""
    weight: QuantSpec | None = None
    """Weight spec of these modules; null takes the scheme's."""
    input: InputSpec | None = None
    """Input spec of these modules; null takes the scheme's."""

    def __post_init__(self) -> None:
        """Raise ValueError for a rule that contradicts itself."""
        if self.action == "keep" and (self.weight or self.input):
            raise ValueError(f"action=keep: the rule {self.match!r} must not give specs too")


@dataclass(frozen=True)
class ObserverConfig:
    """How static activation ranges are found."""

    kind: Literal["ema_minmax", "percentile"] = "ema_minmax"
    """ema_minmax follows the extremes, percentile ignores rare outliers."""
    momentum: float = 0.05
    """Weight of the newest step in the moving average, above 0 and at most 1."""
    percentile: float = 99.99
    """Percentile of |x| that becomes the range; read only by kind=percentile."""
    calibration_blocks: int = 16
    """Text blocks that calibrate the ranges before training."""
    freeze_after_steps: int | None = None
    """Optimizer step from which ranges stop moving; null freezes at three quarters of the run."""

    def __post_init__(self) -> None:
        """Raise ValueError for a value outside its range."""
        if not 0 < self.momentum <= 1:
            raise ValueError(f"momentum={self.momentum}: above 0 and at most 1")
        if not 50 < self.percentile <= 100:
            raise ValueError(f"percentile={self.percentile}: above 50 and at most 100")
        if self.calibration_blocks < 1:
            raise ValueError(f"calibration_blocks={self.calibration_blocks}: at least 1")
        if self.freeze_after_steps is not None and self.freeze_after_steps < 0:
            raise ValueError(f"freeze_after_steps={self.freeze_after_steps}: at least 0")


@dataclass(frozen=True)
class Scheme:
    """Specs for weights and inputs, and the modules that differ."""

    weight: QuantSpec = field(default_factory=QuantSpec)
    """How weights of linear layers and experts are quantized."""
    input: InputSpec | None = None
    """How inputs of linear layers are quantized; null leaves them in 16 bit."""
    rules: list[Rule] = field(default_factory=list)
    """Exceptions by module name, first match wins: [{match: lm_head, action: quantize}]."""
    keep_dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    """Dtype in which everything that is kept is saved; training already sees it rounded."""
    enable_after_steps: int = 0
    """Optimizer steps of plain training before fake-quantization sets in."""
    min_coverage: float = 0.5
    """Least share of the linear layers' parameters that must be quantized."""
    observer: ObserverConfig = field(default_factory=ObserverConfig)
    """Ranges of static activation quantization."""

    def __post_init__(self) -> None:
        """Raise ValueError for a combination that cannot be trained or stored."""
        if self.weight.granularity == "token":
            raise ValueError("weight.granularity=token: tensor, channel or group for weights")
        if self.enable_after_steps < 0:
            raise ValueError(f"enable_after_steps={self.enable_after_steps}: at least 0")
        if not 0 <= self.min_coverage <= 1:
            raise ValueError(f"min_coverage={self.min_coverage}: between 0 and 1")
        for spec in [self.input, *(rule.input for rule in self.rules)]:
            if spec is not None:
                _check_input(spec)

    def rule_for(self, name: str) -> Rule | None:
        """The first rule that matches a module name, or None."""
        for rule in self.rules:
            if fnmatch.fnmatchcase(name, rule.match):
                return rule
        return None


def _check_input(spec: QuantSpec) -> None:
    if spec.granularity not in ("tensor", "token"):
        raise ValueError(
            f"input.granularity={spec.granularity}: tensor (static) or token (dynamic=true)"
        )
    if not spec.symmetric or spec.grid != "absmax":
        raise ValueError("input takes symmetric=true and grid=absmax: readers compute just that")
    if spec.bits != 8:
        raise ValueError(f"input.bits={spec.bits}: activations are quantized to 8 bits")
    if spec.dynamic != (spec.scale_dtype == "float32"):
        raise ValueError(
            "input.scale_dtype: float32 for dynamic scales (they are never stored), "
            "bfloat16 for static ones"
        )


def describe(spec: QuantSpec) -> str:
    """Short name of a spec for tables: ``int4 g32 signed_absmax``."""
    size = {
        "group": f"g{spec.group_size}",
        "channel": "channel",
        "tensor": "tensor",
        "token": "token",
    }[spec.granularity]
    kind = "" if spec.symmetric else " asymmetric"
    return f"{spec.family}{spec.bits} {size} {spec.grid}{kind}"
