"""The run's report: ``report.json`` for scripts, ``report.md`` with plots for people."""

import json
import math
import platform
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from qat.evaluate import Quality
from qat.fidelity import Fidelity
from qat.loggers import read_metrics
from qat.prepare import Coverage

ROWS = {
    "original": "the model before training",
    "finetuned": "same data, steps and seed in 16 bit",
    "ptq": "the original, rounded",
    "finetuned_ptq": "the 16-bit fine-tune, rounded",
    "trained": "the fake-quantized module",
    "artifact": "reloaded from disk by plain transformers",
    "served": "packed weights through qat_kernels",
}
"""Row name → what it is, in the order of the table."""


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
    """Measured peak."""
    predicted_memory_bytes: int
    """Predicted peak of one training process."""
    data_fingerprint: str
    """Identifies the training text."""
    environment: dict[str, Any] = field(default_factory=lambda: environment())

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
                name: asdict(row.quality)
                | {
                    "bits_per_weight": row.bits_per_weight,
                    "size_bytes": row.size_bytes,
                    "dtype": row.dtype,
                }
                for name, row in self.rows.items()
            },
            "recovered": self.recovered,
            "fidelity": asdict(self.fidelity),
            "coverage": [asdict(entry) for entry in self.coverage.entries],
            "quantized_share": self.coverage.share,
            "quantization_error": self.quantization_error,
            "quantization_error_ptq": self.quantization_error_ptq,
            "gain_kept": None,
            "timing": self.timing,
            "peak_memory_bytes": self.peak_memory_bytes,
            "predicted_memory_bytes": self.predicted_memory_bytes,
            "data_fingerprint": self.data_fingerprint,
            "environment": self.environment,
            "sample": self.sample,
        }
        cleaned: dict[str, Any] = _finite(content)
        return cleaned


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
    packages = ("torch", "lightning", "transformers", "compressed-tensors", "qat-lightning")
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
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "gpu": gpu,
    }


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
    """Two sentences: fidelity and recovery."""
    f = report.fidelity
    weights = "not compared" if f.weights_equal is None else f"equal ({f.weights_compared})"
    text = (
        f"Fidelity: codes equal ({f.codes_compared} matrices, unpacked by compressed-tensors), "
        f"weights {weights}, logits {f.logits}"
        + (f" ({f.logit_blocks} blocks of text, fp32)." if f.logit_blocks else ".")
    )
    if report.recovered is not None:
        text += (
            f" Recovered: {report.recovered:.1%} of the loss that rounding the 16-bit fine-tune "
            "costs."
        )
    return text


def write_report(report: Report, run: Path) -> None:
    """Write plots, report.md and, last, report.json (whose presence marks a finished run)."""
    plots = _plots(report, run)
    body = [
        f"# {report.recipe}: {report.model}",
        "",
        f"{report.scheme}, trained on {report.data}.",
        "",
        verdict(report),
        "",
        table(report),
        "",
        *[f"![{title}]({name})\n" for name, title in plots.items()],
        "## Sample",
        "",
        *_quoted(report.sample),
        "",
        "## Coverage",
        "",
        "```",
        report.coverage.summary(),
        "```",
        "",
        "## Run",
        "",
        *[f"- {name}: {seconds:.1f} s" for name, seconds in report.timing.items()],
        f"- peak memory: {report.peak_memory_bytes / 2**20:,.0f} MiB for the whole process "
        f"(predicted for training alone: {report.predicted_memory_bytes / 2**20:,.0f} MiB)",
        f"- environment: {json.dumps(report.environment)}",
        "",
    ]
    (run / "report.md").write_text("\n".join(body), encoding="utf-8")
    temporary = run / ".report.json.tmp"
    temporary.write_text(json.dumps(report.to_json(), indent=2) + "\n", encoding="utf-8")
    temporary.rename(run / "report.json")


def _quoted(sample: dict[str, str]) -> list[str]:
    lines = f"**{sample['prompt']}**{sample['continuation']}".splitlines() or [""]
    return [f"> {line}" for line in lines]


def _plots(report: Report, run: Path) -> dict[str, str]:
    """Draw the plots; file name → title."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    plots = {
        "loss.png": ("Loss during training", _draw_loss),
        "quantization_error.png": ("Relative quantization error by layer", _draw_error),
        "size.png": ("Size and loss", _draw_size),
    }
    for name, (title, draw) in plots.items():
        figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
        draw(axes, report, run)
        axes.set_title(title)
        figure.savefig(run / name, dpi=120)
        plt.close(figure)
    return {name: title for name, (title, _) in plots.items()}


def _draw_loss(axes: Any, report: Report, run: Path) -> None:
    rows = read_metrics(run / "metrics.csv")
    for phase in dict.fromkeys(row[0] for row in rows):
        points = [(step, value) for p, step, m, value in rows if (p, m) == (phase, "train_loss")]
        if not points:
            continue
        # a running mean over about a twentieth of the run; raw losses of single batches are noise
        window = max(1, len(points) // 20)
        steps, means = [], []
        for i in range(len(points)):
            part = [value for _, value in points[max(0, i - window + 1) : i + 1]]
            steps.append(points[i][0])
            means.append(sum(part) / len(part))
        (line,) = axes.plot(steps, means, alpha=0.6, label=f"{phase}: training")
        valid = [(step, value) for p, step, m, value in rows if (p, m) == (phase, "val_loss")]
        if valid:
            axes.plot(*zip(*valid), "o--", color=line.get_color(), label=f"{phase}: validation")
    for name, style in (("ptq", ":"), ("artifact", "-.")):
        if name in report.rows:
            loss = report.rows[name].quality.loss
            axes.axhline(loss, color="gray", linestyle=style, label=f"{name}: {loss:.3f}")
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("loss, nats per token")
    axes.legend()


def _draw_error(axes: Any, report: Report, run: Path) -> None:
    names = list(report.quantization_error)
    positions = range(len(names))
    ptq = [report.quantization_error_ptq.get(name, math.nan) for name in names]
    axes.plot(positions, ptq, "o", fillstyle="none", label="original, rounded")
    axes.plot(positions, list(report.quantization_error.values()), ".", label="trained")
    step = max(1, len(names) // 12)
    labels = [name.removesuffix(".weight").removeprefix("model.") for name in names]
    axes.set_xticks(
        list(positions)[::step], labels[::step], rotation=35, ha="right", fontsize="x-small"
    )
    axes.set_ylabel("||w - w_hat|| / ||w||")
    axes.set_ylim(bottom=0)
    axes.legend()


def _draw_size(axes: Any, report: Report, run: Path) -> None:
    shown = {n: r for n, r in report.rows.items() if r.size_bytes and n != "trained"}
    for name, row in shown.items():
        axes.plot((row.size_bytes or 0) / 1e6, row.quality.loss, "o")
        axes.annotate(
            name,
            ((row.size_bytes or 0) / 1e6, row.quality.loss),
            textcoords="offset points",
            xytext=(6, 5),
        )
    axes.set_xlim(left=0)
    axes.margins(0.2)
    axes.set_xlabel("size, MB")
    axes.set_ylabel("loss, nats per token")
