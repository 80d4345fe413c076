"""The end of every run: convert, check, evaluate, describe; an artifact or an error, nothing half.

All of it happens in a staging directory that is renamed when it is complete, so that a run stopped
anywhere in here leaves no artifact and does this part again when it is resumed.
"""

import gc
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from qat import runtime
from qat.adapter_state import has_adapters
from qat.artifact import staged_directory, write_manifest
from qat.artifact_summary import bits_per_weight
from qat.card import model_card
from qat.convert import write_checkpoint
from qat.errors import UserError
from qat.evaluate import Quality, Reference, measure
from qat.fake_quant import set_enabled
from qat.fidelity import FidelityError, check_logits, check_merged, compare
from qat.generate import sample
from qat.memory import Prediction
from qat.memory_meter import MemoryMeter, peak_memory_bytes
from qat.module import quantization_error
from qat.packed_layers import Int8Linear, PackedLinear
from qat.packing import Batch
from qat.prepare import KEEP_DTYPES, Coverage, prepare
from qat.report import Report, Row, environment, gain_kept, write_report
from qat.scheme import Scheme, describe
from qat.training import calibrate

Load = Callable[[], PreTrainedModel]

FINISH_PHASES = ("write", "convert", "check", "evaluate")
"""Phases after training; all others belong to it."""


class GainError(RuntimeError):
    """The low-bit artifact keeps too little of what the training gained."""


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

    @property
    def provenance(self) -> dict[str, Any]:
        """Where the outputs come from, for their manifests."""
        return {
            "recipe": self.recipe,
            "model": self.model,
            "data": self.data,
            "data_fingerprint": self.data_fingerprint,
            "config": self.config,
            "environment": environment(),
        }

    @property
    def trained_is_artifact(self) -> bool:
        """Whether the last step computed with the weights that are shipped."""
        return self.adapters is None or self.adapters.trained_merged


def finish(result: Result) -> Report:
    """Write ``artifact/``, check it, measure every row, write the report.

    Raises:
        FidelityError: the artifact is not the trained model; nothing is left behind.
        GainError: the artifact keeps too little of what adapters gained; it is not left behind.
        OSError: the disk is full; nothing is left behind.
    """
    trained = result.trained.eval()
    set_enabled(trained, True)
    watch = result.watch
    with staged_directory(result.run / "artifact", replace=True) as staging:
        with watch.phase("convert"):
            write_checkpoint(trained, result.tokenizer, result.coverage, result.scheme, staging)
        with watch.phase("check"):
            fidelity, reloaded = compare(trained, result.coverage, staging, result.batches)
        with watch.phase("evaluate"):
            measured = _Measurement(result, staging)
            measured.plain_rows()
            measured.packed_rows(reloaded)
            del reloaded
            gc.collect()  # models that were prepared or reloaded are cycles: del frees nothing yet
            measured.baseline_rows()
        report = Report(
            recipe=result.recipe,
            model=result.model,
            data=result.data,
            scheme=scheme_name(result.scheme),
            keep_dtype=result.scheme.keep_dtype,
            rows=measured.rows,
            fidelity=fidelity,
            coverage=result.coverage,
            quantization_error=quantization_error(trained),
            quantization_error_ptq=measured.error_ptq,
            sample={"prompt": result.prompt, "continuation": measured.sample},
            timing=watch.seconds,
            adapter=result.adapters.facts if result.adapters else None,
            packed=frozenset(measured.packed),
            outputs=measured.outputs,
            peak_memory_bytes=watch.peak,
            predicted_memory_bytes=result.prediction.memory if result.prediction else None,
            memory=_memory(result),
            data_fingerprint=result.data_fingerprint,
            data_summary=result.data_summary,
        )
        _describe(result, report, staging)
    write_report(report, result.run)
    return report


def _memory(result: Result) -> dict[str, dict[str, int]]:
    """Peaks of training and finish in host memory, predicted and measured, bytes."""
    meter, prediction = result.watch.memory, result.prediction
    if meter is None or prediction is None:
        return {}
    after = prediction.phases["finish"]
    before = max(value for name, value in prediction.phases.items() if name != "finish")
    measured: dict[str, int] = {}
    for name, value in meter.host.items():
        phase = "finish" if name in FINISH_PHASES else "train"
        measured[phase] = max(value, measured.get(phase, 0))
    return {
        "train": {"predicted": before, "measured": measured.get("train", 0)},
        "finish": {"predicted": after, "measured": measured.get("finish", 0)},
    }


def _describe(result: Result, report: Report, staging: Path) -> None:
    """Write model card and manifest; the card states the size of the whole, itself included."""
    licence = getattr(result.trained.config, "license", None)
    provenance = result.provenance
    size = -1
    # twice as a rule: the size that the card states changes the card's length at most once
    while size != directory_bytes(staging):
        size = directory_bytes(staging)
        report.set_packed_size(size)
        (staging / "README.md").write_text(model_card(report, licence), encoding="utf-8")
        write_manifest(staging, provenance)


def scheme_name(scheme: Scheme) -> str:
    """Short description of a scheme, for titles."""
    name = describe(scheme.weight) + " weights"
    return f"{name}, {describe(scheme.input)} inputs" if scheme.input else name


def directory_bytes(directory: Path) -> int:
    """Size of all files below a directory."""
    return sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())


