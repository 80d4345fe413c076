"""The main jobs as a user starts them: the built-in model and data, from a shell."""

import json
import math
import os
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

from tests.recipes.running import TRAIN, files

LEAST_RECOVERED = {4: 0.5, 2: 0.8}


LIMIT = 300
"""Seconds that a run may take."""


def start(command: list[str], directory: Path) -> tuple[dict[str, Any], str, Path]:
    """Run a recipe without a network; report, standard output and directory of the run."""
    # all cores, unlike the other tests, and a cache of its own as on a fresh machine
    environment = {k: v for k, v in os.environ.items() if k != "OMP_NUM_THREADS"}
    environment |= {"XDG_CACHE_HOME": str(directory / "cache"), "WANDB_MODE": "offline"}
    begin = time.perf_counter()
    command = [*TRAIN, *command, "trainer.progress_bar=false"]
    done = subprocess.run(command, cwd=directory, env=environment, capture_output=True, text=True)
    seconds = time.perf_counter() - begin
    assert done.returncode == 0, done.stderr[-4000:]
    (run,) = (directory / "runs").iterdir()
    report = json.loads((run / "report.json").read_text("utf-8"))
    assert report["fidelity"]["codes_equal"] is True
    assert report["fidelity"]["weights_equal"] is True
    assert report["fidelity"]["logits"] == "equal"
    assert report["fidelity"]["max_logit_diff"] == 0.0
    assert "| `artifact` |" in done.stdout
    assert report["sample"]["continuation"].strip() in done.stdout
    assert {"model.safetensors", "manifest.json", "README.md"} <= files(run / "artifact")
    assert seconds < LIMIT
    return report, done.stdout, run


@pytest.mark.slow
@pytest.mark.parametrize("bits", LEAST_RECOVERED)
def test_main_job(bits, tmp_path):
    words = [] if bits == 4 else [f"scheme.weight.bits={bits}", "logger=none"]
    report, _, run = start(["recipe=qat_int4", *words], tmp_path)
    assert run.name == "qat_int4-001"
    rows = report["rows"]
    assert rows["artifact"]["loss"] == rows["trained"]["loss"]
    assert rows["artifact"]["loss"] < rows["finetuned_ptq"]["loss"]
    assert rows["artifact"]["bits_per_weight"] <= bits + 0.6
    assert report["recovered"] >= LEAST_RECOVERED[bits]


def nf4_bits(config: Path) -> float:
    """Bits per weight of a Llama's linear layers as the recipe stores them, from its config.json.

    Half a byte a weight, a byte for each block of 64, 4 bytes for each 256 blocks or a rest, and an
    offset of 4 bytes for each matrix.
    """
    shape = json.loads(config.read_text("utf-8"))
    hidden, wide = shape["hidden_size"], shape["intermediate_size"]
    heads, kv = (shape["head_dim"] * shape[f"num_{x}_heads"] for x in ("attention", "key_value"))
    matrices = 2 * [hidden * heads] + 2 * [hidden * kv] + 3 * [hidden * wide]
    size = sum(n // 2 + n // 64 + 4 * math.ceil(n / 64 / 256) + 4 for n in matrices)
    return 8 * size / sum(matrices)


@pytest.mark.slow
def test_adapters_on_nf4(tmp_path):
    """QLoRA on the built-in instructions: one quantization of the merged weights keeps the gain."""
    report, out, run = start(["recipe=qlora_nf4"], tmp_path)
    assert run.name == "qlora_nf4-001"
    rows = report["rows"]
    assert rows["trained"]["loss"] < rows["original"]["loss"]
    assert report["gain_kept"] >= 0.95
    assert "Gain kept: " in out
    assert rows["artifact"]["bits_per_weight"] == 4.5
    assert rows["trained"]["bits_per_weight"] == nf4_bits(run / "nf4" / "config.json")
    assert report["fidelity"]["outputs"]["nf4"].startswith("logits equal")
    assert rows["nf4"]["loss"] == rows["trained"]["loss"]
    assert {"adapter", "nf4", "artifact"} <= {path.name for path in run.iterdir()}


@pytest.mark.slow
def test_adapters_merged_exactly(tmp_path):
    report, out, run = start(["recipe=qlora_int4"], tmp_path)
    assert run.name == "qlora_int4-001"
    rows = report["rows"]
    assert rows["trained"]["loss"] < rows["original"]["loss"]
    assert rows["artifact"]["loss"] == rows["trained"]["loss"]
    assert report["gain_kept"] == 1.0
    assert "Gain kept: 100.00%" in out
    assert rows["artifact"]["loss"] < rows["ptq"]["loss"]
