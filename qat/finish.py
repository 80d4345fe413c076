"""The end of every run: convert, check, evaluate, describe; an artifact or an error, nothing half.

All of it happens in a staging directory that is renamed when it is complete, so that a run stopped
anywhere in here leaves no artifact and does this part again when it is resumed.
"""

import gc
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from qat import runtime
from qat.artifact import staged_directory, write_manifest
from qat.artifact_summary import bits_per_weight
from qat.card import CardFacts, model_card
from qat.convert import write_checkpoint
from qat.errors import UserError
from qat.evaluate import Quality, Reference, measure
from qat.fake_quant import set_enabled
from qat.fidelity import FidelityError, check_logits, check_merged, compare
from qat.generate import sample
from qat.manifest import describe_files
from qat.module import quantization_error
from qat.packed_layers import Int8Linear, PackedLinear
from qat.prepare import KEEP_DTYPES
from qat.provenance import base_metadata
from qat.report import Report, Row, gain_kept, write_report
from qat.result import Result
from qat.scheme import Scheme, describe
from qat.slices import Slices

FINISH_PHASES = ("write", "convert", "check", "evaluate")
"""Phases after training; all others belong to it."""


class GainError(RuntimeError):
    """The low-bit artifact keeps too little of what the training gained."""


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
    facts = CardFacts(
        provenance=result.provenance,
        metadata=_metadata(result),
        chat_template=result.tokenizer.chat_template,
        chat=result.chat,
    )
    known = describe_files(staging, skip=["README.md"])
    size = -1
    # twice as a rule: the size that the card states changes the card's length at most once
    while size != directory_bytes(staging):
        size = directory_bytes(staging)
        report.set_packed_size(size)
        (staging / "README.md").write_text(model_card(report, facts), encoding="utf-8")
        write_manifest(staging, result.provenance, known)


def _metadata(result: Result) -> dict[str, Any]:
    """Licence and language for the Hub, from the base model's card where it has one."""
    found = base_metadata(result.base, result.model)
    licence = getattr(result.trained.config, "license", None)
    known = {"license": licence, "language": result.language}
    return {key: value for key, value in known.items() if value} | found


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
        self.slices = Slices(result.batches)
        self.packed_bits = bits_per_weight(artifact)
        self.keep_dtype = KEEP_DTYPES[result.scheme.keep_dtype]
        weights = sum(p.numel() for p in original.parameters()) * self.keep_dtype.itemsize
        others = directory_bytes(artifact) - sum(
            path.stat().st_size for path in artifact.glob("*.safetensors")
        )
        self.full_size = weights + others
        self._add_full("original", original)

    def _measure(self, name: str, model: PreTrainedModel) -> Quality:
        return measure(model, self.result.batches, self.reference, name, self.slices)

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
