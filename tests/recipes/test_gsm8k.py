"""A public set of questions and answers as data, where its files are at hand."""

import json
from pathlib import Path

import pytest

from tests.recipes.running import ROOT, read_report, run

DATA = ROOT.parent / "shared/data/gsm8k"
TRAIN, TEST = DATA / "train.jsonl", DATA / "test.jsonl"


def rows(path: Path) -> int:
    with path.open(encoding="utf-8") as file:
        return sum(1 for _ in file)


@pytest.mark.skipif(not TRAIN.is_file(), reason="the data set is not here")
def test_two_named_columns(tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    """Loads by its two columns, trains, and is evaluated on the test file."""
    words = [
        "recipe=qlora_int4",
        f"data={TRAIN}",
        "chat.prompt_column=question",
        "chat.completion_column=answer",
        f"text.validation={TEST}",
        f"text.cache_dir={tmp_path / 'cache'}",
        f"output_dir={tmp_path / 'run'}",
        "preset=[trainer/debug]",
        "trainer.progress_bar=false",
        "trainer.validate_every_steps=4",
        "trainer.global_batch_size=2",
        "text.seq_len=512",
        "text.max_validation_tokens=4096",
        "baselines.finetune=false",
        "evaluate.max_tokens=2048",
    ]
    assert run(words) == 0
    assert "chat.format=prompt_completion" in capfd.readouterr().err
    report = read_report(tmp_path / "run")
    summary = report["instruction_data"]
    assert summary["format"] == "prompt_completion"
    found = {Path(entry["source"].partition("=")[2]).name: entry for entry in summary["bad_rows"]}
    assert found.keys() == {"train.jsonl", "test.jsonl"}
    assert found["train.jsonl"]["rows"] == rows(TRAIN)
    assert not any(entry["bad"] for entry in found.values())
    assert summary["train"]["conversations"] > 0.9 * rows(TRAIN)
    losses = {name: row["loss"] for name, row in report["rows"].items()}
    assert losses["artifact"] == losses["trained"]
    assert losses["trained"] < losses["original"]
    assert report["gain_kept"] == 1.0
    config = json.loads((tmp_path / "run/artifact/manifest.json").read_text("utf-8"))
    assert config["provenance"]["data"] == TRAIN.name
