"""An adapter run that was killed at any moment ends, once resumed, as if nothing had happened.

Adapters of 64 x 64 values and more, whose optimizer state bitsandbytes holds in 8 bits; dropout of
attention and adapters, so that the random streams matter; the merged form sets in after step 5.
"""

import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.recipes.forked import Kill, run_forked
from tests.recipes.running import (
    ADAPTER_RUN_FILES,
    NF4_FILES,
    adapter_setup,
    curve,
    files,
    hashes,
    metrics,
    read_report,
    run,
)
from tests.recipes.test_resume import step_of

STEPS = 9

# checkpoints at 2, 4, 6 (which validates), 8 and 9
WORDS = [
    f"max_steps={STEPS}",
    "trainer.checkpoint_every_steps=2",
    "trainer.validate_every_steps=3",
    "text.max_train_tokens=640",  # an epoch ends in the middle of a step
    "optim.name=paged_adamw_8bit",
    "adapter.rank=64",
    "adapter.dropout=0.1",
    "evaluate.max_tokens=256",
]
MERGED = ["recipe=qlora_int4", "merge_share=0.44", "adapter.new_tokens=['<|a|>']"]
PLAIN = ["recipe=qlora_nf4", "baselines.finetune=false", "adapter.dora=true"]
STATIC = [
    "recipe=qlora_int4",
    "merge_share=0.44",
    "baselines.finetune=false",
    "scheme.weight={bits: 8, granularity: channel, grid: absmax}",
    "scheme.input={bits: 8, dynamic: false, granularity: tensor, scale_dtype: bfloat16}",
    "scheme.observer.freeze_after_steps=7",
]


