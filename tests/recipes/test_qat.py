"""The recipes qat_int4 and qat_int8 from end to end, on tiny random models."""

import hashlib
import json
import math
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor

from qat import cli
from tests.recipes.forked import Kill, run_forked
from tests.recipes.running import (
    ARTIFACT_FILES,
    RUN_FILES,
    curve,
    files,
    hashes,
    losses,
    metrics,
    read_report,
    rounding_bound,
    run,
    tiny_setup,
)

STEPS = range(1, 5)  # of the preset trainer/debug


@pytest.fixture(scope="module")
def setup(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return tiny_setup(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def int4(setup: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of qat_int4."""
    directory = tmp_path_factory.mktemp("int4") / "run"
    assert run(["recipe=qat_int4", f"output_dir={directory}", *setup]) == 0
    return directory


def test_files(int4: Path):
    assert files(int4) == RUN_FILES
    assert {path.name for path in (int4 / "artifact").iterdir()} == ARTIFACT_FILES


def test_report(int4: Path):
    report = read_report(int4)
    assert {
        "rows", "recovered", "fidelity", "coverage", "gain_kept", "timing", "peak_memory_bytes",
        "environment", "sample",
    } <= report.keys()  # fmt: skip
    rows = report["rows"]
    assert rows.keys() == {
        "original", "finetuned", "ptq", "finetuned_ptq", "trained", "artifact", "served",
    }  # fmt: skip
    for row in rows.values():
        assert {
            "loss", "perplexity", "kl_to_original", "top1_agreement", "bits_per_weight",
            "size_bytes",
        } <= row.keys()  # fmt: skip
    for key in ("loss", "perplexity", "kl_to_original", "top1_agreement"):
        assert rows["trained"][key] == rows["artifact"][key]
    assert rows["original"]["kl_to_original"] == 0
    assert rows["artifact"]["bits_per_weight"] <= 4.6
    assert rows["served"]["dtype"].startswith("bf16")
    finetuned, rounded, artifact = (
        losses(int4)[n] for n in ("finetuned", "finetuned_ptq", "artifact")
    )
    assert report["recovered"] == (rounded - artifact) / (rounded - finetuned)
    fidelity = report["fidelity"]
    assert fidelity["codes_equal"] is True
    assert fidelity["codes_compared"] == 14
    assert fidelity["weights_equal"] is True
    assert fidelity["weights_compared"] == 21  # 14 matrices, 5 norms, the embedding, the head
    assert fidelity["logits"] == "equal"
    assert fidelity["max_logit_diff"] == 0
    assert {entry["status"] for entry in report["coverage"]} == {"quantized", "kept"}
    assert len(report["coverage"]) == 21
    assert report["gain_kept"] is None
    assert report["peak_memory_bytes"] > 0
    assert {"data", "finetune", "train", "convert", "check", "evaluate"} <= report["timing"].keys()
    assert report["sample"].keys() == {"prompt", "continuation"}
    text = (int4 / "report.md").read_text("utf-8")
    assert all(f"`{name}`" in text for name in rows)
    assert "](loss.png)" in text


def test_metrics(int4: Path):
    rows = metrics(int4)
    for phase in ("finetune", "qat"):
        for metric in ("train_loss", "lr", "grad_norm"):
            assert list(curve(int4, phase, metric)) == list(STEPS)
        assert list(curve(int4, phase, "val_loss")) == [2, 4]
    errors = {metric for _, _, metric in rows if metric.startswith("quant_error/")}
    assert len(errors) == 14
    # one step of warm-up at half the rate of configs/qat_int4.yaml, then half a cosine
    half = 7e-4 / 2  # of the recipe's peak: one step of warm-up, then a cosine over three
    expected = {1: half} | {s: half * (1 + math.cos(math.pi * (s - 2) / 3)) for s in (2, 3, 4)}
    assert curve(int4, "qat", "lr") == pytest.approx(expected, rel=1e-15)  # two roundings


def test_the_artifact_loads_in_plain_transformers(int4: Path, tmp_path: Path):
    """In a process that cannot import this project; the logits are those of `reload` here."""
    script = """
import sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32).eval()
ids = AutoTokenizer.from_pretrained(sys.argv[1])("the quick brown fox", return_tensors="pt")
with torch.no_grad():
    torch.save((ids["input_ids"], model(**ids).logits), sys.argv[2])
assert not [name for name in sys.modules if name.partition(".")[0] in ("qat", "qat_kernels")]
"""
    out = tmp_path / "logits.pt"
    command = [sys.executable, "-c", script, str(int4 / "artifact"), str(out)]
    subprocess.run(command, check=True, cwd=tmp_path, timeout=120)
    ids, logits = torch.load(out)
    from qat.fidelity import reload

    with torch.no_grad():
        expected = reload(int4 / "artifact")(input_ids=ids).logits
    torch.testing.assert_close(logits, expected, rtol=0, atol=0)


def test_commands_on_the_artifact(int4: Path, capsys: pytest.CaptureFixture[str]):
    artifact = str(int4 / "artifact")
    before = hashes(int4)
    assert cli.main(["verify", artifact]) == 0
    assert "every file is as the manifest says" in capsys.readouterr().out
    assert cli.main(["inspect", artifact]) == 0
    shown = capsys.readouterr().out
    assert "LlamaForCausalLM" in shown
    assert "4.5" in shown  # bits per weight
    assert cli.main(["generate", artifact, "the quick", "max_new_tokens=4"]) == 0
    assert capsys.readouterr().out
    assert hashes(int4) == before


def test_succeeds_twice_in_fresh_directories(
    setup: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    words = ["recipe=qat_int4", *setup, "baselines.finetune=false"]
    assert run(words) == 0
    assert run(words) == 0
    assert {p.as_posix() for p in Path("runs").iterdir()} == {
        "runs/qat_int4-001",
        "runs/qat_int4-002",
    }
    one, two = Path("runs/qat_int4-001"), Path("runs/qat_int4-002")
    assert files(one) == files(two) == RUN_FILES - {"checkpoints/finetune/last.ckpt"}
    assert metrics(one) == metrics(two)
    for name in ("model.safetensors", "config.json"):
        assert (one / "artifact" / name).read_bytes() == (two / "artifact" / name).read_bytes()
    assert losses(one).keys() == {"original", "ptq", "trained", "artifact", "served"}
    assert read_report(one)["recovered"] is None


def test_dry_run(
    setup: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    monkeypatch.chdir(tmp_path)
    assert run(["recipe=qat_int4", *setup, "dry_run=true"]) == 0
    out = capsys.readouterr().out
    assert "group_size: 32" in out
    assert "quantized: 100.0% of the linear layers' parameters" in out
    assert "predicted peak memory" in out
    assert "predicted disk" in out
    assert list(tmp_path.iterdir()) == []


def test_enable_after_steps(setup: list[str], tmp_path: Path):
    """Until the switch the run is the plain fine-tune, bit for bit; then it is not."""
    words = ["scheme.enable_after_steps=2", "scheme.keep_dtype=float32"]
    assert run(["recipe=qat_int4", f"output_dir={tmp_path / 'run'}", *setup, *words]) == 0
    for metric in ("train_loss", "grad_norm"):
        plain, quantized = (curve(tmp_path / "run", p, metric) for p in ("finetune", "qat"))
        assert [plain[step] == quantized[step] for step in STEPS] == [True, True, False, False]


def test_int8_dynamic(setup: list[str], tmp_path: Path):
    words = ["baselines.finetune=false"]
    assert run(["recipe=qat_int8", f"output_dir={tmp_path / 'run'}", *setup, *words]) == 0
    report = read_report(tmp_path / "run")
    assert report["fidelity"]["logits"] == "equal"
    assert report["rows"]["trained"]["loss"] == report["rows"]["artifact"]["loss"]
    assert all(e["input"]["dynamic"] for e in report["coverage"] if e["status"] == "quantized")


STATIC = [
    "scheme.input.dynamic=false",
    "scheme.input.granularity=tensor",
    "scheme.input.scale_dtype=bfloat16",
]


@pytest.mark.parametrize("kind", ["ema_minmax", "percentile"])
def test_int8_static(setup: list[str], tmp_path: Path, kind: str):
    """Ranges calibrate, move until they freeze, and lie in the checkpoint."""
    directory = tmp_path / "run"
    words = [
        *STATIC,
        f"scheme.observer.kind={kind}",
        "scheme.observer.calibration_blocks=6",
        "scheme.observer.freeze_after_steps=3",
        "baselines.finetune=false",
    ]
    assert run(["recipe=qat_int8", f"output_dir={directory}", *setup, *words]) == 0
    report = read_report(directory)
    assert report["fidelity"]["logits"] == "equal"
    assert report["rows"]["trained"]["loss"] == report["rows"]["artifact"]["loss"]
    state = torch.load(directory / "checkpoints/qat/last.ckpt", weights_only=True)["state_dict"]
    steps = {name: int(value) for name, value in state.items() if name.endswith("observer.steps")}
    # six blocks in batches of two calibrate, then three steps move the ranges
    assert list(steps.values()) == [3 + 3] * 14
    assert all(bool(v) for name, v in state.items() if name.endswith("observer.frozen"))


def test_activation_checkpointing(tmp_path: Path):
    """Recomputing gives the same activations, dropout included, hence the same losses."""
    setup = tiny_setup(tmp_path, attention_dropout=0.1)
    forwards = []
    for on in (False, True):
        calls: list[str] = []

        def count(module, inputs, output, calls=calls):
            # not those of the prediction, which runs a step on tensors without values
            if not any(isinstance(tensor, FakeTensor) for tensor in module.parameters()):
                calls.append(type(module).__name__)

        hook = torch.nn.modules.module.register_module_forward_hook(count)
        words = [f"output_dir={tmp_path / str(on)}", f"trainer.activation_checkpointing={on}"]
        assert run(["recipe=qat_int4", *setup, *words]) == 0
        hook.remove()
        forwards.append(calls.count("LlamaAttention"))
    # two phases of 4 steps of 2 micro-batches through 2 layers ran their forward a second time
    assert forwards[1] - forwards[0] == 2 * 4 * 2 * 2
    assert metrics(tmp_path / "False") == metrics(tmp_path / "True")
    assert losses(tmp_path / "False") == losses(tmp_path / "True")


# Adam's update g / (|g| + eps) is the sign of g at a small eps, and turns rounding errors of tiny
# gradients into whole steps; at eps = 1 it is smooth
SMOOTH = ["optim.eps=1.0", "optim.lr=0.1", "optim.schedule=constant"]


def test_micro_batches_do_not_change_the_step(setup: list[str], tmp_path: Path):
    """Micro-batches of 1 and of 4 blocks, whose numbers of targets differ, and 4, then 1."""
    words = ["recipe=qat_int4", *setup, *SMOOTH]
    size = "trainer.micro_batch_size"
    one, four, both = (tmp_path / name for name in ("one", "four", "both"))
    assert run([*words, f"{size}=1", f"output_dir={one}"]) == 0
    assert run([*words, f"{size}=4", f"output_dir={four}"]) == 0
    # dies before the last of two checkpoints in each of two phases
    kill = Kill("qat.training:Trainer.save_checkpoint", 4)
    words = [*words, f"{size}=4", f"output_dir={both}"]
    assert run_forked(words, tmp_path / "log", kill) == -signal.SIGKILL
    assert run([f"resume={both}", f"{size}=1"]) == 0
    for phase in ("finetune", "qat"):
        expected = curve(four, phase, "train_loss")
        assert expected[4] < expected[1] - 0.01  # the steps are steps
        for metric in ("train_loss", "val_loss"):
            expected = curve(four, phase, metric)
            for other in (one, both):
                found = curve(other, phase, metric)
                assert found.keys() == expected.keys()
                for step, loss in expected.items():
                    assert abs(found[step] - loss) <= rounding_bound() * loss


def test_bf16_mixed(setup: list[str], tmp_path: Path):
    words = ["trainer.precision=bf16-mixed", "baselines.finetune=false"]
    assert run(["recipe=qat_int4", f"output_dir={tmp_path / 'run'}", *setup, *words]) == 0
    report = read_report(tmp_path / "run")
    assert report["fidelity"]["logits"] == "equal"
    state = torch.load(tmp_path / "run/checkpoints/qat/last.ckpt", weights_only=True)
    weights = [v for v in state["state_dict"].values() if v.is_floating_point()]
    assert all(value.dtype == torch.float32 for value in weights)  # master weights


@pytest.mark.parametrize("name", ["adamw_8bit", "lion_8bit", "ademamix_8bit"])
def test_8bit_optimizers_resume(setup: list[str], tmp_path: Path, name: str):
    """Two steps and two more after loading their state are the four steps of one run."""
    words = ["recipe=qat_int4", *setup, f"optim.name={name}", "optim.schedule=constant"]
    words += ["baselines.finetune=false", "evaluate.max_tokens=64"]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert run([*words, f"output_dir={whole}"]) == 0
    kill = Kill("qat.training:Trainer.save_checkpoint", 2)
    assert run_forked([*words, f"output_dir={parts}"], tmp_path / "log", kill) == -signal.SIGKILL
    assert run([f"resume={parts}"]) == 0
    assert metrics(parts) == metrics(whole)
    for file in ("model.safetensors", "config.json"):
        assert (parts / "artifact" / file).read_bytes() == (whole / "artifact" / file).read_bytes()


def test_help_lists_every_key(capsys: pytest.CaptureFixture[str]):
    assert run(["recipe=qat_int4", "--help"]) == 0
    out = capsys.readouterr().out
    for key in ("scheme.weight.bits", "trainer.precision", "optim.lr", "text.seq_len", "resume"):
        assert key in out
    assert run([]) == 0
    listed = capsys.readouterr().out
    assert all(name in listed for name in ("qat_int4", "qat_int8", "pretrain_demo", "benchmark"))


def test_provenance(int4: Path, setup: list[str]):
    manifest = json.loads((int4 / "artifact/manifest.json").read_text("utf-8"))
    found = manifest["provenance"]
    assert found["config"]["scheme"]["weight"]["bits"] == 4
    assert (found["recipe"], found["model"], found["data"]) == ("qat_int4", "model", "text.jsonl")
    model = Path(setup[0].removeprefix("model="))
    weights = hashlib.sha256((model / "model.safetensors").read_bytes()).hexdigest()
    assert found["base"] == {"name": "model", "weights_sha256": weights}
    data = Path(setup[1].removeprefix("data=")).read_bytes()
    assert found["data_fingerprint"] == hashlib.sha256(data).hexdigest()
    assert found["seeds"] == {"run": 0}
    assert found["command"].startswith(
        "python train.py recipe=qat_int4 model=model data=text.jsonl"
    )
    assert "max_steps=4" in found["command"]
    assert found["converter"]["name"] == "qat-lightning"
    assert found["git"] is None or len(found["git"]["commit"]) == 40
    # an artifact is for others: nothing in it names a directory of this machine
    for path in (int4 / "artifact").iterdir():
        raw = path.read_bytes()
        for private in (int4.parent, model.parent):
            assert str(private).encode() not in raw, path.name


def test_slices(int4: Path):
    """Losses by part of the held-out text: they add up, and the card has them, worst first."""
    report = read_report(int4)
    for by in ("context", "frequency"):
        parts = [part for part in report["slices"] if part["by"] == by]
        for name, row in report["rows"].items():
            total = sum(part["tokens"] * part["loss"][name] for part in parts)
            # float64 sums of the same losses in another order
            assert total == pytest.approx(row["tokens"] * row["loss"], rel=1e-14)
    changes = [part["change"] for part in report["slices"]]
    assert changes == sorted(changes, reverse=True)
    for part in report["slices"]:
        assert part["change"] == part["loss"]["artifact"] - part["loss"]["original"]
        assert part["low_bits"] == part["loss"]["artifact"] - part["loss"]["finetuned"]
    card = (int4 / "artifact/README.md").read_text("utf-8")
    places = [card.index(f"| {part['slice']} |") for part in report["slices"]]
    assert places == sorted(places)
    assert card.count("tokens of context |") == len(
        [c for c in report["slices"] if c["by"] == "context"]
    )


def test_the_configuration_is_resolved(int4: Path):
    text = (int4 / "config.yaml").read_text("utf-8")
    for line in ("recipe: qat_int4", "max_steps: 4", "group_size: 32", "logger: none"):
        assert line in text
