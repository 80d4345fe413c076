"""Tiny artifacts in a fraction of a second: prepared, converted, described, not trained.

>>> path = make_artifact(tmp_path / "artifact", "qwen3", Scheme(weight=QuantSpec(bits=3)))

Their tensors allow groups of 32, 64 and 128 inputs. Weights are off the bf16 grid until `prepare`
rounds them, norms are not all ones, and a third of the scales are negative (signed absmax).
"""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.processors import TemplateProcessing
from tokenizers.trainers import BpeTrainer
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Gemma2Config,
    Gemma3TextConfig,
    GemmaConfig,
    LlamaConfig,
    MistralConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

from qat.artifact import write_manifest
from qat.convert import write_checkpoint
from qat.models import load_model
from qat.prepare import prepare
from qat.scheme import Scheme
from qat.training import calibrate
from tests.tiny import CONFIGS as SMALLER
from tests.tiny import random_batch

DEMO_MODEL = Path(__file__).parents[3] / "data" / "demo_model"

BASE: dict[str, Any] = {
    "vocab_size": 512,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
}
TIED = BASE | {"tie_word_embeddings": True}
WIDE_HEADS = TIED | {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 256}

CONFIGS: dict[str, Callable[..., PreTrainedConfig]] = {
    "llama": functools.partial(LlamaConfig, **BASE),
    "llama_tied": functools.partial(LlamaConfig, **TIED),
    "llama_bias": functools.partial(LlamaConfig, **BASE, attention_bias=True),
    "mistral": functools.partial(MistralConfig, **BASE, sliding_window=None),
    "qwen2": functools.partial(Qwen2Config, **BASE),
    # the only head size for which transformers' reader of GGUF knows Qwen3
    "qwen3": functools.partial(Qwen3Config, **TIED, head_dim=128),
    "gemma": functools.partial(GemmaConfig, **TIED, head_dim=32),
    # heads of 256, the only size that every reader scales alike; the sixth layer sees everything
    "gemma2": functools.partial(Gemma2Config, **WIDE_HEADS, sliding_window=64),
    "gemma3": functools.partial(
        Gemma3TextConfig, **(WIDE_HEADS | {"num_hidden_layers": 6}), sliding_window=64
    ),
}
"""Family → its configuration; keyword arguments replace fields."""

CARD = """---
library_name: transformers
tags:
- compressed-tensors
base_model: example/tiny-base
base_model_relation: quantized
license: apache-2.0
---

# Tiny

## Use

Not for use.

## Quality

Untrained.
"""

CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>\n{{ message['content'] }}</s>\n"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)

LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPECIAL = ["<pad>", "<s>", "</s>"]

TEXT = [
    "The quick brown fox can't jump over 12345 lazy dogs; it wouldn't even try.",
    "def tokenize(text: str) -> list[int]:\n    return [ord(c) for c in text]\n\n",
    "Größe, naïveté, déjà vu — ¿qué? 你好世界。 Привет, мир! 🙂",
    "In 2026 the model's 4-bit weights are trained,\tnot rounded afterwards...  \n\n  Done.",
]
"""What tokenizers are trained and tried on: contractions, digits, whitespace, several scripts."""


@functools.cache
def make_tokenizer(kind: str = "gpt2", vocab: int = 512) -> PreTrainedTokenizerFast:
    """A trained BPE tokenizer with at most ``vocab`` entries, the first three special.

    Args:
        kind: gpt2, llama3 or qwen2 (byte-level, with that pre-tokenizer); llama2 or gemma
            (SentencePiece-like: ``▁`` for spaces, byte fallback).
        vocab: entries wanted.
    """
    if kind in ("llama2", "gemma"):
        model = _sentencepiece_like(kind, vocab)
    else:
        model = _byte_level(kind, vocab)
    if kind != "qwen2":
        bos = [("<s>", 1)]
        model.post_processor = TemplateProcessing(
            single="<s> $A", pair="<s> $A <s>:1 $B:1", special_tokens=bos
        )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=model,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        chat_template=CHAT_TEMPLATE,
    )
    tokenizer.add_tokens(
        [AddedToken("<|user|>", normalized=False), AddedToken("<|assistant|>", special=True)]
    )
    return tokenizer


