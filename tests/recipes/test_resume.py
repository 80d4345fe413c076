"""A run that was killed at any moment ends, once resumed, as if nothing had happened.

The uninterrupted run and the killed ones train the same model with dropout, so that the random
streams matter, over more than one epoch of a few blocks, so that the order within an epoch does.
"""

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from qat.module import CausalLMModule
from qat.training import checkpoint_step
from tests.recipes.forked import Kill, run_forked
from tests.recipes.running import (
    RUN_FILES,
    TRAIN,
    curve,
    files,
    hashes,
    metrics,
    read_report,
    run,
    tiny_setup,
)

STEPS = 9

# checkpoints at 2, 4, 6 (which validates), 8 and 9; quantization sets in after step 5
WORDS = [
    f"max_steps={STEPS}",
    "trainer.checkpoint_every_steps=2",
    "trainer.validate_every_steps=3",
    "scheme.enable_after_steps=5",
    "text.max_train_tokens=640",  # ten blocks: an epoch ends in the middle of step 3
]
STATIC = [
    "scheme.input.dynamic=false",
    "scheme.input.granularity=tensor",
    "scheme.input.scale_dtype=bfloat16",
    "scheme.observer.freeze_after_steps=7",
]


@pytest.fixture(scope="module")
def setup(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    directory = tmp_path_factory.mktemp("tiny")
    return [*tiny_setup(directory, attention_dropout=0.1), *WORDS]


def start(recipe: str, setup: list[str], directory: Path, log: Path, kill: Kill | None) -> int:
    return run_forked([f"recipe={recipe}", f"output_dir={directory}", *setup], log, kill)


@pytest.fixture(scope="module")
def whole(setup: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The uninterrupted run."""
    parent = tmp_path_factory.mktemp("whole")
    assert start("qat_int4", setup, parent / "run", parent / "log", None) == 0
    return parent / "run"


@pytest.fixture(scope="module")
def whole_static(setup: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The uninterrupted run of static W8A8."""
    parent = tmp_path_factory.mktemp("static")
    words = [*setup, *STATIC]
    assert start("qat_int8", words, parent / "run", parent / "log", None) == 0
    return parent / "run"


def assert_same(resumed: Path, whole: Path) -> None:
    """Weights, metrics and measured figures are equal, and so is the set of files."""
    assert metrics(resumed) == metrics(whole)
    for name in ("model.safetensors", "config.json"):
        one, other = (d / "artifact" / name for d in (resumed, whole))
        assert one.read_bytes() == other.read_bytes()
    one, other = read_report(resumed), read_report(whole)
    for row in (*one["rows"].values(), *other["rows"].values()):
        # the README, a part of the artifact, names the directory that was trained
        row.pop("size_bytes")
    for key in ("rows", "recovered", "coverage", "quantization_error", "fidelity", "sample"):
        assert one[key] == other[key], key
    assert files(resumed) == files(whole)


def test_the_uninterrupted_run(whole: Path):
    """The run goes through everything that the interrupted ones are meant to hit."""
    assert files(whole) == RUN_FILES
    assert list(curve(whole, "qat", "train_loss")) == list(range(1, STEPS + 1))
    assert list(curve(whole, "qat", "val_loss")) == [3, 6, 9]
    plain, trained = (curve(whole, phase, "train_loss") for phase in ("finetune", "qat"))
    # kept parameters are rounded from the first step on, the matrices after step 5
    jump = {step: abs(plain[step] - trained[step]) for step in plain}
    assert max(jump[s] for s in range(1, 6)) < min(jump[s] for s in range(6, STEPS + 1))


LOG = "qat.loggers:MetricsCsv.log_metrics"  # called 9 + 3 times in each phase
SAVE = "qat.training:Trainer.save_checkpoint"  # steps 2, 4, 6 (after validating), 8 and 9
STEP = "qat.module:CausalLMModule.training_step"  # two micro-batches a step

KILLS = {
    "start": (Kill("recipes.qat:load_tokenizer"), None, None),
    "baseline": (Kill(LOG, 6), 4, None),
    "baseline, saving": (Kill(SAVE, 2, after=True), 6, None),
    "baseline, validating": (Kill("qat.module:CausalLMModule.validation_step", 2), 8, None),
    # after predicting and checking, the third time is to train
    "baseline, done": (Kill("recipes.qat:prepare", 3), 9, None),
    "calibrating": (Kill("recipes.qat:calibrate", after=True), 9, None),
    "first steps": (Kill(LOG, 2), 9, None),
    "before quantization sets in": (Kill(LOG, 6), 9, 4),
    "between micro-batches": (Kill(STEP, 2), 9, 4),
    "after quantization set in": (Kill(STEP, 6), 9, 6),
    "before a checkpoint": (Kill(SAVE), 9, 6),
    "before the last checkpoint": (Kill(SAVE, 2), 9, 8),
    "after the last checkpoint": (Kill("qat.training:Checkpoints._save_if_due", 1, True), 9, 9),
    "converting": (Kill("qat.finish:write_checkpoint", after=True), 9, 9),
    "comparing": (Kill("qat.fidelity:reload", after=True), 9, 9),
    "evaluating": (Kill("qat.finish:measure", 4), 9, 9),
    "manifest": (Kill("qat.finish:write_manifest", after=True), 9, 9),
    "artifact in place": (Kill("qat.finish:write_report"), 9, 9),
    "report": (Kill("qat.report:Path.rename"), 9, 9),
}
"""Name → the kill and, to show that it hits what it is meant to, the steps of the checkpoints that
it leaves of the baseline and of the training. A chain: each run resumes what the last one left."""


def test_killed_in_every_phase(setup: list[str], whole: Path, tmp_path: Path):
    directory, log = tmp_path / "run", tmp_path / "log"
    words = ["recipe=qat_int4", *setup, f"output_dir={directory}"]
    for name, (kill, *steps) in KILLS.items():
        assert run_forked(words, log, kill) == -signal.SIGKILL, name
        assert (directory / "config.yaml").exists(), name
        assert not (directory / "report.json").exists(), name
        assert [step_of(directory, phase) for phase in ("finetune", "qat")] == steps, name
        # what a power cut can leave at the end of the file
        if (directory / "metrics.csv").exists():
            with (directory / "metrics.csv").open("a") as file:
                file.write("qat,9,train_lo")
        words = [f"resume={directory}"]
    assert run_forked(words, log) == 0
    assert_same(directory, whole)


def step_of(directory: Path, phase: str) -> int | None:
    """Optimizer step of a phase's checkpoint."""
    path = directory / "checkpoints" / phase / "last.ckpt"
    return checkpoint_step(path) if path.exists() else None


def test_killed_static_ranges(setup: list[str], whole_static: Path, tmp_path: Path):
    """The moving ranges of static W8A8 go on where they were, before and after they freeze."""
    directory, log = tmp_path / "run", tmp_path / "log"
    words = ["recipe=qat_int8", *setup, *STATIC, f"output_dir={directory}"]
    for calls in (12, 5, 6):  # in steps 6, 7 and 9; steps 4, 6 and 8 are saved
        kill = Kill("qat.observers:RangeObserver.commit", calls * 14 + 3)
        assert run_forked(words, log, kill) == -signal.SIGKILL
        words = [f"resume={directory}"]
    assert run_forked(words, log) == 0
    assert_same(directory, whole_static)


def test_killed_from_outside(setup: list[str], whole: Path, tmp_path: Path):
    """The command itself, killed as soon as it has written its configuration."""
    directory = tmp_path / "run"
    words = [*TRAIN, "recipe=qat_int4", *setup, f"output_dir={directory}"]
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(words, stdout=log, stderr=log, start_new_session=True)
        while not (directory / "config.yaml").exists():
            assert process.poll() is None, (tmp_path / "log").read_text("utf-8")
            time.sleep(0.001)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait(60)
    assert files(directory) <= {"config.yaml", ".config.yaml.tmp"}
    assert run_forked([f"resume={directory}"], tmp_path / "log") == 0
    assert_same(directory, whole)


def test_exception(setup: list[str], whole: Path, tmp_path: Path, capfd, monkeypatch):
    """A failure inside the process keeps the run, and says how to continue it."""
    directory = tmp_path / "run"
    original = CausalLMModule.training_step
    seen = []

    def failing(self, batch, batch_idx):
        seen.append(batch_idx)
        if len(seen) == 25:
            raise RuntimeError("the machine had enough")
        return original(self, batch, batch_idx)

    with monkeypatch.context() as patch:
        patch.setattr(CausalLMModule, "training_step", failing)
        assert run(["recipe=qat_int4", *setup, f"output_dir={directory}"]) == 1
    message = capfd.readouterr().err
    assert "the machine had enough" in message
    assert f"Continue with: python train.py recipe=qat_int4 resume={directory}" in message
    assert run([f"resume={directory}"]) == 0
    assert_same(directory, whole)


def test_resume_of_a_finished_run(whole: Path, capsys: pytest.CaptureFixture[str]):
    before = hashes(whole)
    assert run([f"resume={whole}"]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: resume={whole}: this run is finished")
    assert error.count("\n") == 1
    assert hashes(whole) == before


def test_resume_of_a_missing_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    missing = tmp_path / "nothing"
    for words in ([f"resume={missing}"], ["recipe=qat_int4", f"resume={missing}"]):
        assert run(words) == 2
        assert f"error: resume={missing}: no such directory" in capsys.readouterr().err
    assert not missing.exists()


@pytest.mark.parametrize(
    "word", ["optim.lr=1e-5", "seed=1", "scheme.weight.bits=3", "recipe=qat_int8"]
)
def test_resume_keeps_the_configuration(
    whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], word: str
):
    directory = tmp_path / "run"
    directory.mkdir()
    (directory / "config.yaml").write_text((whole / "config.yaml").read_text("utf-8"), "utf-8")
    before = hashes(directory)
    assert run([f"resume={directory}", word]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {word.partition('=')[0]}=")
    assert "config.yaml" in error
    assert hashes(directory) == before
