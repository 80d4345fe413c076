"""What a benchmark run leaves: a printed table, rows in a CSV, and a plot against the floor."""

from __future__ import annotations

import csv
import datetime
import functools
import importlib.metadata
import os
import platform
import re
import subprocess
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch

RESULTS = Path(__file__).parent.parent / "results"
"""Where rows are appended by default."""
VERSIONS = ("torch", "triton", "bitsandbytes", "torchao", "gemlite", "vllm")
"""Packages whose versions stand in each row, where installed."""


@dataclass(frozen=True)
class Row:
    """One contestant in one case."""

    kernel: str
    case: str
    m: int
    contestant: str
    p20_us: float
    p50_us: float
    p80_us: float
    floor_us: float
    speed_up: float
    """Median time of the case's baseline over this one's."""
    of_floor: float
    """Floor over median time."""
    device: str
    threads: int
    versions: str
    commit: str
    date: str


def device_name(device: torch.device) -> str:
    """The processor's model name."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    info = Path("/proc/cpuinfo")
    found = None
    if info.is_file():
        found = re.search(r"model name\s*:\s*(.+)", info.read_text("utf-8"))
    return found.group(1).strip() if found else platform.processor() or platform.machine()


@functools.cache
def versions() -> str:
    """Versions of what is compared, as ``torch 2.13.0, triton 3.7.1``."""
    texts = []
    for name in VERSIONS:
        try:
            texts.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    return ", ".join(texts)


@functools.cache
def commit() -> str:
    """Short id of the checked-out commit, ``+`` behind it if files differ; empty if unknown."""
    here = Path(__file__).parent

    def git(*words: str) -> str:
        done = subprocess.run(
            ["git", *words], cwd=here, capture_output=True, text=True, check=False
        )
        return done.stdout.strip() if done.returncode == 0 else ""

    try:
        found = git("rev-parse", "--short", "HEAD")
        return found + "+" * bool(found and git("status", "--porcelain", "--untracked-files=no"))
    except OSError:  # no git
        return ""


def today() -> str:
    """The date, ISO."""
    return datetime.date.today().isoformat()


def append(rows: Sequence[Row], directory: Path) -> list[Path]:
    """Append rows to ``directory/<kernel>.csv``, with a header where the file is new."""
    directory.mkdir(parents=True, exist_ok=True)
    paths = []
    for kernel in dict.fromkeys(row.kernel for row in rows):
        path = directory / f"{kernel}.csv"
        new = not path.is_file() or os.path.getsize(path) == 0
        with path.open("a", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, [field.name for field in fields(Row)])
            if new:
                writer.writeheader()
            for row in rows:
                if row.kernel == kernel:
                    values = asdict(row)
                    for name, value in values.items():
                        if isinstance(value, float):
                            values[name] = f"{value:.4g}"
                    writer.writerow(values)
        paths.append(path)
    return paths


def table(rows: Sequence[Row]) -> str:
    """The rows of one case after the other, as text."""
    case_width = max([len(row.case) for row in rows] + [4])
    name_width = max([len(row.contestant) for row in rows] + [10])
    lines = [
        f"{'case':{case_width}}      M  {'contestant':{name_width}}   p20 us   p50 us   p80 us  "
        "speed-up  of floor"
    ]
    for row in rows:
        lines.append(
            f"{row.case:{case_width}}  {row.m:5}  {row.contestant:{name_width}} {row.p20_us:8.1f} "
            f"{row.p50_us:8.1f} {row.p80_us:8.1f}  {row.speed_up:7.2f}x  {row.of_floor:7.1%}"
        )
    return "\n".join(lines)


def plot(rows: Sequence[Row], path: Path) -> None:
    """Fraction of the floor against M, one panel per case, one line per contestant (PNG)."""
    # imported here: measuring needs no plot library, and this one takes a second to load
    from matplotlib.figure import Figure

    cases = list(dict.fromkeys(row.case for row in rows))
    columns = min(3, len(cases))
    lines = -(-len(cases) // columns)
    figure = Figure(figsize=(5 * columns, 3.6 * lines), layout="constrained")
    axes = figure.subplots(lines, columns, squeeze=False).flatten()
    names = list(dict.fromkeys(row.contestant for row in rows))
    for axis, case in zip(axes, cases):
        for i, name in enumerate(names):
            points = sorted(
                (r.m, r.of_floor) for r in rows if (r.case, r.contestant) == (case, name)
            )
            if points:
                style = {"color": f"C{i}", "marker": "o", "markersize": 4}
                axis.plot(*zip(*points), label=name, **style)
        axis.set_title(case, fontsize=10)
        axis.set_xscale("log", base=2)
        axis.set_ylim(bottom=0)
        axis.set_xlabel("M (rows)")
        axis.set_ylabel("fraction of the floor")
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    for axis in axes[len(cases) :]:
        axis.remove()
    figure.suptitle(f"{rows[0].device}, {rows[0].date}", fontsize=10)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
