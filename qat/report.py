"""The run's report: ``report.json`` for scripts, ``report.md`` with plots for people."""

import json
import math
import platform
import re
from dataclasses import asdict, dataclass, field, replace
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from qat.evaluate import Quality
from qat.fidelity import Fidelity
from qat.prepare import Coverage
from qat.slices import SliceRow, compare_slices

ROWS = {
    "original": "the model before training",
    "finetuned": "same data, steps and seed in 16 bit",
    "ptq": "the original, rounded",
    "finetuned_ptq": "the 16-bit fine-tune, rounded",
    "trained": "the module as it was trained",
    "nf4": "4-bit base and adapter in transformers, bitsandbytes and PEFT",
    "merged": "the adapter merged, in 16 bit",
    "artifact": "reloaded from disk by plain transformers",
    "served": "as `qat generate` runs it",
}
"""Row name → what it is, in the order of the table."""


FIGURES = ("loss", "perplexity", "kl_to_original", "top1_agreement", "tokens")
"""What report.json says of the quality of a row."""


@dataclass(frozen=True)
class Row:
    """One model's figures."""

    quality: Quality
    """Measured on the held-out blocks."""
    bits_per_weight: float | None
    """Bits of the quantized matrices with their scales and zero points, per weight."""
    size_bytes: int | None
    """Size of everything that would be shipped."""
    dtype: str
    """Arithmetic of the measurement."""


@dataclass
class Report:
    """Everything that a run has to say about its result."""

    recipe: str
    """Name of the recipe."""
    model: str
    """What was trained."""
    data: str
    """What it was trained on."""
    scheme: str
    """Short description of the quantization."""
    keep_dtype: str
    """Dtype of what is not quantized."""
    rows: dict[str, Row]
    """Row name → figures."""
    fidelity: Fidelity
    """Comparison of the artifact with the trained module."""
    coverage: Coverage
    """One entry per parameter."""
    quantization_error: dict[str, float]
    """Relative error of each quantized weight after training."""
    quantization_error_ptq: dict[str, float]
    """The same for the original, rounded."""
    sample: dict[str, str]
    """Prompt and continuation."""
    timing: dict[str, float]
    """Seconds by phase, of this process."""
    peak_memory_bytes: int
    """Measured peak: growth since before the model was loaded."""
    predicted_memory_bytes: int | None
    """Predicted peak, the larger of training and finish."""
    data_fingerprint: str
    """Identifies the training text."""
    packed: frozenset[str]
    """Rows of models that have the artifact's layout."""
    data_summary: dict[str, Any] | None = None
    """What was read of instruction data: format, template, rows left out, packing."""
    outputs: dict[str, str] = field(default_factory=dict)
    """Output of an adapter run → result of comparing it with the trained model."""
    memory: dict[str, dict[str, int]] = field(default_factory=dict)
    """Predicted and measured peaks of host memory in training and in the finish, bytes."""
    adapter: dict[str, Any] | None = None
    """Facts on the adapters, of a run that trained them."""
    environment: dict[str, Any] = field(default_factory=lambda: environment())

    def set_packed_size(self, size_bytes: int) -> None:
        """State the size of the finished artifact in all rows that have its layout."""
        for name, row in self.rows.items():
            if name in self.packed:
                self.rows[name] = replace(row, size_bytes=size_bytes)

    @property
    def recovered(self) -> float | None:
        """Share of the rounding loss of a fine-tune that the training removed, by loss in nats."""
        names = ("finetuned", "finetuned_ptq", "artifact")
        if not all(name in self.rows for name in names):
            return None
        finetuned, rounded, artifact = (self.rows[name].quality.loss for name in names)
        return (rounded - artifact) / (rounded - finetuned) if rounded != finetuned else None

    def to_json(self) -> dict[str, Any]:
        """The content of report.json; infinities and NaN become null."""
        content: dict[str, Any] = {
            "recipe": self.recipe,
            "model": self.model,
            "data": self.data,
            "scheme": self.scheme,
            "rows": {
                name: {key: getattr(row.quality, key) for key in FIGURES}
                | {
                    "bits_per_weight": row.bits_per_weight,
                    "size_bytes": row.size_bytes,
                    "dtype": row.dtype,
                }
                for name, row in self.rows.items()
            },
            "slices": [asdict(part) for part in slice_rows(self)],
            "recovered": self.recovered,
            "fidelity": asdict(self.fidelity) | ({"outputs": self.outputs} if self.outputs else {}),
            "coverage": [asdict(entry) for entry in self.coverage.entries],
            "quantized_share": self.coverage.share,
            "quantization_error": self.quantization_error,
            "quantization_error_ptq": self.quantization_error_ptq,
            "gain_kept": gain_kept(self.rows) if self.adapter else None,
            "adapter": self.adapter,
            "instruction_data": self.data_summary,
            "timing": self.timing,
            "peak_memory_bytes": self.peak_memory_bytes,
            "predicted_memory_bytes": self.predicted_memory_bytes,
            "memory": self.memory,
            "data_fingerprint": self.data_fingerprint,
            "environment": self.environment,
            "sample": self.sample,
        }
        cleaned: dict[str, Any] = _finite(content)
        return cleaned


