"""The report: arithmetic, JSON, Markdown and plots."""

import json
import math
from dataclasses import replace

import pytest
from matplotlib import image

from qat.evaluate import Quality
from qat.fidelity import Fidelity
from qat.loggers import MetricsCsv
from qat.module import quantization_error
from qat.prepare import prepare
from qat.report import ROWS, Report, Row, gain_kept, table, verdict, write_report
from qat.scheme import Scheme
from tests.tiny import tiny

LOSSES = {
    "original": 2.0,
    "finetuned": 1.5,
    "ptq": 2.25,
    "finetuned_ptq": 1.75,
    "trained": 1.5625,
    "nf4": 1.5625,
    "merged": 1.5625,
    "artifact": 1.5625,
    "served": 1.5627,
}


PACKED = frozenset(LOSSES) - {"original", "finetuned", "nf4", "merged"}


def row(name, loss):
    packed = name in PACKED
    return Row(
        quality=Quality(loss, math.exp(loss), 0.0123, 0.875, 1024),
        bits_per_weight=4.5 if packed else 16.0,
        size_bytes=1_100_000 if packed else 4_000_000,
        dtype="bf16" if name == "served" else "fp32",
    )


@pytest.fixture(scope="module")
def prepared():
    model = tiny("llama")
    return prepare(model, Scheme()), quantization_error(model)


@pytest.fixture
def report(prepared):
    coverage, errors = prepared
    return Report(
        recipe="qat_int4",
        model="models/tiny",
        data="demo",
        scheme="int4 g32 signed_absmax weights",
        keep_dtype="bfloat16",
        rows={name: row(name, loss) for name, loss in LOSSES.items()},
        fidelity=Fidelity(True, 14, True, 21, "equal", 8, 0.0),
        coverage=coverage,
        quantization_error={name: error * 0.97 for name, error in errors.items()},
        quantization_error_ptq=errors,
        sample={"prompt": "The", "continuation": " list\nof things"},
        timing={"train": 12.5},
        peak_memory_bytes=3 << 20,
        predicted_memory_bytes=2 << 20,
        data_fingerprint="abc",
        packed=PACKED,
    )


def test_recovered_is_the_share_of_the_rounding_loss(report):
    # (1.75 - 1.5625) / (1.75 - 1.5), exact in binary
    assert report.recovered == 0.75


def test_recovered_needs_its_three_rows_and_a_loss_to_recover(report):
    without = {name: r for name, r in report.rows.items() if name != "finetuned"}
    assert replace(report, rows=without).recovered is None
    same = report.rows | {"finetuned_ptq": report.rows["finetuned"]}
    assert replace(report, rows=same).recovered is None


def test_worse_than_rounding_is_a_negative_share(report):
    worse = report.rows | {"artifact": row("artifact", 2.0)}
    assert replace(report, rows=worse).recovered == -1.0


def test_json_has_the_contract_s_keys(report):
    content = report.to_json()
    figures = {"loss", "perplexity", "kl_to_original", "top1_agreement"}
    assert set(content["rows"]) == set(ROWS)
    for values in content["rows"].values():
        assert figures | {"bits_per_weight", "size_bytes", "dtype"} <= set(values)
    assert {"codes_equal", "weights_equal", "logits", "max_logit_diff"} <= set(content["fidelity"])
    assert len(content["coverage"]) == len(report.coverage.entries)
    keys = {"recovered", "gain_kept", "timing", "peak_memory_bytes", "environment", "sample"}
    assert keys <= set(content)


def test_json_takes_null_for_what_is_not_finite(report):
    report.rows["served"] = row("served", math.nan)
    report.quantization_error_ptq = {"a": math.inf}
    text = json.dumps(report.to_json(), allow_nan=False)
    content = json.loads(text)
    assert content["rows"]["served"]["loss"] is None
    assert content["quantization_error_ptq"] == {"a": None}


