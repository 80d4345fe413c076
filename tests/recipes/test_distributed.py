"""Two processes on this machine (gloo, DDP) against one, with the same blocks in each step."""

import contextlib
import os
import signal
import subprocess
from pathlib import Path

import psutil
import pytest

from tests.recipes.running import (
    ADAPTER_RUN_FILES,
    RUN_FILES,
    TRAIN,
    adapter_setup,
    curve,
    files,
    losses,
    metrics,
    read_report,
    rounding_bound,
    run,
    tiny_setup,
)

TWO = ["trainer.devices=2", "trainer.strategy=ddp", "trainer.accelerator=cpu"]
LIMIT = 240
"""Seconds after which a run counts as hung."""


def launch(words: list[str], log: Path) -> subprocess.Popen[bytes]:
    with log.open("ab") as file:
        return subprocess.Popen([*TRAIN, *words], stdout=file, stderr=file, start_new_session=True)


def wait(process: subprocess.Popen[bytes], log: Path) -> None:
    """Wait for a run that should succeed; no process of its group is left."""
    try:
        code = process.wait(LIMIT)
        assert code == 0, log.read_text("utf-8")
        assert not alive(process.pid)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


def alive(group: int) -> list[psutil.Process]:
    """Living processes of a process group (a zombie only waits for its parent to look)."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.NoSuchProcess, ProcessLookupError):
            if os.getpgid(process.pid) == group and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


@pytest.mark.slow
def test_two_processes_are_one(tmp_path: Path):
    """Equal bit for bit with two micro-batches in turn, dropout included; also after a SIGKILL.

    Both runs add the same two gradients, in one order or the other (addition of two commutes), and
    the factors between are powers of two; each micro-batch has its own random stream.
    """
    setup = tiny_setup(tmp_path, attention_dropout=0.1)
    words = ["recipe=qat_int4", *setup, "scheme.enable_after_steps=1"]
    one, two, log = tmp_path / "one", tmp_path / "two", tmp_path / "log"
    assert run([*words, f"output_dir={one}"]) == 0
    process = launch([*words, *TWO, f"output_dir={two}"], log)
    while not (two / "checkpoints/qat/last.ckpt").exists():
        assert process.poll() is None, log.read_text("utf-8")
    os.killpg(process.pid, signal.SIGKILL)
    process.wait(LIMIT)
    wait(launch([f"resume={two}"], log), log)

    assert files(two) == RUN_FILES
    assert metrics(two).keys() == metrics(one).keys()
    for phase in ("finetune", "qat"):
        for metric in ("train_loss", "lr", "grad_norm"):
            assert curve(two, phase, metric) == curve(one, phase, metric)
        # validation blocks are shared out one by one, so they lie in other batches
        for step, loss in curve(one, phase, "val_loss").items():
            assert abs(curve(two, phase, "val_loss")[step] - loss) <= rounding_bound() * loss
    assert losses(two) == losses(one)
    weights = "artifact/model.safetensors"
    assert (two / weights).read_bytes() == (one / weights).read_bytes()
    assert read_report(two)["fidelity"]["logits"] == "equal"


@pytest.mark.slow
def test_static_ranges_of_two_processes(tmp_path: Path):
    """Observers see the activations of both processes, over two micro-batches on each."""
    words = [
        "recipe=qat_int8",
        *tiny_setup(tmp_path),
        "scheme.input.dynamic=false",
        "scheme.input.granularity=tensor",
        "scheme.input.scale_dtype=bfloat16",
        "scheme.observer.momentum=0.5",
        "trainer.micro_batch_size=1",
        "baselines.finetune=false",
        "optim.eps=1.0",  # see test_qat.SMOOTH
        "optim.lr=0.1",
    ]
    one, two, log = tmp_path / "one", tmp_path / "two", tmp_path / "log"
    assert run([*words, f"output_dir={one}"]) == 0
    wait(launch([*words, *TWO, f"output_dir={two}"], log), log)
    assert files(two) == RUN_FILES - {"checkpoints/finetune/last.ckpt"}
    # four gradients are added as (1 + 3) + (2 + 4) instead of one after the other
    for metric in ("train_loss", "val_loss"):
        expected, found = (curve(d, "qat", metric) for d in (one, two))
        assert found.keys() == expected.keys()
        for step, loss in expected.items():
            assert abs(found[step] - loss) <= rounding_bound() * loss
    scales = [input_scales(directory) for directory in (one, two)]
    assert scales[0].keys() == scales[1].keys()
    # stored scales are bf16: equal, or neighbours where rounding put them on two sides
    assert all(abs(scales[1][n] / scales[0][n] - 1) <= 2**-7 for n in scales[0])
    assert sum(scales[1][n] == scales[0][n] for n in scales[0]) >= len(scales[0]) - 1


@pytest.mark.slow
def test_adapters_of_two_processes(tmp_path: Path):
    """The same for adapters on a 4-bit base, which each process makes for itself."""
    setup = adapter_setup(tmp_path, attention_dropout=0.1)
    words = ["recipe=qlora_int4", *setup, "merge_share=0.5", "adapter.dropout=0.1"]
    words += ["adapter.new_tokens=['<|a|>']", "optim.name=adamw_8bit", "adapter.rank=64"]
    one, two, log = tmp_path / "one", tmp_path / "two", tmp_path / "log"
    assert run([*words, f"output_dir={one}"]) == 0
    process = launch([*words, *TWO, f"output_dir={two}"], log)
    while not (two / "checkpoints/adapter/last.ckpt").exists():
        assert process.poll() is None, log.read_text("utf-8")
    os.killpg(process.pid, signal.SIGKILL)
    process.wait(LIMIT)
    wait(launch([f"resume={two}"], log), log)

    assert files(two) == ADAPTER_RUN_FILES
    assert metrics(two).keys() == metrics(one).keys()
    for phase in ("finetune", "adapter"):
        for metric in ("train_loss", "lr", "grad_norm"):
            assert curve(two, phase, metric) == curve(one, phase, metric)
    assert losses(two) == losses(one)
    for name in ("artifact/model.safetensors", "adapter/adapter_model.safetensors"):
        assert (two / name).read_bytes() == (one / name).read_bytes()
    assert read_report(two)["gain_kept"] == read_report(one)["gain_kept"]
    log_text = log.read_text("utf-8")
    assert log_text.count("template: plain") == 2  # said once by each of two runs


def input_scales(directory: Path) -> dict[str, float]:
    from qat.fidelity import Stored

    stored = Stored(directory / "artifact")
    names = [name for name in stored.files if name.endswith("input_scale")]
    assert len(names) == 14
    return {name: float(stored[name]) for name in names}


def test_wrong_input_is_reported_once(tmp_path: Path):
    """Before the second process is started, and without leftovers."""
    log, directory = tmp_path / "log", tmp_path / "run"
    words = [*tiny_setup(tmp_path), *TWO, "trainer.micro_batch_size=4", f"output_dir={directory}"]
    process = launch(["recipe=qat_int4", *words], log)
    assert process.wait(LIMIT) == 2
    assert log.read_text("utf-8").count("trainer.global_batch_size=4: must be a multiple") == 1
    assert not directory.exists()