def _byte_level(kind: str, vocab: int) -> Tokenizer:
    model = Tokenizer(BPE(ignore_merges=kind == "llama3"))
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=kind == "gpt2")
    if kind == "gpt2":
        model.pre_tokenizer = byte_level
    else:
        split = Regex({"llama3": LLAMA3_SPLIT, "qwen2": QWEN2_SPLIT}[kind])
        model.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Split(split, behavior="isolated", invert=False), byte_level]
        )
    if kind == "qwen2":
        model.normalizer = normalizers.NFC()
    model.decoder = decoders.ByteLevel()
    trainer = BpeTrainer(
        vocab_size=vocab - 2,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    model.train_from_iterator(TEXT * 4, trainer)
    return model


def _sentencepiece_like(kind: str, vocab: int) -> Tokenizer:
    bytes_ = [f"<0x{i:02X}>" for i in range(256)]
    steps = [normalizers.Replace(" ", "▁")]
    if kind == "llama2":
        steps.insert(0, normalizers.Prepend("▁"))
    normalizer = normalizers.Sequence(steps)
    learner = Tokenizer(BPE())
    learner.normalizer = normalizer
    learner.pre_tokenizer = pre_tokenizers.Split(Regex(r"▁?[^▁]+|▁+"), behavior="isolated")
    trainer = BpeTrainer(vocab_size=vocab - 2, special_tokens=[*SPECIAL, "<unk>", *bytes_],
                         show_progress=False)  # fmt: skip
    learner.train_from_iterator([t for t in TEXT * 4 if t.isascii()], trainer)
    vocab = learner.get_vocab()
    # SentencePiece merges whatever makes a token, so its converters list every pair of every token
    merges = [
        (token[:at], token[at:])
        for token in sorted(vocab, key=vocab.__getitem__)
        if token not in (*SPECIAL, "<unk>", *bytes_)
        for at in range(1, len(token))
        if token[:at] in vocab and token[at:] in vocab
    ]
    model = Tokenizer(BPE(vocab, merges, byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
    model.add_special_tokens([*SPECIAL, "<unk>"])
    model.normalizer = normalizer
    after = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    if kind == "llama2":
        after.append(decoders.Strip(content=" ", left=1))
    model.decoder = decoders.Sequence(after)
    return model


def make_model(family: str, seed: int = 0, **changes: Any) -> PreTrainedModel:
    """A random fp32 model in eval mode; families of tests/tiny.py in their smaller shapes too."""
    config = CONFIGS[family](**changes) if family in CONFIGS else SMALLER[family]
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.05)
    return model.eval()


def make_artifact(
    directory: Path,
    family: str = "llama",
    scheme: Scheme | None = None,
    tokenizer: str | PreTrainedTokenizerFast = "gpt2",
    seed: int = 0,
    **changes: Any,
) -> Path:
    """Write an artifact (checkpoint, tokenizer, card, manifest) as a run writes it.

    Args:
        directory: made here.
        family: key of `CONFIGS`, or of ``tests.tiny.CONFIGS``.
        scheme: int4 in groups of 32 where None; ``Scheme(keep_dtype=...)`` for kept tensors.
        tokenizer: kind, see `make_tokenizer`, or a tokenizer.
        seed: of the weights.
        changes: fields of the configuration (only families of `CONFIGS`).
    """
    model = make_model(family, seed, **changes)
    if isinstance(tokenizer, str):
        tokenizer = make_tokenizer(tokenizer, model.config.vocab_size)
    return _write(model, tokenizer, Scheme() if scheme is None else scheme, directory)


def make_demo_artifact(directory: Path, scheme: Scheme | None = None) -> Path:
    """An artifact of the demo model, which has learnt English and Python, rounded untrained."""
    model = load_model(str(DEMO_MODEL))
    tokenizer = AutoTokenizer.from_pretrained(DEMO_MODEL)
    return _write(model, tokenizer, Scheme() if scheme is None else scheme, directory)


def _write(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, scheme: Scheme, directory: Path
) -> Path:
    coverage = prepare(model, scheme)
    calibrate(model, [random_batch(seed=1)])
    directory.mkdir(parents=True)
    write_checkpoint(model.eval(), tokenizer, coverage, scheme, directory)
    (directory / "README.md").write_text(CARD, encoding="utf-8")
    write_manifest(directory, {"recipe": "test", "model": "example/tiny-base"})
    return directory
