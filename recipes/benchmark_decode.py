"""Decoding on the CPU from packed weights, against plain transformers in bf16.

    python train.py recipe=benchmark_decode output_dir=runs/decode

A random Llama is written to disk and converted, as a training run would, to an int4 artifact
(``w4``), one whose output head is int4 too (``w4 head``), and one with int8 weights and inputs
(``w8a8``). Each is served by `qat.runtime.load_packed` in bf16; ``bf16`` is the original in plain
transformers. All generate greedily through transformers' own ``generate``; the figure is the
time of a decode step, median of an answer, contestants in turn, speed-ups as the median over the
turns. ``layers`` are the quantized layers alone, called one after another.

Then the same prompts, of different lengths, are answered one by one and as one padded batch: the
answers of the artifacts must be equal, or the run fails. (Those of plain bf16 are counted, too.)

Memory is measured in processes of their own (`recipes.resident`): what each grows by when it loads
the model, generates and has read every kept tensor, beside the bytes of the tensors on disk.
"""

import csv
import json
import statistics
import tempfile
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

from qat.report import environment
from recipes.config import DecodeBenchmarkConfig
from recipes.decoding import (
    Contestants,
    contestants,
    equal_answers,
    memory,
    time_layers,
    time_steps,
)
from recipes.resident import Resident


@dataclass(frozen=True)
class Row:
    """One measurement."""

    work: str
    """step (a whole decode step) or layers (the quantized layers of it)."""
    vocabulary: int
    batch: int
    contestant: str
    seconds: float
    """Median over the turns."""
    fastest: float
    slowest: float
    over_bf16: float
    """Speed-up: median over the turns of bf16's seconds by this one's."""
    gigabytes: float
    """Weights read, 10^9 bytes."""


def run(config: DecodeBenchmarkConfig) -> None:
    """Measure, print the table, write benchmark_decode.json, .csv and .png where asked.

    Raises:
        RuntimeError: an answer of an artifact depends on the batch; all figures are printed.
        UserError: the disk has no room for the random model.
    """
    output = None if config.output_dir is None else Path(config.output_dir)
    if output is not None:
        output.mkdir(parents=True, exist_ok=True)
    rows: list[Row] = []
    parameters, answers, resident = {}, {}, {}
    with tempfile.TemporaryDirectory(prefix=".random-model-", dir=output) as place:
        for vocabulary in (config.shape.vocab_size, *config.more_vocabularies):
            first = vocabulary == config.shape.vocab_size
            names = ["w4", "w4 head"] + ["w8a8"] * first
            entrants = contestants(config, vocabulary, names, Path(place) / str(vocabulary))
            parameters[vocabulary] = entrants.parameters
            # the head is one layer of many: it is measured where it matters most
            layers = entrants.without("w4 head")
            for batch in config.batches if first else [1]:
                steps = layers if batch > 1 else entrants
                rows += _rows("step", steps, batch, time_steps(config, steps, batch))
                if first:
                    rows += _rows("layers", layers, batch, time_layers(config, layers, batch))
            if first:
                answers = equal_answers(config, entrants)
                resident = memory(config, entrants.places)
    print(f"\n{table(rows, parameters)}\n\n{memory_table(rows, resident)}")
    print(f"\n{verdict(config, answers)}")
    if output is not None:
        result = {
            "date": datetime.now(UTC).date().isoformat(),
            "parameters": parameters,
            "rows": [asdict(row) for row in rows],
            "resident_bytes": {name: asdict(found) for name, found in resident.items()},
            "equal_answers": answers,
            "config": asdict(config),
            "environment": environment(),
        }
        (output / "benchmark_decode.json").write_text(json.dumps(result, indent=2) + "\n", "utf-8")
        with (output / "benchmark_decode.csv").open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(asdict(rows[0])))
            writer.writeheader()
            writer.writerows(asdict(row) for row in rows)
        plot(rows, output / "benchmark_decode.png")
    if any(count < config.check_batch for name, count in answers.items() if name != "bf16"):
        raise RuntimeError("answers of a packed model depend on the batch")


def _rows(
    work: str, entrants: Contestants, batch: int, seconds: dict[str, list[float]]
) -> list[Row]:
    rows = []
    for name, times in seconds.items():
        ratio = statistics.median([plain / own for plain, own in zip(seconds["bf16"], times)])
        spread = (statistics.median(times), min(times), max(times))
        size = entrants.weight_bytes[name] / 1e9
        rows.append(Row(work, entrants.vocabulary, batch, name, *spread, ratio, size))
    return rows


def table(rows: list[Row], parameters: dict[int, int]) -> str:
    """The rows as a Markdown table."""
    lines = [
        *(f"vocabulary {v:,}: {count:,} parameters" for v, count in parameters.items()),
        "",
        "| work | vocabulary | batch | | median ms | min | max | over bf16 | weights GB |",
        "|---|---:|---:|---|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        times = (f"{1000 * t:.2f}" for t in (row.seconds, row.fastest, row.slowest))
        lines.append(
            f"| {row.work} | {row.vocabulary:,} | {row.batch} | `{row.contestant}` | "
            f"{' | '.join(times)} | {row.over_bf16:.2f} | {row.gigabytes:.3f} |"
        )
    return "\n".join(lines)


def memory_table(rows: list[Row], resident: dict[str, Resident]) -> str:
    """Tokens/s of a single sequence, packed and resident size, as a Markdown table."""
    steps = {
        r.contestant: r
        for r in rows
        if (r.work, r.vocabulary) == ("step", rows[0].vocabulary) and r.batch == 1
    }
    lines = [
        "| | tokens/s at batch 1 | packed MB | resident MB | over packed | peak MB |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for name, found in resident.items():
        speed = f"{1 / steps[name].seconds:.1f}" if name in steps else "-"
        sizes = [f"{size / 1e6:.1f}" for size in (found.stored, found.served, found.peak)]
        over = f"{100 * (found.served / found.stored - 1):+.1f} %"
        lines.append(f"| `{name}` | {speed} | {sizes[0]} | {sizes[1]} | {over} | {sizes[2]} |")
    return "\n".join(lines)


def verdict(config: DecodeBenchmarkConfig, answers: dict[str, int]) -> str:
    """How many answers do not depend on the batch."""
    counts = ", ".join(f"`{name}` {n} of {config.check_batch}" for name, n in answers.items())
    return f"greedy answers at batch {config.check_batch} equal to those at batch 1: {counts}"


def plot(rows: list[Row], path: Path) -> None:
    """Speed-up over bf16 by batch, for steps at the first vocabulary."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
    steps = [r for r in rows if (r.work, r.vocabulary) == ("step", rows[0].vocabulary)]
    for name in dict.fromkeys(row.contestant for row in steps):
        points = [(str(r.batch), r.over_bf16) for r in steps if r.contestant == name]
        axes.plot(*zip(*points), "o-", label=name)
    axes.set(xlabel="batch", ylabel="tokens/s over bf16", ylim=(0, None))
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=120)
    plt.close(figure)
