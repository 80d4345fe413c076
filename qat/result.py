"""What a run hands to `qat.finish`: the trained model and everything that it is compared with."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerFast

from qat.adapter_state import has_adapters
from qat.fake_quant import set_enabled
from qat.memory import Prediction
from qat.memory_meter import MemoryMeter, peak_memory_bytes
from qat.packing import IGNORE, Batch
from qat.prepare import Coverage, prepare
from qat.provenance import base_identity, converter, git_state, public_config, public_name
from qat.report import environment
from qat.scheme import Scheme
from qat.training import calibrate

Load = Callable[[], PreTrainedModel]


class Stopwatch:
    """Seconds by phase, and with a meter the peak memory of each."""

    def __init__(self, memory: MemoryMeter | None = None) -> None:
        self.seconds: dict[str, float] = {}
        self.memory = memory

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Add the time of the block to ``name``."""
        start = time.perf_counter()
        try:
            with nullcontext() if self.memory is None else self.memory.phase(name):
                yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start

    @property
    def peak(self) -> int:
        """Peak memory, bytes: growth since the meter was made, else of the whole process."""
        return peak_memory_bytes() if self.memory is None else self.memory.peak


@dataclass(frozen=True)
class AdapterResult:
    """What an adapter run adds to its `Result`."""

    trained_merged: bool
    """Whether training ended in the merged form: then the artifact must equal it exactly."""
    min_gain_kept: float | None
    """Least share of the training's gain that the artifact must keep; None judges nothing."""
    bits_per_weight: float
    """Of the base's linear layers."""
    size_bytes: int
    """Base and adapter, as they are shipped together."""
    load_nf4: Load | None
    """Loads ``nf4/`` with plain transformers, bitsandbytes and PEFT, fp32; must equal trained."""
    nf4_caveat: str | None
    """Why that reader computes another model on this kind of machine, or None."""
    load_merged: Load | None
    """Loads ``merged/``, fp32."""
    outputs: Sequence[str]
    """Names of what was written beside the artifact."""
    facts: dict[str, Any]
    """For the report: rank, parameters, hash of the base."""


@dataclass
class Result:
    """A trained model and everything that its report compares it with."""

    run: Path
    """Directory of the run."""
    recipe: str
    """Name of the recipe."""
    model: str
    """What the user gave as model."""
    data: str
    """What the user gave as data."""
    config: dict[str, Any]
    """Resolved configuration, for the manifest."""
    trained: PreTrainedModel
    """The prepared, trained model."""
    coverage: Coverage
    """Its coverage."""
    scheme: Scheme
    """Its scheme."""
    tokenizer: PreTrainedTokenizerFast
    """Saved with the artifact."""
    load_original: Load
    """Loads the model before training, fp32."""
    load_finetuned: Load | None
    """Loads the 16-bit fine-tune, fp32 values on the 16-bit grid; None if none was asked for."""
    batches: Sequence[Batch]
    """Held-out text."""
    calibration: Sequence[Batch]
    """Text that calibrates static ranges of the rounded baselines."""
    data_fingerprint: str
    """Identifies the training text."""
    prompt: str
    """Prompt of the sample."""
    chat: bool = field(default=False, kw_only=True)
    """Whether the prompt is a user's turn in the tokenizer's chat template."""
    data_summary: dict[str, Any] | None = field(default=None, kw_only=True)
    """What was read of instruction data, for the report."""
    data_class: str = field(default="text", kw_only=True)
    """What kind of text it is, in words."""
    base: Path | None = field(default=None, kw_only=True)
    """Directory of the base model; None for a Hub id, which lies in the cache."""
    language: str | None = field(default=None, kw_only=True)
    """Language of the model where it is known, as the Hub writes it: en."""
    command: str | None = field(default=None, kw_only=True)
    """What makes this run again, without local paths."""
    prediction: Prediction | None = field(default=None, kw_only=True)
    """What was predicted of memory and disk."""
    adapters: AdapterResult | None = None
    """What there is to say of adapters; None for a model that was trained whole."""
    watch: Stopwatch = field(default_factory=Stopwatch)
    """Time spent so far."""

    def rounded(self, load: Load) -> PreTrainedModel:
        """A baseline: what ``load`` gives, rounded by the same scheme without training."""
        model = load()
        if has_adapters(model):
            set_enabled(model, True)  # merged, then rounded
        else:
            prepare(model, self.scheme)
        calibrate(model, self.calibration)
        return model.eval()

    @cached_property
    def provenance(self) -> dict[str, Any]:
        """Where the outputs come from, for manifests and model cards; without local paths."""
        blocks = sum(len(batch["input_ids"]) for batch in self.calibration)
        static = any(e.input and not e.input.dynamic for e in self.coverage.quantized)
        return {
            "recipe": self.recipe,
            "model": public_name(self.model),
            "base": base_identity(self.model, self.base),
            "data": public_name(self.data),
            "data_class": self.data_class,
            "data_fingerprint": self.data_fingerprint,
            # ranges of static inputs only: scales of weights come from the weights
            "calibration_blocks": blocks if static else 0,
            "evaluation_tokens": sum(int((b["labels"] != IGNORE).sum()) for b in self.batches),
            "seeds": {"run": self.config.get("seed")},
            "command": self.command,
            "config": public_config(self.config),
            "git": git_state(),
            "converter": converter(),
            "environment": environment(),
        }

    @property
    def trained_is_artifact(self) -> bool:
        """Whether the last step computed with the weights that are shipped."""
        return self.adapters is None or self.adapters.trained_merged
