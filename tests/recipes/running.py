"""Runs of the recipes on tiny models: in this process, in forked ones, and through the shell."""

import csv
import gc
import hashlib
import json
import random
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import recipes.qat
import recipes.qlora  # noqa: F401  # both so that they are frozen below
import train
from qat.errors import run_main
from tests.tiny import save_tiny

# the report collects garbage after each row: a quarter of a second for all of torch's objects
gc.collect()
gc.freeze()

ROOT = Path(train.__file__).resolve().parent
TRAIN = [sys.executable, str(ROOT / "train.py")]

ARTIFACT_FILES = {
    "README.md",
    "config.json",
    "generation_config.json",
    "manifest.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
}
RUN_FILES = {
    "config.yaml",
    "metrics.csv",
    "report.json",
    "report.md",
    "loss.png",
    "quantization_error.png",
    "size.png",
    "checkpoints/finetune/last.ckpt",
    "checkpoints/qat/last.ckpt",
} | {f"artifact/{name}" for name in ARTIFACT_FILES}


DESCRIPTION = {"README.md", "manifest.json"}
ADAPTER_FILES = DESCRIPTION | {
    "adapter_config.json",
    "adapter_model.safetensors",
    "base.json",
    "chat_template.jinja",
    "tokenizer.json",
    "tokenizer_config.json",
}
ADAPTER_RUN_FILES = (
    RUN_FILES - {"checkpoints/qat/last.ckpt"}
    | {"checkpoints/adapter/last.ckpt", "artifact/chat_template.jinja"}
    | {f"adapter/{name}" for name in ADAPTER_FILES}
)
"""Of a run on conversations that ends in the merged form; others have `NF4_FILES` too."""
NF4_FILES = {f"nf4/{name}" for name in ARTIFACT_FILES | {"chat_template.jinja"}} | {
    f"nf4/adapter/{name}" for name in ADAPTER_FILES - DESCRIPTION
}


def write_text(path: Path, documents: int = 300) -> Path:
    """A JSON lines file of documents of one to twenty words (so blocks differ in targets)."""
    words = ["the", "quick", "brown", "fox", "jumps", "over", "lazy", "dogs", "while", "wizards"]
    rng = random.Random(0)
    texts = [" ".join(rng.choices(words, k=rng.randint(1, 20))) for _ in range(documents)]
    lines = [json.dumps({"text": text}) for text in texts]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def write_chats(path: Path, conversations: int = 240) -> Path:
    """A JSON lines file of conversations of one or two turns, 40 to 64 characters each."""
    words = ["quick", "brown", "jumps", "lazy", "dogs", "while"]
    rng = random.Random(0)
    with path.open("w", encoding="utf-8") as file:
        for _ in range(conversations):
            messages = []
            for word in rng.sample(words, rng.randint(1, 2)):
                messages += [
                    {"role": "user", "content": word},
                    {"role": "assistant", "content": f"{word}!"},
                ]
            file.write(json.dumps({"messages": messages}) + "\n")
    return path


def tiny_setup(directory: Path, family: str = "llama", **config: Any) -> list[str]:
    """The words that every run needs; makes the model (``config`` changes its config.json)."""
    return _words(directory, family, write_text(directory / "text.jsonl"), config)


def adapter_setup(directory: Path, family: str = "llama", **config: Any) -> list[str]:
    """The same for runs that train adapters, with conversations as data.

    Blocks of 32 weights divide every row of the tiny models, so that bitsandbytes reads them
    rightly on all CPUs. A few steps on a random model gain next to nothing, or lose something: what
    is kept of it says nothing.
    """
    return [
        *_words(directory, family, write_chats(directory / "chats.jsonl"), config),
        "adapter.block_size=32",
        "min_gain_kept=null",
    ]


def _words(directory: Path, family: str, data: Path, config: dict[str, Any]) -> list[str]:
    model = save_tiny(family, directory / "model")
    if config:
        path = model / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text("utf-8")) | config), "utf-8")
    return [
        f"model={model}",
        f"data={data}",
        f"text.cache_dir={directory / 'cache'}",
        "text.validation_fraction=0.1",
        "preset=[trainer/debug]",
        "trainer.progress_bar=false",
    ]


def run(words: Sequence[str]) -> int:
    """``python train.py words...`` in this process; the exit code."""
    return run_main(lambda: train.run(list(words)))


def read_report(directory: Path) -> dict[str, Any]:
    report: dict[str, Any] = json.loads((directory / "report.json").read_text("utf-8"))
    return report


def metrics(directory: Path) -> dict[tuple[str, int, str], str]:
    """Rows of metrics.csv as they are written; each (phase, step, metric) is there once."""
    with (directory / "metrics.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.reader(file))
    assert rows[0] == ["phase", "step", "metric", "value"]
    table = {(phase, int(step), metric): value for phase, step, metric, value in rows[1:]}
    assert len(table) == len(rows) - 1, "a row is there twice"
    return table


def curve(directory: Path, phase: str, metric: str) -> dict[int, float]:
    """One metric by step."""
    return {s: float(v) for (p, s, m), v in metrics(directory).items() if (p, m) == (phase, metric)}


def files(directory: Path) -> set[str]:
    return {p.relative_to(directory).as_posix() for p in directory.rglob("*") if p.is_file()}


def hashes(directory: Path) -> dict[str, str]:
    """File name → sha256 of everything below a directory."""
    return {
        name: hashlib.sha256((directory / name).read_bytes()).hexdigest()
        for name in files(directory)
    }


def losses(directory: Path) -> dict[str, float]:
    """Row name → loss of the report."""
    return {name: row["loss"] for name, row in read_report(directory)["rows"].items()}


def rounding_bound(adapters: bool = False) -> float:
    """Relative bound of the difference of two fp32 losses that differ in the order of additions.

    With u = 2^-24, a sum of n terms is off by at most about sqrt(n) * u * lambda, lambda = 6 for
    a failure probability of 1e-7 (Higham and Mary 2019, theorem 2.4). On the way to the loss lie,
    per layer, dot products of 64 (q, k or v, then o), 16 and 64 (attention), 64 (up) and 96 (down)
    terms and two norms of 64; the head of 64, the softmax of 256, and the sum over 256 tokens:
    n = 2 * 432 + 64 + 256 + 256 = 1440. Each of the two losses is off by that much. A weight
    that crosses a rounding boundary is not in the bound: weights differ by about 1e-7 of a
    quantization step, so that fewer than 0.01 of the 40,000 are expected to cross.
    """
    # adapters of rank 16 add theirs per layer: 64 + 16 three times and 96 + 16
    terms = 1440 + (2 * 352 if adapters else 0)
    return float(2 * 6 * terms**0.5 * 2**-24)