def test_table_has_the_rows_in_order_and_blanks_for_what_is_unknown(report):
    report.rows["ptq"] = Row(Quality(2.25, 9.4877, None, None, 10), None, None, "fp32")
    lines = table(report).splitlines()[2:]
    assert [line.split("`")[1] for line in lines] == list(ROWS)
    assert lines[2].startswith("| `ptq` | 2.2500 | 9.49 |  |  |  |  |")
    assert "| 1.5625 | 4.77 | 0.0123 | 87.5% | 4.50 | 1.10 MB |" in lines[7]


def test_verdict(report):
    assert verdict(report) == (
        "Fidelity: codes equal (14 matrices, unpacked by compressed-tensors), weights equal (21), "
        "logits equal (8 blocks of text, fp32). Recovered: 75.0% of the loss that rounding the "
        "16-bit fine-tune costs."
    )
    short = "not compared: needs 9.0 GiB, 1.0 GiB are free"
    partial = replace(report, rows={}, fidelity=Fidelity(True, 14, None, 0, short, 0, None))
    assert "weights not compared, logits not compared: needs 9.0 GiB" in verdict(partial)


def write_metrics(run, steps=60):
    for phase, offset in (("finetune", 0.0), ("qat", 0.05)):
        log = MetricsCsv(run / "metrics.csv", phase)
        for step in range(1, steps + 1):
            noise = 0.03 * math.sin(7.3 * step)
            log.log_metrics({"train_loss": 1.6 + offset + math.exp(-step / 9) + noise}, step)
            if step % 20 == 0:
                log.log_metrics({"val_loss": 1.7 + offset + math.exp(-step / 9)}, step)


def test_files_of_the_report(report, tmp_path):
    write_metrics(tmp_path)
    write_report(report, tmp_path)
    plots = ["loss.png", "quantization_error.png", "size.png"]
    names = sorted([*plots, "metrics.csv", "report.json", "report.md"])
    assert sorted(p.name for p in tmp_path.iterdir()) == names
    for name in plots:
        pixels = image.imread(tmp_path / name)
        assert pixels.shape[:2] == (540, 960)
        # something is drawn: an empty figure is white all over
        assert 0.01 < (pixels[..., :3].min(-1) < 0.9).mean() < 0.5
    text = (tmp_path / "report.md").read_text()
    assert all(f"]({name})" in text for name in plots)
    assert table(report) in text
    assert "> **The** list\n> of things" in text
    assert json.loads((tmp_path / "report.json").read_text())["recovered"] == 0.75


@pytest.mark.parametrize("losses", [{}, {"artifact": 1.5}, {"original": math.nan, "artifact": 2.0}])
def test_plots_of_nearly_nothing(losses, report, tmp_path):
    """No metrics, no row, one row, a loss that is not a number."""
    (tmp_path / "metrics.csv").write_text("phase,step,metric,value\n")
    bare = replace(
        report,
        rows={name: row(name, loss) for name, loss in losses.items()},
        quantization_error={"lm_head.weight": 0.1},
        quantization_error_ptq={},
    )
    write_report(bare, tmp_path)
    assert (tmp_path / "size.png").stat().st_size > 0


def test_gain_kept_is_the_share_of_what_training_gained(report):
    losses = {"original": 3.0, "trained": 2.0, "artifact": 2.25}
    report.rows = {name: row(name, loss) for name, loss in losses.items()}
    assert gain_kept(report.rows) == 0.75
    assert report.to_json()["gain_kept"] is None  # no adapters, nothing to keep
    assert "Gain kept" not in verdict(report)
    report.adapter = {"base": "nf4"}
    assert report.to_json()["gain_kept"] == 0.75
    assert "Gain kept: 75.00%" in verdict(report)


def test_no_gain_is_not_judged(report):
    losses = {"original": 2.0, "trained": 2.0, "artifact": 2.1}
    report.rows = {name: row(name, loss) for name, loss in losses.items()}
    report.adapter = {"base": "nf4"}
    assert gain_kept(report.rows) is None
    assert "nothing was gained" in verdict(report)
    del report.rows["artifact"]
    assert gain_kept(report.rows) is None