def gain_kept(rows: dict[str, Row]) -> float | None:
    """Share of the training's gain that the artifact keeps, by loss in nats.

    (original - artifact) / (original - trained); None where a row is missing or nothing was gained.
    """
    if not all(name in rows for name in ("original", "trained", "artifact")):
        return None
    original, trained, artifact = (
        rows[name].quality.loss for name in ("original", "trained", "artifact")
    )
    return (original - artifact) / (original - trained) if trained < original else None


def slice_rows(report: Report) -> list[SliceRow]:
    """The parts of the held-out text, those in which the artifact lost most first."""
    losses = {name: row.quality.slices for name, row in report.rows.items()}
    return compare_slices(losses, _shipped(report), _against(report))


def _shipped(report: Report) -> str | None:
    """Name of the row that stands for the artifact: as served, where it was not reloaded."""
    return next((name for name in ("artifact", "served") if name in report.rows), None)


def _against(report: Report) -> str | None:
    """The same training without the artifact's low bits: in 16 bit, else before the merge."""
    if "finetuned" in report.rows:
        return "finetuned"
    return "trained" if "trained" in report.rows.keys() - report.packed else None


def slice_table(report: Report) -> str:
    """`slice_rows` as a Markdown table."""
    against = _against(report)
    wanted = ("original", against, _shipped(report))
    names = [name for name in wanted if name is not None and name in report.rows]
    head = ["part of the held-out text", "targets", *(f"`{n}`" for n in names), "change"]
    head += ["low bits"] if against else []
    lines = [f"| {' | '.join(head)} |", "|---|" + "---:|" * (len(head) - 1)]
    for row in slice_rows(report):
        cells = [row.slice, f"{row.tokens:,}"]
        cells += [f"{row.loss[name]:.4f}" if name in row.loss else "" for name in names]
        changes = [row.change, row.low_bits][: 2 if against else 1]
        cells += ["" if change is None else f"{change:+.4f}" for change in changes]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def environment() -> dict[str, Any]:
    """Versions, hardware and threads."""
    packages = (
        *("torch", "lightning", "transformers", "compressed-tensors", "peft", "bitsandbytes"),
        *("accelerate", "safetensors", "tokenizers", "triton", "liger-kernel", "qat-lightning"),
    )
    versions = {}
    for package in packages:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = "not installed"
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "python": platform.python_version(),
        "versions": versions,
        "platform": f"{platform.system()} {platform.machine()}",
        "cpu": _cpu_name(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "gpu": gpu,
    }


