"""The checked-in demo model: its size, its record, and that it has learned something real."""

import json

import pytest
import torch

from data import corpus
from data.demo import MODEL_DIRECTORY, model_path
from data.module import TextDataModule
from qat.evaluate import measure
from qat.models import load_model, load_tokenizer
from qat.packing import batches
from qat.text import TextConfig
from recipes.pretrain import bits_per_byte

RECORD = json.loads((MODEL_DIRECTORY / "training.json").read_text("utf-8"))


def test_size_and_files():
    sizes = {path.name: path.stat().st_size for path in MODEL_DIRECTORY.iterdir()}
    assert set(sizes) == {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        "training.json",
    }
    assert sum(sizes.values()) <= 10_000_000


def test_record_says_how_it_was_made():
    assert RECORD["config"]["recipe"] == "pretrain_demo"
    assert {"train_loss", "val_loss"} == set(RECORD["loss_curve"])
    assert RECORD["seconds"] > 0
    assert RECORD["environment"]["versions"]["torch"]
    # the checkpoint with the lowest validation loss, not the last one by habit
    curve = RECORD["loss_curve"]["val_loss"]
    assert min(curve, key=lambda point: point[1])[0] == RECORD["best_step"]


def test_weights_are_bf16_and_of_the_stated_size():
    model = load_model(model_path("demo"), torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert 3_000_000 <= sum(p.numel() for p in model.parameters()) <= 5_000_000


def test_fewer_bits_per_byte_than_xz_after_the_training_text(tmp_path):
    tokenizer = load_tokenizer(model_path("demo"))
    text = TextConfig(seq_len=RECORD["config"]["text"]["seq_len"], cache_dir=str(tmp_path))
    data = TextDataModule("demo", tokenizer, text, 1, 1, seed=0)
    model = load_model(model_path("demo"))
    quality = measure(model, batches(data.held_out_blocks, 4), None, "held-out text")
    bits = bits_per_byte(quality, model.config.vocab_size)
    xz = corpus.xz_bits_per_byte()
    assert bits < xz.with_prefix < xz.alone
    if corpus.fingerprint() != RECORD["corpus_fingerprint"]:
        pytest.skip("another Python's documentation: the record's figures do not apply")
    # the same fp32 sums on another CPU or thread count differ in the order of additions only:
    # sqrt(n) * 2^-24 * 6 with n = 4096 terms per dot product and layer stays below 1e-4
    assert bits == pytest.approx(RECORD["bits_per_byte"]["model"], rel=1e-4)
    assert xz.with_prefix == RECORD["bits_per_byte"]["xz -9e after training text"]
