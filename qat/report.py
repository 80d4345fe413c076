"""The run's report: ``report.json`` for scripts, ``report.md`` with plots for people."""

import json
import math
import platform
import re
import statistics
from dataclasses import asdict, dataclass, field, replace
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
    "trained": "the module as it was trained",
    "nf4": "4-bit base and adapter in transformers, bitsandbytes and PEFT",
    "merged": "the adapter merged, in 16 bit",
    "artifact": "reloaded from disk by plain transformers",
    "served": "as `qat generate` runs it",
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
                name: asdict(row.quality)
                | {
                    "bits_per_weight": row.bits_per_weight,
                    "size_bytes": row.size_bytes,
                    "dtype": row.dtype,
                }
                for name, row in self.rows.items()
            },
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
        *("accelerate", "liger-kernel", "qat-lightning"),
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


def _plots(report: Report, run: Path) -> dict[str, str]:
    """Draw the plots; file name → title."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    plots = {
        "loss.png": ("Loss during training", _draw_loss),
        "quantization_error.png": ("Relative quantization error by layer", _draw_error),
        "size.png": ("Loss on held-out text and size", _draw_size),
    }
    for name, (title, draw) in plots.items():
        figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
        axes.set_title(title, loc="left")
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
        draw(axes, report, run)
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
        means = [
            statistics.fmean(value for _, value in points[max(0, i - window + 1) : i + 1])
            for i in range(len(points))
        ]
        (line,) = axes.plot([s for s, _ in points], means, alpha=0.5, label=f"{phase}: training")
        valid = [(step, value) for p, step, m, value in rows if (p, m) == (phase, "val_loss")]
        if valid:
            style = {"color": line.get_color(), "markersize": 4}
            axes.plot(*zip(*valid), "o-", label=f"{phase}: validation", **style)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("loss, nats per token")
    if axes.lines:
        axes.legend()


def _draw_error(axes: Any, report: Report, run: Path) -> None:
    """One colour for each kind of matrix, over the layers; before training hollow and dashed."""
    kinds: dict[str, list[tuple[int, float, float]]] = {}
    for name, error in report.quantization_error.items():
        match = re.fullmatch(r".*?\.(\d+)\.(.*?)(?:\.weight)?", name)
        layer, kind = (int(match[1]), match[2]) if match else (0, name.removesuffix(".weight"))
        before = report.quantization_error_ptq.get(name, math.nan)
        kinds.setdefault(kind, []).append((layer, error, before))
    for kind, points in kinds.items():
        layers, errors, before_all = zip(*sorted(points))
        (line,) = axes.plot(layers, errors, "o-", markersize=4, label=kind)
        style = {"color": line.get_color(), "fillstyle": "none", "linewidth": 0.8}
        axes.plot(layers, before_all, "s--", markersize=7, **style)
    gray = {"color": "gray", "fillstyle": "none"}
    axes.plot([], [], "o-", markersize=4, color="gray", label="trained")
    axes.plot([], [], "s--", markersize=7, linewidth=0.8, label="original, rounded", **gray)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set_xlabel("layer")
    axes.set_ylabel("||w - ŵ|| / ||w||")
    axes.margins(x=0.1, y=0.1)
    axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), fontsize="small", frameon=False)


def _draw_size(axes: Any, report: Report, run: Path) -> None:
    """A point for each row; labels beside it, moved apart where points lie close."""
    points = sorted(
        (row.size_bytes / 1e6, row.quality.loss, name)
        for name, row in report.rows.items()
        # trained and artifact are one point
        if row.size_bytes and math.isfinite(row.quality.loss) and name != "trained"
    )
    axes.set_xlabel("size, MB")
    axes.set_ylabel("loss, nats per token")
    if not points:
        return
    losses = [loss for _, loss, _ in points]
    step = 0.07 * ((max(losses) - min(losses)) or abs(losses[0]) or 1.0)
    width = points[-1][0]
    bottom, top = min(losses), max(losses)
    placed: list[tuple[float, float]] = []
    for size, loss, name in points:
        height = loss
        # a label keeps its distance from those below it and from longer ones to its left
        while any(abs(size - x) < 0.3 * width and abs(height - y) < step for x, y in placed):
            height += step / 4
        placed.append((size, height))
        top = max(top, height)
        is_artifact = name == "artifact"
        color = "tab:orange" if is_artifact else "tab:blue"
        axes.plot(size, loss, "o", color=color, zorder=3 if is_artifact else 2)
        axes.annotate(
            f"{name}  {loss:.4f}",
            (size, loss),
            xytext=(size + 0.03 * width, height),
            va="center",
            fontsize="small",
            fontweight="bold" if is_artifact else "normal",
            arrowprops={"arrowstyle": "-", "color": "gray", "linewidth": 0.6, "relpos": (0, 0.5)},
        )
    axes.set_xlim(0, 1.3 * width)
    axes.set_ylim(bottom - 2 * step, top + 2 * step)
