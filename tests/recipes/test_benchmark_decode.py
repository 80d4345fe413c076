"""The benchmark of decoding on a tiny shape: it runs, reports and compares answers."""

import csv
import json
from pathlib import Path

import pytest
import torch

from qat.config import load
from qat.errors import UserError
from qat.packed_layers import Int8Linear, PackedLinear
from recipes import CONFIGS, RECIPES, benchmark_decode
from recipes.benchmark_decode import Row, memory_table, table
from recipes.config import DecodeBenchmarkConfig
from recipes.decoding import contestants, generate, prompts_of, time_layers
from recipes.resident import Resident, in_own_process
from tests.recipes.running import run

RECIPE = RECIPES["benchmark_decode"]
WORDS = [
    "recipe=benchmark_decode",
    "shape.hidden_size=64",
    "shape.intermediate_size=128",
    "shape.num_hidden_layers=2",
    "shape.num_attention_heads=4",
    "shape.num_key_value_heads=2",
    "shape.vocab_size=256",
    "more_vocabularies=[512]",
    "batches=[1,3]",
    "check_batch=4",
    "prompt_tokens=8",
    "new_tokens=6",
    "repeats=1",
]


def config(*words: str) -> DecodeBenchmarkConfig:
    made: DecodeBenchmarkConfig = load(
        RECIPE.schema(), [*WORDS, *words], [RECIPE.config_file], CONFIGS
    )
    return made


def test_runs_end_to_end(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    # two processes suffice
    measured = benchmark_decode.memory
    monkeypatch.setattr(
        benchmark_decode,
        "memory",
        lambda made, places: measured(made, {n: places[n] for n in ("bf16", "w4")}),
    )
    assert run([*WORDS, f"output_dir={tmp_path}"]) == 0
    printed = capsys.readouterr().out
    assert "`w4` 4 of 4" in printed
    # the random models are gone
    names = {f"benchmark_decode.{suffix}" for suffix in ("json", "csv", "png")}
    assert {path.name for path in tmp_path.iterdir()} == names
    result = json.loads((tmp_path / "benchmark_decode.json").read_text("utf-8"))
    rows = {(r["work"], r["vocabulary"], r["batch"], r["contestant"]) for r in result["rows"]}
    steps = {("step", 256, 1, name) for name in ("bf16", "w4", "w4 head", "w8a8")}
    steps |= {("step", 256, 3, name) for name in ("bf16", "w4", "w8a8")}
    steps |= {("step", 512, 1, name) for name in ("bf16", "w4", "w4 head")}
    assert {row for row in rows if row[0] == "step"} == steps
    layers = {("layers", 256, b, name) for b in (1, 3) for name in ("bf16", "w4", "w8a8")}
    assert rows - steps == layers
    for row in result["rows"]:
        assert 0 < row["fastest"] <= row["seconds"] <= row["slowest"]
        assert (row["contestant"] != "bf16") or row["over_bf16"] == 1
    with (tmp_path / "benchmark_decode.csv").open(encoding="utf-8") as file:
        assert len(list(csv.DictReader(file))) == len(result["rows"])
    assert result["equal_answers"]["w4"] == 4
    assert list(result["resident_bytes"]) == ["bf16", "w4"]
    for name, found in result["resident_bytes"].items():
        assert found["stored"] < result["resident_bytes"]["bf16"]["stored"] or name == "bf16"
        assert found["peak"] >= found["served"]
        assert f"| `{name}` | " in printed


def test_answers_that_depend_on_the_batch_fail_the_run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(benchmark_decode, "equal_answers", lambda *_: {"bf16": 1, "w4": 3})
    # takes processes, and is no part of this
    monkeypatch.setattr(benchmark_decode, "memory", lambda *_: {})
    assert run(WORDS) == 1
    output = capsys.readouterr()
    assert "`w4` 3 of 4" in output.out
    assert "depend on the batch" in output.err


def test_contestants_are_what_they_are_called(tmp_path: Path):
    made = config()
    found = contestants(made, 256, ["w4", "w4 head", "w8a8"], tmp_path)
    kinds = {
        "w4": (PackedLinear, 14, False),
        "w4 head": (PackedLinear, 15, True),
        "w8a8": (Int8Linear, 14, False),
    }
    for name, (kind, count, head) in kinds.items():
        model = found.models[name]
        assert sum(isinstance(m, kind) for m in model.modules()) == count
        assert isinstance(model.lm_head, kind) == head
    for model in found.models.values():
        assert next(model.parameters()).dtype == torch.bfloat16
    assert found.weight_bytes["w4 head"] < found.weight_bytes["w4"] < found.weight_bytes["w8a8"]
    assert found.weight_bytes["w8a8"] < found.weight_bytes["bf16"]
    prompts = prompts_of(made, 3, 256)
    assert [len(prompt) for prompt in prompts] == [8, 5, 2]
    answers, steps = generate(found.models["w4"], prompts, 6)
    assert tuple(answers.shape) == (3, 6)
    assert len(steps) == 5
    assert {len(times) for times in time_layers(made, found, 2).values()} == {1}


def test_table():
    row = Row("step", 8192, 1, "w4", 0.0125, 0.01, 0.02, 3.4, 0.2)
    assert table([row], {8192: 345_000_000}).splitlines() == [
        "vocabulary 8,192: 345,000,000 parameters",
        "",
        "| work | vocabulary | batch | | median ms | min | max | over bf16 | weights GB |",
        "|---|---:|---:|---|---:|---:|---:|---:|---:|",
        "| step | 8,192 | 1 | `w4` | 12.50 | 10.00 | 20.00 | 3.40 | 0.200 |",
    ]


def test_memory_table():
    row = Row("step", 8192, 1, "w4", 0.0125, 0.01, 0.02, 3.4, 0.2)
    found = {"w4": Resident(200_000_000, 190_000_000, 221_000_000, 230_000_000)}
    lines = memory_table([row], found).splitlines()
    assert lines[2] == "| `w4` | 80.0 | 200.0 | 221.0 | +10.5 % | 230.0 |"


def test_a_model_that_cannot_be_loaded_is_named(tmp_path: Path):
    with pytest.raises(RuntimeError, match="no such directory"):
        in_own_process("packed", tmp_path / "none", tmp_path / "none", 4)


@pytest.mark.parametrize(
    ("word", "answer"),
    [
        ("repeats=0", "at least 1"),
        ("new_tokens=3", "at least 4"),
        ("batches=[]", "one or more"),
        ("batches=[0]", "one or more"),
        ("more_vocabularies=[1]", "at least 2"),
        ("shape.tie_word_embeddings=true", "quantizes the head"),
        ("prompt_tokens=2000", "max_position_embeddings=1024"),
    ],
)
def test_bad_values(word: str, answer: str):
    key = word.partition("=")[0]
    words = [w for w in WORDS if not w.startswith(f"{key}=")]
    with pytest.raises(UserError) as caught:
        load(RECIPE.schema(), [*words, word], [RECIPE.config_file], CONFIGS)
    assert answer in str(caught.value)


def test_the_default_shape_has_300_million_parameters():
    made = load(RECIPE.schema(), ["recipe=benchmark_decode"], [RECIPE.config_file], CONFIGS)
    shape = made.shape
    assert shape.vocab_size <= 8192
    head = shape.hidden_size // shape.num_attention_heads
    attention = 2 * shape.hidden_size**2 + 2 * shape.hidden_size * shape.num_key_value_heads * head
    matrices = attention + 3 * shape.hidden_size * shape.intermediate_size
    # without embeddings and head
    assert shape.num_hidden_layers * matrices > 300e6