@pytest.fixture(scope="module")
def setup(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    directory = tmp_path_factory.mktemp("tiny")
    return [*adapter_setup(directory, attention_dropout=0.1), *WORDS]


def whole_run(words: list[str], factory: pytest.TempPathFactory) -> Path:
    parent = factory.mktemp("whole")
    code = run_forked([*words, f"output_dir={parent / 'run'}"], parent / "log")
    assert code == 0, (parent / "log").read_text("utf-8")
    return parent / "run"


@pytest.fixture(scope="module")
def merged(setup: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The uninterrupted run that ends in the merged form."""
    return whole_run([*setup, *MERGED], tmp_path_factory)


@pytest.fixture(scope="module")
def plain(setup: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The uninterrupted run on the 4-bit base."""
    return whole_run([*setup, *PLAIN], tmp_path_factory)


def checkpoint(directory: Path, phase: str = "adapter") -> dict[str, Any]:
    path = directory / f"checkpoints/{phase}/last.ckpt"
    saved: dict[str, Any] = torch.load(path, weights_only=True)
    return saved


def assert_same(resumed: Path, whole: Path) -> None:
    """Adapters, optimizer state, outputs, metrics, measured figures and the set of files."""
    assert metrics(resumed) == metrics(whole)
    one, other = checkpoint(resumed), checkpoint(whole)
    for key in ("state_dict", "optimizer_states", "lr_schedulers", "base_sha256", "global_step"):
        assert_equal(one[key], other[key], key)
    for name in files(whole):
        if name.endswith(("model.safetensors", "config.json")):
            assert (resumed / name).read_bytes() == (whole / name).read_bytes(), name
    one, other = read_report(resumed), read_report(whole)
    for row in (*one["rows"].values(), *other["rows"].values()):
        # the README, a part of the artifact, names the directory that was trained
        row.pop("size_bytes")
    for key in (
        "rows", "recovered", "gain_kept", "adapter", "coverage", "quantization_error", "fidelity",
        "sample", "instruction_data",
    ):  # fmt: skip
        assert one[key] == other[key], key
    assert files(resumed) == files(whole)


def assert_equal(one: Any, other: Any, where: str) -> None:
    """Equal trees of tensors and values, bit for bit."""
    assert type(one) is type(other), where
    if isinstance(one, torch.Tensor):
        assert one.dtype == other.dtype, where
        assert torch.equal(one, other), where
    elif isinstance(one, dict):
        assert one.keys() == other.keys(), where
        for key in one:
            assert_equal(one[key], other[key], f"{where}.{key}")
    elif isinstance(one, list | tuple):
        assert len(one) == len(other), where
        for index, pair in enumerate(zip(one, other)):
            assert_equal(*pair, f"{where}.{index}")
    else:
        assert one == other, where


def test_the_uninterrupted_run(merged: Path):
    """The run goes through everything that the interrupted ones are meant to hit."""
    assert files(merged) == ADAPTER_RUN_FILES
    assert list(curve(merged, "adapter", "train_loss")) == list(range(1, STEPS + 1))
    assert list(curve(merged, "adapter", "val_loss")) == [3, 6, 9]
    # fake quantizers report from step 6 on
    steps = {s for _, s, metric in metrics(merged) if metric.startswith("quant_error/")}
    assert steps == {6, 9}
    state = checkpoint(merged)["optimizer_states"][0]["state"]
    moments = [entry["__bnb_optimizer_quant_state__"]["state1"] for entry in state.values()]
    kinds = {moment.dtype for moment in moments}
    # fp32 for the row of the new token and for B of the keys and values, of 32 x 64
    assert kinds == {torch.uint8, torch.float32}
    assert sum(moment.dtype == torch.uint8 for moment in moments) == 24


LOG = "qat.loggers:MetricsCsv.log_metrics"  # called 9 + 3 times in each phase
SAVE = "qat.training:Trainer.save_checkpoint"  # steps 2, 4, 6 (after validating), 8 and 9
STEP = "qat.module:CausalLMModule.training_step"  # two micro-batches a step
MERGE = "qat.lora:MergedLinear.merged_forward"  # of each layer in each pass, from step 6 on

KILLS = {
    "start": (Kill("recipes.adapter_parts:load_tokenizer"), None, None),
    "baseline": (Kill(LOG, 6), 4, None),
    "baseline, saving": (Kill(SAVE, 2, after=True), 6, None),
    "base": (Kill("recipes.qlora:base_sha256", 2), 9, None),
    "first steps": (Kill(LOG, 2), 9, None),
    "before the merged form": (Kill(LOG, 6), 9, 4),
    "between micro-batches": (Kill(STEP, 2), 9, 4),
    "first merged forward": (Kill(MERGE, 1), 9, 4),
    "merged": (Kill(STEP, 6), 9, 6),
    "before a checkpoint": (Kill(SAVE), 9, 6),
    "before the last checkpoint": (Kill(SAVE, 2), 9, 8),
    "after the last checkpoint": (Kill("qat.training:Checkpoints._save_if_due", 1, True), 9, 9),
    "writing the adapter": (Kill("qat.adapter_files:save_file", after=True), 9, 9),
    "adapter in place": (Kill("qat.finish:write_checkpoint"), 9, 9),
    "converting": (Kill("qat.finish:write_checkpoint", after=True), 9, 9),
    "comparing": (Kill("qat.fidelity:reload", after=True), 9, 9),
    "evaluating": (Kill("qat.finish:measure", 4), 9, 9),
    "manifest": (Kill("qat.finish:write_manifest", after=True), 9, 9),
    "artifact in place": (Kill("qat.finish:write_report"), 9, 9),
    "report": (Kill("qat.report:Path.rename"), 9, 9),
}
"""As in `test_resume`: the kill, and the steps of the checkpoints that it leaves of the baseline
and of the training. A chain: each run resumes what the last one left."""


def test_killed_in_every_phase(setup: list[str], merged: Path, tmp_path: Path):
    directory, log = tmp_path / "run", tmp_path / "log"
    words = [*setup, *MERGED, f"output_dir={directory}"]
    for name, (kill, *steps) in KILLS.items():
        assert run_forked(words, log, kill) == -signal.SIGKILL, name
        assert (directory / "config.yaml").exists(), name
        assert not (directory / "report.json").exists(), name
        assert [step_of(directory, phase) for phase in ("finetune", "adapter")] == steps, name
        words = [f"resume={directory}"]
    assert run_forked(words, log) == 0
    assert_same(directory, merged)


def test_killed_on_the_plain_base(setup: list[str], plain: Path, tmp_path: Path):
    """DoRA in its plain form, and the outputs that only such a run writes."""
    assert files(plain) == (ADAPTER_RUN_FILES | NF4_FILES) - {"checkpoints/finetune/last.ckpt"}
    directory, log = tmp_path / "run", tmp_path / "log"
    words = [*setup, *PLAIN, f"output_dir={directory}"]
    kills = [
        (Kill(STEP, 10), 4),
        (Kill(SAVE, 2), 6),
        (Kill("qat.adapter_files:bitsandbytes_format.tensors", 5), 9),
        (Kill("qat.adapter_files:AdapterFiles.write_adapter", 2, after=True), 9),
        (Kill("recipes.qlora:reload_nf4", after=True), 9),
    ]
    for kill, step in kills:
        assert run_forked(words, log, kill) == -signal.SIGKILL, kill
        assert step_of(directory, "adapter") == step, kill
        words = [f"resume={directory}"]
    assert run_forked(words, log) == 0
    assert_same(directory, plain)


@pytest.mark.slow
def test_killed_static_ranges(
    setup: list[str], tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
):
    """The moving ranges of the inputs go on where they were, before and after they freeze."""
    whole = whole_run([*setup, *STATIC], tmp_path_factory)
    directory, log = tmp_path / "run", tmp_path / "log"
    words = [*setup, *STATIC, f"output_dir={directory}"]
    for call, step in ((10, 4), (5, 6), (4, 6)):  # in steps 5, 7 and 8
        assert run_forked(words, log, Kill(STEP, call)) == -signal.SIGKILL
        assert step_of(directory, "adapter") == step
        words = [f"resume={directory}"]
    assert run_forked(words, log) == 0
    assert_same(directory, whole)


# --- the base ------------------------------------------------------------------------------------


def flip(model: Path, name: str, change: float) -> None:
    """Add to one weight of a model directory."""
    path = model / "model.safetensors"
    tensors = load_file(path)
    tensors[name].view(-1)[7] += change
    save_file(tensors, path, {"format": "pt"})


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("model.layers.1.mlp.up_proj.weight", 1.0),
        # too little for another 4-bit code; what is merged and shipped would be another weight
        ("model.layers.1.mlp.up_proj.weight", 1e-6),
    ],
)
def test_another_base(
    setup: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str], name: str, change: float
):
    """One weight of the model changes between: refused, and the run can still be finished."""
    model = tmp_path / "model"
    shutil.copytree(setup[0].partition("=")[2], model)
    directory, log = tmp_path / "run", tmp_path / "log"
    words = [*setup[1:], *MERGED, "baselines.finetune=false", f"model={model}"]
    kill = Kill(STEP, 10)
    assert run_forked([*words, f"output_dir={directory}"], log, kill) == -signal.SIGKILL
    before = hashes(directory)
    flip(model, name, change)
    assert run([f"resume={directory}"]) == 2
    error = capfd.readouterr().err
    assert "Traceback" not in error
    assert error.count("error:") == 1
    assert "error: resume: the base model is not the one that this run began with" in error
    assert "Restore the files that model= names" in error
    after = hashes(directory)
    assert after.keys() == before.keys()
    # config.yaml says resume= now
    assert all(after[name] == before[name] for name in before if name != "config.yaml")
    shutil.copytree(setup[0].partition("=")[2], model, dirs_exist_ok=True)
    assert run([f"resume={directory}"]) == 0


@pytest.mark.parametrize("word", ["adapter.rank=8", "merge_share=0.2", "chat.train_on=all"])
def test_resume_keeps_the_configuration(
    merged: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], word: str
):
    directory = tmp_path / "run"
    directory.mkdir()
    (directory / "config.yaml").write_text((merged / "config.yaml").read_text("utf-8"), "utf-8")
    before = hashes(directory)
    assert run([f"resume={directory}", word]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {word.partition('=')[0]}=")
    assert "config.yaml" in error
    assert hashes(directory) == before
