"""The end of every run: convert, check, evaluate, describe; an artifact or an error, nothing half.

All of it happens in a staging directory that is renamed when it is complete, so that a run stopped
anywhere in here leaves no artifact and does this part again when it is resumed.
"""

import gc
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from qat import runtime
from qat.artifact import staged_directory, write_manifest
from qat.artifact_summary import bits_per_weight
from qat.card import model_card
from qat.convert import write_checkpoint
from qat.evaluate import Reference, measure
from qat.fake_quant import set_enabled
from qat.fidelity import FidelityError, compare
from qat.generate import sample
from qat.memory import peak_memory_bytes
from qat.module import quantization_error
from qat.packing import Batch
from qat.prepare import KEEP_DTYPES, Coverage, prepare
from qat.report import Report, Row, environment, write_report
from qat.scheme import Scheme, describe
from qat.training import calibrate

Load = Callable[[], PreTrainedModel]


class Stopwatch:
    """Seconds by phase."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Add the time of the block to ``name``."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start


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
    predicted_memory_bytes: int
    """Predicted peak of one training process."""
    watch: Stopwatch = field(default_factory=Stopwatch)
    """Time spent so far."""

    def rounded(self, load: Load) -> PreTrainedModel:
        """A baseline: what ``load`` gives, rounded by the same scheme without training."""
        model = load()
        prepare(model, self.scheme)
        calibrate(model, self.calibration)
        return model.eval()


def finish(result: Result) -> Report:
    """Write ``artifact/``, check it, measure every row, write the report.

    Raises:
        FidelityError: the artifact is not the trained model; nothing is left behind.
        OSError: the disk is full; nothing is left behind.
    """
    trained = result.trained.eval()
    set_enabled(trained, True)
    watch = result.watch
    artifact = result.run / "artifact"
    with staged_directory(artifact, replace=True) as staging:
        with watch.phase("convert"):
            write_checkpoint(trained, result.tokenizer, result.coverage, result.scheme, staging)
        with watch.phase("check"):
            fidelity, reloaded = compare(trained, result.coverage, staging, result.batches)
        with watch.phase("evaluate"):
            measured = _measure_rows(result, reloaded, staging)
        report = Report(
            recipe=result.recipe,
            model=result.model,
            data=result.data,
            scheme=scheme_name(result.scheme),
            rows=measured.rows,
            fidelity=fidelity,
            coverage=result.coverage,
            quantization_error=quantization_error(trained),
            quantization_error_ptq=measured.error_ptq,
            sample={"prompt": result.prompt, "continuation": measured.sample},
            timing=watch.seconds,
            peak_memory_bytes=peak_memory_bytes(),
            predicted_memory_bytes=result.predicted_memory_bytes,
            data_fingerprint=result.data_fingerprint,
        )
        licence = getattr(trained.config, "license", None)
        (staging / "README.md").write_text(model_card(report, licence), encoding="utf-8")
        provenance = {
            "recipe": result.recipe,
            "model": result.model,
            "data": result.data,
            "data_fingerprint": result.data_fingerprint,
            "config": result.config,
            "environment": environment(),
        }
        write_manifest(staging, provenance)
    write_report(report, result.run)
    return report


def scheme_name(scheme: Scheme) -> str:
    """Short description of a scheme, for titles."""
    name = describe(scheme.weight) + " weights"
    return f"{name}, {describe(scheme.input)} inputs" if scheme.input else name


@dataclass
class _Measured:
    rows: dict[str, Row]
    error_ptq: dict[str, float]
    sample: str


def _measure_rows(result: Result, reloaded: PreTrainedModel | None, artifact: Path) -> _Measured:
    """All rows of the report; one model at a time beside the original."""
    original = result.load_original()
    reference = Reference(original, result.batches)
    keep = KEEP_DTYPES[result.scheme.keep_dtype]
    keep_bits = 8.0 * keep.itemsize
    full_size = sum(p.numel() for p in original.parameters()) * keep.itemsize
    packed_bits = bits_per_weight(artifact)
    packed_size = sum(path.stat().st_size for path in artifact.rglob("*") if path.is_file())
    rows: dict[str, Row] = {}

    def add(
        name: str, model: PreTrainedModel, bits: float | None, size: int, dtype: str = "fp32"
    ) -> None:
        rows[name] = Row(measure(model, result.batches, reference, name), bits, size, dtype)
        gc.collect()

    add("original", original, keep_bits, full_size)
    if result.load_finetuned is not None:
        add("finetuned", result.load_finetuned(), keep_bits, full_size)
    ptq = result.rounded(result.load_original)
    error_ptq = quantization_error(ptq)
    add("ptq", ptq, packed_bits, packed_size)
    del ptq
    if result.load_finetuned is not None:
        add("finetuned_ptq", result.rounded(result.load_finetuned), packed_bits, packed_size)
    add("trained", result.trained, packed_bits, packed_size)
    if reloaded is not None:
        # else memory did not allow it, which the fidelity section says
        add("artifact", reloaded, packed_bits, packed_size)
        losses = [rows[name].quality.loss for name in ("artifact", "trained")]
        if losses[0] != losses[1]:
            raise FidelityError(f"losses of artifact and trained module differ: {losses}")
    served = runtime.load_packed(artifact, dtype=torch.bfloat16)
    add("served", served, packed_bits, packed_size, "bf16")
    text = sample(served, result.tokenizer, result.prompt, max_new_tokens=48)
    return _Measured(rows, error_ptq, text)
