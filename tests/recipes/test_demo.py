"""The main job as a user starts it: the built-in model and corpus, from a shell."""

import json
import os
import subprocess
import time

import pytest

from tests.recipes.running import TRAIN, files

LEAST_RECOVERED = {4: 0.5, 2: 0.8}


@pytest.mark.slow
@pytest.mark.parametrize("bits", LEAST_RECOVERED)
def test_main_job(bits, tmp_path):
    command = [*TRAIN, "recipe=qat_int4", "trainer.progress_bar=false"]
    command += [] if bits == 4 else [f"scheme.weight.bits={bits}", "logger=none"]
    # all cores, unlike the other tests, and a cache of its own as on a fresh machine
    environment = {k: v for k, v in os.environ.items() if k != "OMP_NUM_THREADS"}
    environment |= {"XDG_CACHE_HOME": str(tmp_path / "cache"), "WANDB_MODE": "offline"}
    start = time.perf_counter()
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    seconds = time.perf_counter() - start
    assert done.returncode == 0, done.stderr[-4000:]
    run = tmp_path / "runs" / "qat_int4-001"
    report = json.loads((run / "report.json").read_text("utf-8"))
    assert report["fidelity"]["codes_equal"] is True
    assert report["fidelity"]["weights_equal"] is True
    assert report["fidelity"]["logits"] == "equal"
    assert report["fidelity"]["max_logit_diff"] == 0.0
    rows = report["rows"]
    assert rows["artifact"]["loss"] == rows["trained"]["loss"]
    assert rows["artifact"]["loss"] < rows["finetuned_ptq"]["loss"]
    assert rows["artifact"]["bits_per_weight"] <= bits + 0.6
    assert report["recovered"] >= LEAST_RECOVERED[bits]
    assert "| `artifact` |" in done.stdout
    assert report["sample"]["continuation"].strip() in done.stdout
    assert {"model.safetensors", "manifest.json", "README.md"} <= files(run / "artifact")
    assert seconds < 300
