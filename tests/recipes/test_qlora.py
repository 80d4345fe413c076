"""The recipes qlora_nf4, qlora_int4 and lora_bf16 from end to end, on tiny random models."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from qat import cli
from tests.recipes.forked import run_forked
from tests.recipes.running import (
    ADAPTER_FILES,
    ADAPTER_RUN_FILES,
    ARTIFACT_FILES,
    NF4_FILES,
    adapter_setup,
    curve,
    files,
    hashes,
    losses,
    metrics,
    read_report,
    run,
    write_text,
)

STEPS = range(1, 5)  # of the preset trainer/debug
FAST = ["baselines.finetune=false", "evaluate.max_tokens=256"]
FINETUNE = "checkpoints/finetune/last.ckpt"


@pytest.fixture(scope="module")
def setup(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return adapter_setup(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def nf4(setup: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of qlora_nf4 with everything that it can write."""
    directory = tmp_path_factory.mktemp("nf4") / "run"
    words = ["recipe=qlora_nf4", f"output_dir={directory}", *setup]
    assert run([*words, "outputs=[adapter,nf4,merged]"]) == 0
    return directory


@pytest.fixture(scope="module")
def int4(setup: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of qlora_int4."""
    directory = tmp_path_factory.mktemp("int4") / "run"
    assert run(["recipe=qlora_int4", f"output_dir={directory}", *setup]) == 0
    return directory


def check_exact(directory: Path) -> dict[str, Any]:
    """The artifact is what was trained; returns the report."""
    report = read_report(directory)
    rows, fidelity = report["rows"], report["fidelity"]
    assert fidelity["codes_equal"] is True
    assert fidelity["weights_equal"] is True
    assert fidelity["logits"] == "equal"
    assert fidelity["max_logit_diff"] == 0
    for key in ("loss", "perplexity", "kl_to_original", "top1_agreement"):
        assert rows["trained"][key] == rows["artifact"][key]
    assert rows["trained"]["loss"] != rows["ptq"]["loss"]  # the adapter is in it
    gained = rows["trained"]["loss"] < rows["original"]["loss"]
    assert report["gain_kept"] == (1.0 if gained else None)
    return report


def check_nf4(directory: Path) -> dict[str, Any]:
    """The 4-bit base and its adapter are what was trained; returns the report."""
    report = read_report(directory)
    rows, fidelity = report["rows"], report["fidelity"]
    assert fidelity["outputs"]["nf4"].startswith("logits equal")
    assert fidelity["logits"] == "equal"
    assert rows["nf4"]["loss"] == rows["trained"]["loss"]
    original, trained, artifact = (rows[n]["loss"] for n in ("original", "trained", "artifact"))
    assert trained != original
    kept = (original - artifact) / (original - trained) if trained < original else None
    assert report["gain_kept"] == kept
    return report


# --- one run of each recipe ----------------------------------------------------------------------


def test_files(nf4: Path, int4: Path):
    assert files(int4) == ADAPTER_RUN_FILES
    merged = {f"merged/{name}" for name in ARTIFACT_FILES | {"chat_template.jinja"}}
    assert files(nf4) == ADAPTER_RUN_FILES | NF4_FILES | merged


def test_merge_exact_report(int4: Path):
    report = check_exact(int4)
    assert report["gain_kept"] == 1.0
    assert report["rows"].keys() == {
        "original", "finetuned", "ptq", "finetuned_ptq", "trained", "artifact", "served",
    }  # fmt: skip
    assert report["rows"]["artifact"]["bits_per_weight"] <= 4.6
    assert "nf4" not in report["fidelity"]["outputs"]
    facts = report["adapter"]
    assert facts["trained_parameters"] == sum(v.numel() for v in adapter_of(int4).values())
    assert "Gain kept: 100.00%" in (int4 / "report.md").read_text("utf-8")


def test_plain_report(nf4: Path):
    report = check_nf4(nf4)
    rows = report["rows"]
    assert rows.keys() == {
        "original", "finetuned", "ptq", "finetuned_ptq", "trained", "nf4", "merged", "artifact",
        "served",
    }  # fmt: skip
    assert rows["trained"]["loss"] != rows["artifact"]["loss"]
    # one absmax for 32 weights: 8 bits each, and 32 for 256 of them (the last block is half full)
    assert 4.25 < rows["trained"]["bits_per_weight"] < 4.3
    finetuned, rounded, artifact = (
        rows[n]["loss"] for n in ("finetuned", "finetuned_ptq", "artifact")
    )
    assert report["recovered"] == (rounded - artifact) / (rounded - finetuned)
    assert json.loads((nf4 / "adapter/base.json").read_text("utf-8"))["quantizer"] == {
        "dtype": "bfloat16", "quant_type": "nf4", "block_size": 32, "double_quant": True,
    }  # fmt: skip


def adapter_of(directory: Path) -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = load_file(directory / "adapter/adapter_model.safetensors")
    return tensors


def test_checkpoints_hold_adapters_only(nf4: Path):
    """By name, and by value those that are shipped; the optimizer has a state for each."""
    for phase in ("finetune", "adapter"):
        saved = torch.load(nf4 / f"checkpoints/{phase}/last.ckpt", weights_only=True)
        weights = {n: v for n, v in saved["state_dict"].items() if not n.endswith("enabled")}
        assert all(".lora_A." in name or ".lora_B." in name for name in weights)
        assert len(weights) == 28
        assert len(saved["optimizer_states"][0]["state"]) == 28
        # what is not a weight is a switch of a quantizer
        assert all(v.numel() == 1 for n, v in saved["state_dict"].items() if n not in weights)
    shipped = adapter_of(nf4)
    for name, value in weights.items():
        key = name.replace("model.", "base_model.model.", 1).replace(".default.", ".")
        assert torch.equal(shipped[key], value)
    assert (nf4 / "checkpoints/adapter/last.ckpt").stat().st_size < 4 * 4 * 29_696 + 40_000


def test_metrics(int4: Path, nf4: Path):
    """Plain steps report no quantization error; the merged ones do."""
    for directory in (int4, nf4):
        for metric in ("train_loss", "lr", "grad_norm"):
            assert list(curve(directory, "adapter", metric)) == list(STEPS)
        assert list(curve(directory, "adapter", "val_loss")) == [2, 4]
    errors = {step for _, step, metric in metrics(int4) if metric.startswith("quant_error/")}
    assert errors == {4}
    assert not any(metric.startswith("quant_error/") for _, _, metric in metrics(nf4))
    # the same run until the merged form sets in
    plain, merged = (curve(directory, "adapter", "train_loss") for directory in (nf4, int4))
    assert [plain[step] == merged[step] for step in STEPS] == [True, True, False, False]


def test_commands_on_the_outputs(nf4: Path, capsys: pytest.CaptureFixture[str]):
    before = hashes(nf4)
    for name in ("artifact", "nf4", "merged"):
        for path in (p for p in (nf4 / name).rglob("*") if p.is_file()):
            assert str(nf4.parent).encode() not in path.read_bytes(), "published as they are"
        assert cli.main(["verify", str(nf4 / name)]) == 0
        assert "every file is as the manifest says" in capsys.readouterr().out
    for name in ("artifact", "nf4"):
        assert cli.main(["generate", str(nf4 / name), "quick", "max_new_tokens=4"]) == 0
        assert capsys.readouterr().out
    assert cli.main(["generate", str(nf4 / "merged"), "quick"]) == 2
    assert "load it with transformers" in capsys.readouterr().err
    assert hashes(nf4) == before


def test_lora_bf16(setup: list[str], nf4: Path, tmp_path: Path):
    """The baseline: the phase of that name of the other recipes, bit for bit."""
    directory = tmp_path / "run"
    words = ["recipe=lora_bf16", f"output_dir={directory}", *setup, "baselines.finetune=false"]
    assert run([*words, "optim.name=paged_adamw"]) == 0
    assert files(directory) == ADAPTER_RUN_FILES - {FINETUNE}
    report = read_report(directory)
    assert report["rows"]["trained"]["bits_per_weight"] == 16
    assert report["rows"]["trained"]["loss"] == losses(nf4)["finetuned"]
    assert report["rows"]["artifact"]["loss"] == losses(nf4)["finetuned_ptq"]
    assert report["adapter"]["quantizer"] == {"dtype": "bfloat16"}


def test_succeeds_twice_in_fresh_directories(
    setup: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    words = ["recipe=qlora_nf4", *setup, "baselines.finetune=false"]
    assert run(words) == 0
    assert run(words) == 0
    one, two = Path("runs/qlora_nf4-001"), Path("runs/qlora_nf4-002")
    assert sorted(Path("runs").iterdir()) == [one, two]
    assert files(one) == files(two) == (ADAPTER_RUN_FILES | NF4_FILES) - {FINETUNE}
    assert metrics(one) == metrics(two)
    assert losses(one) == losses(two)
    for name in files(one):
        if name.endswith((".safetensors", ".json", ".jinja")) and "/" in name:
            equal = (one / name).read_bytes() == (two / name).read_bytes()
            # manifests have hashes of the above and of model cards, which name the run
            assert equal or name.endswith("manifest.json"), name


def test_dry_run(
    setup: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    monkeypatch.chdir(tmp_path)
    assert run(["recipe=qlora_int4", *setup, "dry_run=true"]) == 0
    out = capsys.readouterr().out
    assert "merge_share: 0.3" in out
    assert "quantized: 100.0% of the linear layers' parameters" in out
    assert "predicted peak memory" in out
    assert "predicted disk" in out
    assert list(tmp_path.iterdir()) == []


def test_help_lists_every_key(capsys: pytest.CaptureFixture[str]):
    assert run(["recipe=qlora_int4", "--help"]) == 0
    out = capsys.readouterr().out
    for key in ("adapter.rank", "chat.template", "merge_share", "min_gain_kept", "outputs"):
        assert key in out


def test_the_base_does_not_move(setup: list[str], nf4: Path, tmp_path: Path):
    """After other steps with other values, the 4-bit codes and the identity are the same.

    Embeddings and norms of ``nf4/`` come from the original's files, so they would show nothing.
    """
    words = ["recipe=qlora_nf4", *setup, *FAST, "optim.lr=0.01", "max_steps=2", "seed=3"]
    assert run([*words, f"output_dir={tmp_path / 'run'}"]) == 0
    name = "nf4/model.safetensors"
    bases = [load_file(directory / name) for directory in (nf4, tmp_path / "run")]
    assert bases[0].keys() == bases[1].keys()
    codes = {key for key in bases[0] if ".weight.absmax" in key}
    codes |= {key.removesuffix(".absmax") for key in codes}
    assert len(codes) == 2 * 14
    assert all(torch.equal(bases[0][key], bases[1][key]) for key in codes)
    one, two = (read_report(d)["adapter"]["base_sha256"] for d in (nf4, tmp_path / "run"))
    assert one == two
    values, others = adapter_of(nf4), adapter_of(tmp_path / "run")
    assert values.keys() == others.keys()
    assert not any(torch.equal(values[key], others[key]) for key in values)


# --- variations ----------------------------------------------------------------------------------

VARIATIONS = {
    "dropout": ["adapter.dropout=0.1"],
    "dora": ["adapter.dora=true", "adapter.dropout=0.1"],
    "rslora": ["adapter.rslora=true"],
    "bf16": ["adapter.dtype=bfloat16"],
    "pissa": ["adapter.init=pissa"],
    "loftq": ["adapter.init=loftq", "adapter.loftq_iterations=2"],
    "olora": ["adapter.init=olora"],
    "orthogonal": ["adapter.init=orthogonal"],
    "some layers": ["adapter.targets=[q_proj,'*.1.mlp.*']"],
    "fp4": ["adapter.base=fp4", "adapter.double_quant=false"],
    "16 bit": ["adapter.base=16bit", "adapter.init=pissa_niter_16"],
    "head": ["adapter.modules_to_save=[lm_head]", "scheme.keep_dtype=float16"],
    "tokens": ["adapter.new_tokens=['<|user|>','<|end|>']"],
    "w8a8": [
        "scheme.weight={bits: 8, granularity: channel, grid: absmax}",
        "scheme.input={bits: 8}",
    ],
    "static": [
        "scheme.weight={bits: 8, granularity: channel, grid: absmax}",
        "scheme.input={bits: 8, dynamic: false, granularity: tensor, scale_dtype: bfloat16}",
    ],
    "mixed": ["trainer.precision=bf16-mixed", "adapter.dropout=0.1"],
    "recompute": ["trainer.activation_checkpointing=true", "trainer.loss_chunk=32"],
    "merged throughout": ["merge_share=1", "adapter.init=gaussian"],
}


@pytest.mark.parametrize("name", VARIATIONS)
def test_merge_exact(setup: list[str], tmp_path: Path, name: str):
    words = [*setup, *FAST, *VARIATIONS[name], f"output_dir={tmp_path / 'run'}"]
    assert run(["recipe=qlora_int4", *words]) == 0
    report = check_exact(tmp_path / "run")
    assert files(tmp_path / "run") == ADAPTER_RUN_FILES - {FINETUNE}
    assert report["fidelity"]["codes_compared"] == 14


@pytest.mark.parametrize(
    "name", ["dora", "bf16", "pissa", "loftq", "some layers", "fp4", "head", "tokens"]
)
def test_base_and_adapter_are_read_as_trained(setup: list[str], tmp_path: Path, name: str):
    """By plain transformers, bitsandbytes and PEFT; with a 16-bit merge beside."""
    words = [*setup, *VARIATIONS[name], *FAST, f"output_dir={tmp_path / 'run'}"]
    assert run(["recipe=qlora_nf4", *words, "outputs=[adapter,nf4,merged]"]) == 0
    assert "merged" in check_nf4(tmp_path / "run")["rows"]


FAMILIES = {
    # biases, tied heads, norms of queries, soft caps, fused projections, experts
    "llama_bias": "qlora_nf4",
    "llama_tied": "qlora_nf4",
    "qwen3": "qlora_int4",
    "gemma2": "qlora_int4",
    "phi3": "qlora_int4",
    "opt": "qlora_nf4",
    "mixtral": "qlora_int4",
}


@pytest.mark.parametrize("family", FAMILIES)
def test_families(tmp_path: Path, family: str):
    recipe = f"recipe={FAMILIES[family]}"
    words = [*adapter_setup(tmp_path, family), *FAST, f"output_dir={tmp_path / 'run'}"]
    assert run([recipe, *words]) == 0
    check = check_exact if recipe == "recipe=qlora_int4" else check_nf4
    check(tmp_path / "run")


def test_new_tokens_of_a_tied_model(tmp_path: Path):
    words = [*adapter_setup(tmp_path, "llama_tied"), "adapter.new_tokens=['<|a|>','<|b|>']", *FAST]
    assert run(["recipe=qlora_int4", *words, f"output_dir={tmp_path / 'run'}"]) == 0
    check_exact(tmp_path / "run")
    assert json.loads((tmp_path / "run/artifact/config.json").read_text())["vocab_size"] == 258
    assert cli.main(["generate", str(tmp_path / "run/artifact"), "<|a|>", "max_new_tokens=2"]) == 0


def test_a_checkpoint_that_is_4_bit_already(setup: list[str], nf4: Path, tmp_path: Path):
    """The bitsandbytes base that another run wrote: taken over code by code, in both recipes."""
    base = tmp_path / "base"
    shutil.copytree(nf4 / "nf4", base, ignore=shutil.ignore_patterns("adapter"))
    words = [f"model={base}", *(word for word in setup if not word.startswith("model=")), *FAST]
    one, two = tmp_path / "nf4", tmp_path / "int4"
    assert run(["recipe=qlora_nf4", *words, f"output_dir={one}"]) == 0
    assert check_nf4(one)["rows"]["original"]["kl_to_original"] == 0
    stored = [load_file(d / "model.safetensors") for d in (base, one / "nf4")]
    assert stored[0].keys() == stored[1].keys()
    assert all(torch.equal(value, stored[1][name]) for name, value in stored[0].items())
    assert run(["recipe=qlora_int4", *words, f"output_dir={two}"]) == 0
    check_exact(two)


# --- data ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("words", [[], ["chat.format=text"]], ids=["auto", "text"])
def test_plain_text(setup: list[str], tmp_path: Path, words: list[str]):
    words = [*words, f"data={write_text(tmp_path / 'text.jsonl')}", *FAST]
    kept = [word for word in setup if not word.startswith("data=")]
    assert run(["recipe=qlora_int4", *kept, *words, f"output_dir={tmp_path / 'run'}"]) == 0
    assert check_exact(tmp_path / "run")["instruction_data"] is None
    # no template was applied, so none is shipped
    assert not list((tmp_path / "run").rglob("chat_template.jinja"))


def test_conversations(
    setup: list[str], int4: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
):
    """Rows that do not fit are left out, reported and counted; others train as without them."""
    data = next(Path(word.partition("=")[2]) for word in setup if word.startswith("data="))
    lines = data.read_text("utf-8").splitlines()
    lines[4:4] = ['{"messages": [{"role": "user", "content": "alone"}]}']
    (tmp_path / "chats.jsonl").write_text("\n".join(lines) + "\n", "utf-8")
    words = [f"data={tmp_path / 'chats.jsonl'}", "chat.max_bad_rows=0.01"]
    kept = [word for word in setup if not word.startswith("data=")]
    assert run(["recipe=qlora_int4", *kept, *words, f"output_dir={tmp_path / 'run'}"]) == 0
    error = capfd.readouterr().err
    assert "1 of 241 rows left out" in error
    assert "line 5: no assistant turn" in error
    summary = read_report(tmp_path / "run")["instruction_data"]
    assert summary["bad_rows"][0]["bad"] == 1
    assert curve(tmp_path / "run", "adapter", "train_loss") == curve(int4, "adapter", "train_loss")
    weights = "artifact/model.safetensors"
    assert (tmp_path / "run" / weights).read_bytes() == (int4 / weights).read_bytes()


# --- optimizers ----------------------------------------------------------------------------------


def test_paged_optimizer(setup: list[str], tmp_path: Path):
    """Without CUDA there are no pages: a line says what runs instead, with the same steps."""
    said = {}
    for name in ("paged_adamw_8bit", "adamw_8bit"):
        log = tmp_path / f"{name}.log"
        words = [*setup, *FAST, f"optim.name={name}", f"output_dir={tmp_path / name}"]
        assert run_forked(["recipe=qlora_int4", *words], log) == 0
        check_exact(tmp_path / name)
        line = (
            f"optim.name={name}: pages are a CUDA feature; on this cpu device the same 8-bit AdamW "
            "runs with its state in RAM\n"
        )
        said[name] = log.read_text("utf-8").count(line)
    assert said == {"paged_adamw_8bit": 1, "adamw_8bit": 0}
    one, two = (curve(tmp_path / name, "adapter", "train_loss") for name in said)
    assert one == two


def test_lora_plus(setup: list[str], int4: Path, tmp_path: Path):
    """B has another rate from the first step on; A, whose gradient is then zero, follows."""
    words = [*setup, "optim.lora_plus_ratio=16", f"output_dir={tmp_path / 'run'}"]
    assert run(["recipe=qlora_int4", *words]) == 0
    check_exact(tmp_path / "run")
    plain, faster = (curve(d, "adapter", "train_loss") for d in (int4, tmp_path / "run"))
    assert plain[1] == faster[1]
    assert plain[2] != faster[2]
    saved = torch.load(tmp_path / "run/checkpoints/adapter/last.ckpt", weights_only=True)
    groups = saved["optimizer_states"][0]["param_groups"]
    assert [group["initial_lr"] / groups[0]["initial_lr"] for group in groups] == [1, 16]


# --- gain kept -----------------------------------------------------------------------------------


def test_too_little_gain_kept(setup: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    """The run fails with its figures, keeps the adapter, and ends once less is asked for."""
    directory = tmp_path / "run"
    words = [word for word in setup if not word.startswith("min_gain_kept=")]
    # two bits with one scale for a whole row keep about five sixths of what 40 large steps gain
    words += ["max_steps=40", "optim.lr=0.02", "scheme.weight.bits=2", "min_gain_kept=0.95"]
    words += ["scheme.weight.granularity=channel", "trainer.validate_every_steps=40", *FAST]
    words += ["adapter.rank=4", "adapter.alpha=8"]
    assert run(["recipe=qlora_nf4", *words, f"output_dir={directory}"]) == 1
    error = capfd.readouterr().err
    assert "below min_gain_kept=0.95. Losses in nats: original 5." in error
    assert f"The adapter is in {directory / 'adapter'}" in error
    assert f"Continue with: python train.py recipe=qlora_nf4 resume={directory}" in error
    assert {f"adapter/{name}" for name in ADAPTER_FILES} <= files(directory)
    before = hashes(directory)
    for name in before:
        assert not name.startswith("artifact/")
        assert not name.startswith("report")
        assert ".tmp" not in name
    assert run([f"resume={directory}", "min_gain_kept=0.94"]) == 1
    assert "below min_gain_kept=0.94" in capfd.readouterr().err
    assert run([f"resume={directory}", "min_gain_kept=null"]) == 0
    assert check_nf4(directory)["gain_kept"] < 0.94
    after = hashes(directory)
    same = [name for name in before if name.endswith((".safetensors", ".ckpt"))]
    assert all(before[name] == after[name] for name in same)
