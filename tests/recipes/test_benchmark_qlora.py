"""The benchmark of adapter training on a tiny shape: it runs, and it compares equals."""

import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from qat.config import load
from qat.errors import UserError
from recipes import CONFIGS, RECIPES, benchmark_qlora, random_model
from recipes.benchmark_qlora import compare
from recipes.config import AdapterBenchmarkConfig
from recipes.contestants import build_all
from recipes.random_model import write_random_model
from tests.recipes.running import run

RECIPE = RECIPES["benchmark_qlora"]
WORDS = [
    "recipe=benchmark_qlora",
    "device=cpu",
    "shape.hidden_size=64",
    "shape.intermediate_size=128",
    "shape.num_hidden_layers=2",
    "shape.num_attention_heads=4",
    "shape.num_key_value_heads=2",
    "shape.vocab_size=256",
    "adapter.rank=4",
    "batch_size=1",
    "seq_len=32",
    "repeats=1",
]


def config(*words: str) -> AdapterBenchmarkConfig:
    made: AdapterBenchmarkConfig = load(
        RECIPE.schema(), [*WORDS, *words], [RECIPE.config_file], CONFIGS
    )
    return made


@pytest.fixture
def model(tmp_path: Path) -> Path:
    write_random_model(config().shape, tmp_path, seed=0)
    return tmp_path


def test_runs_end_to_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    pytest.importorskip("bitsandbytes")
    assert run([*WORDS, f"output_dir={tmp_path}", "contestants=[ours,peft]"]) == 0
    printed = capsys.readouterr().out
    assert "ours and peft agree" in printed
    # the random model is gone
    assert [path.name for path in tmp_path.iterdir()] == ["benchmark_qlora.json"]
    result = json.loads((tmp_path / "benchmark_qlora.json").read_text("utf-8"))
    for kind in ("ours", "peft"):
        assert f"| `{kind}` |" in printed
        assert [seconds > 0 for seconds in result["seconds"][kind]] == [True]
        assert {"load", "step"} == result["memory_bytes"][kind]["used"].keys()
    assert result["speed_over_peft"]["peft"] == 1
    assert result["predicted_step_bytes"].keys() == {"ours"}
    assert result["tokens_per_step"] == 32
    assert {"torch", "peft", "bitsandbytes"} <= result["environment"]["versions"].keys()


def test_without_bitsandbytes_ours_is_measured_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(benchmark_qlora, "find_spec", lambda name: None)
    assert run([*WORDS, f"output_dir={tmp_path}", "contestants=[merged,peft]"]) == 0
    printed = capsys.readouterr().out
    assert "| `merged` |" in printed
    assert "| `peft` |" not in printed
    assert "bitsandbytes is not installed" in printed
    result = json.loads((tmp_path / "benchmark_qlora.json").read_text("utf-8"))
    assert (result["missing"], result["speed_over_peft"], result["check"]) == (["peft"], {}, None)


@pytest.mark.parametrize("words", [[], ["precision=bf16-mixed", "activation_checkpointing=true"]])
def test_contestants_compute_the_same(words: list[str], model: Path):
    pytest.importorskip("bitsandbytes")
    made = config(*words)
    entrants = build_all(made, model, ["ours", "peft", "merged"])
    check = compare(entrants["ours"], entrants["peft"], made)
    assert check["equal"]
    assert check["equal_codes"] == 1
    # one model in two forms, and the merged one has other weights
    assert entrants["ours"].model is entrants["merged"].model
    entrants["merged"].step()
    assert float(entrants["merged"].loss().detach()) != check["loss"]["ours"]


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_a_peer_on_another_base_is_found(precision: str, model: Path):
    pytest.importorskip("bitsandbytes")
    made = config(f"precision={precision}")
    ours = build_all(made, model, ["ours"])["ours"]
    other = replace(made, adapter=replace(made.adapter, base="fp4"))
    check = compare(ours, build_all(other, model, ["peft"])["peft"], made)
    assert not check["equal"]
    assert check["equal_codes"] < 0.5


def test_random_model_is_streamed_into_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(random_model, "SHARD_BYTES", 40_000)
    shape = config().shape
    count = write_random_model(shape, tmp_path, seed=0)
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    read, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert read.dtype == torch.bfloat16
    assert count == sum(parameter.numel() for parameter in read.parameters())
    assert torch.equal(read.model.norm.weight, torch.ones_like(read.model.norm.weight))
    # 16,384 values: four standard errors of a standard deviation are 4 / sqrt(2 n) = 2.2 %
    embedding = read.model.embed_tokens.weight.detach().float()
    assert float(embedding.std()) == pytest.approx(0.02, rel=0.022)


def test_disk_without_room(tmp_path: Path):
    huge = replace(config().shape, vocab_size=10**12)
    with pytest.raises(UserError, match=r"the random model takes 128000\.0 GB of disk"):
        write_random_model(huge, tmp_path, seed=0)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("word", "answer"),
    [
        ("adapter.block_size=128", "blocks of 64 only"),
        ("adapter.base=16bit", "blocks of 64 only"),
        ("adapter.init=pissa", "take default, gaussian or orthogonal"),
        ("adapter.dropout=0.1", "only 0 and float32"),
        ("adapter.new_tokens=['<a>']", "not compared here"),
        ("contestants=[]", "name ours, peft or merged"),
        ("repeats=0", "at least 1"),
        ("shape.intermediate_size=96", "a multiple of 64"),
        ("shape.num_attention_heads=5", "a multiple of num_attention_heads=5"),
    ],
)
def test_bad_values(word: str, answer: str):
    key = word.partition("=")[0]
    words = [w for w in WORDS if not w.startswith(f"{key}=")]
    with pytest.raises(UserError) as caught:
        load(RECIPE.schema(), [*words, word], [RECIPE.config_file], CONFIGS)
    assert answer in str(caught.value)


def test_preset_is_the_8b_shape():
    words = ["recipe=benchmark_qlora", "preset=model/llama_8b"]
    made: AdapterBenchmarkConfig = load(RECIPE.schema(), words, [RECIPE.config_file], CONFIGS)
    assert made.precision == "bf16-mixed"
    assert made.activation_checkpointing
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(LlamaConfig(**asdict(made.shape)))
    # Llama 3 8B, by its model card's rounding and by addition
    assert sum(parameter.numel() for parameter in model.parameters()) == 8_030_261_248