def _cpu_name() -> str | None:
    """Model of the processor, where the system tells it."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return platform.processor() or None
    match = re.search(r"^model name\s*:\s*(.+?)\s*$", text, re.MULTILINE)
    return match[1] if match else None


def table(report: Report) -> str:
    """The rows as a Markdown table."""
    lines = [
        "| model | loss | perplexity | KL to original | top-1 agreement | bits/weight | size | |",
        "|---|---:|---:|---:|---:|---:|---:|---|",
    ]
    for name, what in ROWS.items():
        row = report.rows.get(name)
        if row is None:
            continue
        q = row.quality
        kl = "" if q.kl_to_original is None else f"{q.kl_to_original:.4f}"
        top = "" if q.top1_agreement is None else f"{q.top1_agreement:.1%}"
        bits = "" if row.bits_per_weight is None else f"{row.bits_per_weight:.2f}"
        size = "" if row.size_bytes is None else f"{row.size_bytes / 1e6:.2f} MB"
        lines.append(
            f"| `{name}` | {q.loss:.4f} | {q.perplexity:.2f} | {kl} | {top} | {bits} | {size} "
            f"| {what}, {row.dtype} |"
        )
    return "\n".join(lines)


def verdict(report: Report) -> str:
    """What the run proves: fidelity, gain kept, recovery."""
    f = report.fidelity
    weights = "not compared" if f.weights_equal is None else f"equal ({f.weights_compared})"
    text = (
        f"Fidelity: codes equal ({f.codes_compared} matrices, unpacked by compressed-tensors), "
        f"weights {weights}, logits {f.logits}"
        + (f" ({f.logit_blocks} blocks of text, fp32)." if f.logit_blocks else ".")
    )
    for name, result in report.outputs.items():
        text += f" {name}/: {result}."
    if report.adapter is not None:
        kept = gain_kept(report.rows)
        if kept is not None:
            text += f" Gain kept: {kept:.2%} of what training gained over the original."
        elif "artifact" in report.rows:
            text += " Gain kept: nothing was gained over the original."
        else:
            text += " Gain kept: not measured, and not judged, since the artifact was not reloaded."
    if report.recovered is not None:
        text += (
            f" Recovered: {report.recovered:.1%} of the loss that rounding the 16-bit fine-tune "
            "costs."
        )
    return text


def write_report(report: Report, run: Path) -> None:
    """Write plots, report.md and, last, report.json (whose presence marks a finished run)."""
    # imported here: it imports this module
    from qat.report_plots import draw

    plots = draw(report, run)
    body = [
        f"# {report.recipe}: {report.model}",
        "",
        f"{report.scheme}, trained on {report.data}.",
        "",
        verdict(report),
        "",
        table(report),
        "",
        *_slice_lines(report),
        *[f"![{title}]({name})\n" for name, title in plots.items()],
        "## Sample",
        "",
        *_quoted(report.sample),
        "",
        *_adapter_lines(report),
        "## Coverage",
        "",
        "```",
        report.coverage.summary(),
        "```",
        "",
        "## Run",
        "",
        *[f"- {name}: {seconds:.1f} s" for name, seconds in report.timing.items()],
        f"- peak memory: {report.peak_memory_bytes / 2**20:,.0f} MiB more than before the model "
        "was loaded",
        *[
            f"- peak of {phase}: {peak['measured'] / 2**20:,.0f} MiB of RAM, predicted "
            f"{peak['predicted'] / 2**20:,.0f} MiB"
            for phase, peak in report.memory.items()
        ],
        f"- environment: {json.dumps(report.environment)}",
        "",
    ]
    (run / "report.md").write_text("\n".join(body), encoding="utf-8")
    temporary = run / ".report.json.tmp"
    temporary.write_text(json.dumps(report.to_json(), indent=2) + "\n", encoding="utf-8")
    temporary.rename(run / "report.json")


def _slice_lines(report: Report) -> list[str]:
    if not slice_rows(report):
        return []
    return ["## Loss by part of the held-out text", "", slice_table(report), ""]


def _adapter_lines(report: Report) -> list[str]:
    """Sections of an adapter run: what was trained, on which rows."""
    lines = []
    if report.adapter is not None:
        facts = report.adapter
        lines += [
            "## Adapter",
            "",
            f"- rank {facts['rank']}, {facts['trained_parameters']:,} trained parameters on a base "
            f"of {facts['base_bits_per_weight']:.3f} bits per weight ({facts['base']})",
            f"- {facts['merge_share']:.0%} of the steps, at the end, on the merged and quantized "
            "weights",
            f"- base sha256 `{facts['base_sha256']}`",
            "",
        ]
    if report.data_summary is not None:
        lines += ["## Instruction data", "", "```"]
        lines += [json.dumps(report.data_summary, indent=2, ensure_ascii=False), "```", ""]
    return lines


def _quoted(sample: dict[str, str]) -> list[str]:
    lines = f"**{sample['prompt']}**{sample['continuation']}".splitlines() or [""]
    return [f"> {line}" for line in lines]
