"""Predicted against measured peaks of a 112 M-parameter model: plain, QAT and QLoRA training."""

import json
import multiprocessing
import random
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import Trainer
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

from qat.adapter_state import base_sha256
from qat.config import load
from qat.finish import finish
from qat.loggers import Loggers
from qat.memory import Prediction, RunPlan, predict
from qat.memory_meter import MemoryMeter, release
from qat.models import load_model, load_tokenizer, meta_model
from qat.prepare import plan, prepare
from qat.training import fit
from recipes import RECIPES, qat, qlora
from recipes.adapter_parts import Parts
from recipes.common import new_data, new_module, new_result

VOCAB = 8192
TOLERANCE = 0.15
"""What the project promises of its predictions."""


@dataclass(frozen=True)
class Measured:
    """Both figures of one run, bytes."""

    predicted: dict[str, int]
    measured: dict[str, int]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model of configs/benchmark.yaml with a tokenizer of its vocabulary, and a text."""
    directory = tmp_path_factory.mktemp("memory") / "model"
    shape = LlamaConfig(
        hidden_size=768,
        intermediate_size=2048,
        num_hidden_layers=14,
        num_attention_heads=12,
        num_key_value_heads=12,
        vocab_size=VOCAB,
        tie_word_embeddings=False,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(shape, dtype=torch.bfloat16).save_pretrained(directory)
    words = {"<pad>": 0, "<s>": 1, "</s>": 2} | {f"w{i}": i for i in range(3, VOCAB)}
    made = Tokenizer(WordLevel(words, unk_token="<pad>"))
    made.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    ).save_pretrained(directory)
    rng = random.Random(0)
    texts = [" ".join(f"w{rng.randrange(3, VOCAB)}" for _ in range(100)) for _ in range(120)]
    lines = [json.dumps({"text": text}) for text in texts]
    (directory / "text.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return directory


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("plain", []),
        ("qat and finish", []),
        ("qlora", []),
        ("qlora", ["merge_share=0.5"]),
    ],
)
def test_prediction_is_within_15_percent(kind: str, words: list[str], model: Path, tmp_path: Path):
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        result = pool.apply(_run, (kind, words, model, tmp_path))
    assert {"train", "disk"} <= result.measured.keys()
    for name, measured in result.measured.items():
        assert result.predicted[name] == pytest.approx(measured, rel=TOLERANCE), name


def _config(kind: str, words: list[str], model: Path, run: Path) -> Any:
    recipe = RECIPES["qlora_nf4" if kind == "qlora" else "qat_int4"]
    small = {
        "recipe": recipe.name,
        "model": model,
        "data": model / "text.jsonl",
        "output_dir": run,
        "max_steps": 2,
        "logger": "none",
        "optim.warmup_steps": 1,
        "text.seq_len": 256,
        "text.cache_dir": run / "cache",
        "text.validation_fraction": 0.05,
        "trainer.progress_bar": "false",
        "trainer.micro_batch_size": 2,
        "trainer.global_batch_size": 2,
        "trainer.checkpoint_every_steps": 1,
        "evaluate.max_tokens": 512,
        "evaluate.batch_size": 2,
    } | dict(word.split("=", 1) for word in words)
    argv = [f"{key}={value}" for key, value in small.items()]
    return load(recipe.schema(), argv, [recipe.config_file])


def _run(kind: str, words: list[str], model: Path, run: Path) -> Measured:
    """What the recipes do, with a meter; in a process of its own."""
    warnings.simplefilter("ignore")
    kind, _, finishes = kind.partition(" and ")
    config = _config(kind, words, model, run)
    path = str(model)
    parts = Parts.load(config) if kind == "qlora" else None
    prediction = _predict(kind, config, parts)
    tokenizer = load_tokenizer(path)
    data = new_data(config, tokenizer)
    meter = MemoryMeter(give_back=True)
    with meter.phase("load"):
        if parts is not None:
            trained, coverage = parts.build(config.adapter)
        else:
            trained = load_model(path)
            coverage = (prepare if kind == "qat" else plan)(trained, config.scheme)
    release(trained)
    if parts is None:
        module = new_module(config, trained)
    else:
        module = new_module(config, trained, config.plain_steps, base_sha256(trained))
    disk = _watch_saving(meter, run / "checkpoints")
    loggers = Loggers(config.logger, config.wandb, run, {})
    with meter.phase("train"):
        fit(module, data, config.trainer, run / "checkpoints" / kind, loggers.phase(kind))
    del module
    release(trained)
    if finishes:
        result = new_result(config, run, data, tokenizer, trained, coverage, qat.Stopwatch())
        with meter.phase("finish"):
            finish(result)
        disk.append(_bytes(run / "checkpoints") + _bytes(run / "artifact"))
    predicted = prediction.phases | {"disk": prediction.disk}
    measured = {name: size for name, size in meter.host.items() if name != "load"}
    if measured["save"] < measured["train"]:
        del measured["save"]  # not a peak, so nobody needs it
    if not finishes:
        # ends without an artifact, so only the moment of saving can be compared
        predicted["disk"] = 2 * (prediction.gradients + prediction.optimizer)
    return Measured(predicted, measured | {"disk": max(disk)})


def _predict(kind: str, config: Any, parts: Parts | None) -> Prediction:
    if parts is not None:
        return qlora.foresee(parts)[-1]
    if kind == "qat":
        return qat.foresee(config)[1]
    model = meta_model(config.model)
    run = RunPlan(
        seq_len=config.text.seq_len,
        max_steps=config.max_steps,
        trainer=config.trainer,
        optim=config.optim,
        file_dtype=torch.bfloat16,
        evaluate=config.evaluate,
    )
    return predict(model, plan(model, config.scheme), run)


def _watch_saving(meter: MemoryMeter, checkpoints: Path) -> list[int]:
    """Give saving a phase of its own in this process; the sizes on disk after each."""
    original, sizes = Trainer.save_checkpoint, [0]

    def save(*args: Any, **kwargs: Any) -> None:
        with meter.phase("save"):
            original(*args, **kwargs)
        sizes.append(_bytes(checkpoints))

    Trainer.save_checkpoint = save  # type: ignore[method-assign]
    return sizes


def _bytes(directory: Path) -> int:
    return sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())
