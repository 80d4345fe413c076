"""Loading a causal language model and its tokenizer, with errors that say what to do."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from qat.errors import UserError, nearest

BITSANDBYTES = "bitsandbytes"
"""``quant_method`` of the only quantized checkpoints that training can start from."""


def _first(error: Exception) -> str:
    """First line of an error's message, or its name."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def load_config(model: str, allow: str | None = None) -> PreTrainedConfig:
    """The configuration of a Hugging Face id or local directory.

    Args:
        model: the id or directory.
        allow: a ``quant_method`` that is welcome; else the model must not be quantized.

    Raises:
        UserError: nothing there, not a transformers model, or already quantized.
    """
    path = Path(model)
    looks_local = path.is_absolute() or model.startswith((".", "~")) or model.count("/") != 1
    if path.exists() or looks_local:
        _check_directory(path, model)
    try:
        config = AutoConfig.from_pretrained(model)
    except (OSError, ValueError, json.JSONDecodeError) as error:
        raise UserError(
            f"model={model}: cannot be loaded ({_first(error)}). Give a local directory that holds "
            "config.json and safetensors, or a Hugging Face id that this machine can reach"
        ) from error
    quantized = getattr(config, "quantization_config", None)
    if quantized:
        method = quantized.get("quant_method") if isinstance(quantized, dict) else quantized
        if allow is None or method != allow:
            adapters = " (adapters also train on 4-bit bitsandbytes checkpoints)"
            raise UserError(
                f"model={model}: already quantized ({method}); training starts from a 16- or "
                f"32-bit model{adapters if allow else ''}. Give the original"
            )
    return config


def _check_directory(path: Path, model: str) -> None:
    if not path.exists():
        siblings = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
        near = nearest(path.name, siblings)
        hint = f"; did you mean {path.parent / near}?" if near else ""
        raise UserError(f"model={model}: no such directory{hint}")
    if not (path / "config.json").is_file():
        raise UserError(
            f"model={model}: holds no config.json; a model directory as save_pretrained writes it "
            "is needed"
        )


def load_model(model: str, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """A causal LM with its weights in ``dtype`` (fp32 master weights by default), in eval mode.

    Raises:
        UserError: see `load_config`; also when the weights are missing or do not fit.
    """
    config = load_config(model)
    try:
        loaded, info = AutoModelForCausalLM.from_pretrained(
            model, config=config, dtype=dtype, output_loading_info=True
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise UserError(f"model={model}: the weights cannot be loaded ({_first(error)})") from error
    missing = sorted(info["missing_keys"])
    if missing:
        raise UserError(
            f"model={model}: {len(missing)} weights are missing, the first is {missing[0]}; they "
            "would be random. Check that the directory is complete"
        )
    loaded.eval()
    return loaded


def recompute_activations(model: PreTrainedModel, on: bool) -> None:
    """Switch activation checkpointing of a transformers model."""
    # renamed in transformers 5.2x; the old names warn there
    kind = "activation" if hasattr(model, "activation_checkpointing_enable") else "gradient"
    switch: Any = getattr(model, f"{kind}_checkpointing_{'enable' if on else 'disable'}")
    if on:
        switch({"use_reentrant": False})
    else:
        switch()


def meta_model(model: str) -> PreTrainedModel:
    """The model without its weights, on the meta device: for coverage and memory predictions."""
    config = load_config(model)
    try:
        with torch.device("meta"):
            skeleton = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    except ValueError as error:
        raise UserError(f"model={model}: not a causal language model ({_first(error)})") from error
    skeleton.tie_weights()
    return skeleton


def load_tokenizer(model: str, vocab_size: int | None = None) -> PreTrainedTokenizerFast:
    """The tokenizer of a model.

    Args:
        model: Hugging Face id or local directory.
        vocab_size: entries of the model's embedding, checked against the tokenizer's ids.

    Raises:
        UserError: the model has none, or one with ids that the embedding lacks.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(model)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ImportError) as error:
        raise UserError(
            f"model={model}: no tokenizer can be loaded ({_first(error)}). Put tokenizer.json and "
            "tokenizer_config.json beside the weights"
        ) from error
    if not getattr(tokenizer, "is_fast", False) or len(tokenizer) < 2:
        raise UserError(f"model={model}: no fast tokenizer (tokenizer.json) in it")
    largest = max(tokenizer.get_vocab().values())
    if vocab_size is not None and largest >= vocab_size:
        raise UserError(
            f"model={model}: the tokenizer has the id {largest}, the model's vocabulary ends at "
            f"{vocab_size - 1}; tokenizer and weights do not belong together"
        )
    return tokenizer