class _Measurement:
    """The rows of the report, measured one model at a time beside the original."""

    def __init__(self, result: Result, artifact: Path) -> None:
        self.result = result
        self.artifact = artifact
        self.rows: dict[str, Row] = {}
        self.packed: set[str] = set()
        self.outputs: dict[str, str] = {}
        self.error_ptq: dict[str, float] = {}
        self.sample = ""
        original = result.load_original()
        self.reference = Reference(original, result.batches)
        self.packed_bits = bits_per_weight(artifact)
        self.keep_dtype = KEEP_DTYPES[result.scheme.keep_dtype]
        weights = sum(p.numel() for p in original.parameters()) * self.keep_dtype.itemsize
        others = directory_bytes(artifact) - sum(
            path.stat().st_size for path in artifact.glob("*.safetensors")
        )
        self.full_size = weights + others
        self._add_full("original", original)

    def _measure(self, name: str, model: PreTrainedModel) -> Quality:
        return measure(model, self.result.batches, self.reference, name)

    def _add(self, name: str, model: PreTrainedModel, dtype: str = "fp32") -> None:
        """A row of something that has the artifact's layout."""
        quality = self._measure(name, model)
        self.rows[name] = Row(quality, self.packed_bits, directory_bytes(self.artifact), dtype)
        self.packed.add(name)

    def _add_full(self, name: str, model: PreTrainedModel) -> None:
        """A row of a 16-bit model."""
        quality = self._measure(name, model)
        self.rows[name] = Row(quality, 8.0 * self.keep_dtype.itemsize, self.full_size, "fp32")

    def plain_rows(self) -> None:
        """Adapters in their plain form, and what was written of it, where that was trained."""
        adapters = self.result.adapters
        if adapters is None:
            return
        self.outputs = dict.fromkeys(adapters.outputs, "not compared")
        if not adapters.trained_merged:
            trained = self.result.trained
            set_enabled(trained, False)
            bits, size = adapters.bits_per_weight, adapters.size_bytes
            self.rows["trained"] = Row(self._measure("trained", trained), bits, size, "fp32")
            if adapters.nf4_caveat is not None:
                self.outputs["nf4"] = f"not compared: {adapters.nf4_caveat}"
            elif adapters.load_nf4 is not None:
                with self._removed_if_wrong("nf4"):
                    reloaded = adapters.load_nf4()
                    check_logits(trained, reloaded, self.result.batches, "nf4/")
                self.outputs["nf4"] = "logits equal (transformers, bitsandbytes and PEFT, fp32)"
                self.rows["nf4"] = Row(self._measure("nf4", reloaded), bits, size, "fp32")
                del reloaded
                gc.collect()
            set_enabled(trained, True)
        if adapters.load_merged is not None:
            with self._removed_if_wrong("merged"):
                merged = adapters.load_merged()
                check_merged(self.result.trained, self.result.coverage, merged, self.keep_dtype)
            self.outputs["merged"] = "weights equal"
            self._add_full("merged", merged)

    @contextmanager
    def _removed_if_wrong(self, output: str) -> Iterator[None]:
        """An output that is not the trained model must not stay."""
        try:
            yield
        except FidelityError:
            shutil.rmtree(self.result.run / output)
            raise

    def packed_rows(self, reloaded: PreTrainedModel | None) -> None:
        """The trained module, the artifact (unless memory was too short for it), and as served."""
        if self.result.trained_is_artifact:
            self._add("trained", self.result.trained)
        if reloaded is not None:
            self._add("artifact", reloaded)
            losses = [self.rows[name].quality.loss for name in ("artifact", "trained")]
            if self.result.trained_is_artifact and losses[0] != losses[1]:
                raise FidelityError(f"losses of artifact and trained module differ: {losses}")
            self._check_gain()
        served = runtime.load_packed(self.artifact, dtype=torch.bfloat16)
        packed = any(isinstance(m, PackedLinear | Int8Linear) for m in served.modules())
        how = "packed weights" if packed else "plain transformers: no packed layer covers it"
        self._add("served", served, dtype=f"bf16, {how}")
        try:
            self.sample = sample(
                served,
                self.result.tokenizer,
                self.result.prompt,
                max_new_tokens=48,
                chat=self.result.chat,
            )
        except UserError as error:
            # a prompt that the model has no room for must not cost the trained artifact
            self.sample = f" [no sample: {error}]"

    def _check_gain(self) -> None:
        adapters, kept = self.result.adapters, gain_kept(self.rows)
        if adapters is None or adapters.min_gain_kept is None or kept is None:
            return
        if not kept >= adapters.min_gain_kept:
            losses = {name: f"{row.quality.loss:.4f}" for name, row in self.rows.items()}
            raise GainError(
                f"gain kept: {kept:.1%}, below min_gain_kept={adapters.min_gain_kept}. Losses in "
                f"nats: original {losses['original']}, trained {losses['trained']}, artifact "
                f"{losses['artifact']}. The adapter is in {self.result.run / 'adapter'}; the "
                "artifact was not kept. Train the end of the run in the merged form "
                "(merge_share=0.3, as recipe=qlora_int4 does), take a wider scheme, train longer, "
                "or accept this one: resume the run with a lower min_gain_kept, or null"
            )

    def baseline_rows(self) -> None:
        """The original rounded, and the 16-bit fine-tune as it is and rounded."""
        result = self.result
        ptq = result.rounded(result.load_original)
        self.error_ptq = quantization_error(ptq)
        self._add("ptq", ptq)
        del ptq
        gc.collect()
        if result.load_finetuned is not None:
            self._add_full("finetuned", result.load_finetuned())
            self._add("finetuned_ptq", result.rounded(result.load_finetuned))
