"""Weights & Biases without a key: an offline run that holds everything."""

import json
from pathlib import Path

import pytest
import wandb

from tests.recipes.running import (
    RUN_FILES,
    curve,
    files,
    metrics,
    read_report,
    run,
    tiny_setup,
)


def words(tmp_path: Path) -> list[str]:
    return [
        "recipe=qat_int4",
        *tiny_setup(tmp_path),
        "logger=wandb",
        "wandb.project=trial",
        f"output_dir={tmp_path / 'run'}",
    ]


def outside_wandb(directory: Path) -> set[str]:
    return {name for name in files(directory) if not name.startswith("wandb/")}


def test_offline_run(tmp_path: Path):
    assert run(words(tmp_path)) == 0
    # W&B's service writes the log in a process of its own, also after a run has finished: wait for
    # its end, as leaving Python does
    wandb.teardown()
    directory = tmp_path / "run"
    assert outside_wandb(directory) == RUN_FILES | {"wandb_id"}
    run_id = (directory / "wandb_id").read_text("utf-8")
    (folder,) = (directory / "wandb").glob("offline-run-*")
    assert folder.name.endswith(f"-{run_id}")
    # a log of protobuf records, in which texts stand as they are
    log = (folder / f"run-{run_id}.wandb").read_bytes()
    assert b"trial" in log
    assert b'"group_size":32' in log  # the configuration
    for phase in ("finetune", "qat"):
        for metric in ("train_loss", "lr", "grad_norm"):
            assert log.count(f"{phase}/{metric}".encode()) >= 4
            for value in curve(directory, phase, metric).values():
                assert json.dumps(value).encode() in log
        assert f"{phase}/val_loss".encode() in log
    errors = {metric for _, _, metric in metrics(directory) if metric.startswith("quant_error/")}
    assert len(errors) == 14
    assert all(f"qat/{name}".encode() in log for name in errors)
    assert b"run-artifact" in log
    for path in (directory / "artifact").iterdir():
        assert path.name.encode() in log
    loss = read_report(directory)["rows"]["artifact"]["loss"]
    assert b"artifact/loss" in log
    assert json.dumps(loss).encode() in log


def test_disabled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("WANDB_MODE", "disabled")
    assert run([*words(tmp_path), "baselines.finetune=false"]) == 0
    expected = RUN_FILES - {"checkpoints/finetune/last.ckpt"} | {"wandb_id"}
    assert files(tmp_path / "run") == expected


def test_a_failed_start_leaves_nothing(tmp_path: Path):
    """Weights turn out to be broken when the W&B run has already begun."""
    start = words(tmp_path)
    weights = tmp_path / "model/model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])
    assert run(start) == 2
    assert not (tmp_path / "run").exists()
