"""The plots of a run's report: loss, quantization error, size."""

import math
import re
import statistics
from pathlib import Path
from typing import Any

from qat.loggers import read_metrics
from qat.report import Report


def draw(report: Report, run: Path) -> dict[str, str]:
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
