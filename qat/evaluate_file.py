"""``qat evaluate ARTIFACT data=FILE``: loss and perplexity of an artifact on any text."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch

from qat.errors import UserError
from qat.evaluate import measure
from qat.models import load_tokenizer
from qat.packing import Blocks, batches
from qat.runtime import load_packed, read_artifact_config
from qat.text import TextConfig
from qat.tokens import token_store


@dataclass(frozen=True)
class EvaluateFileOptions:
    """Options of ``qat evaluate``."""

    data: str
    """Text file, JSON lines or parquet file."""
    max_tokens: int | None = None
    """Stop after so many tokens; null reads the whole file."""
    batch_size: int = 8
    """Text blocks of one forward pass."""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """bfloat16 is how the model is served; float32 computes what was trained, slower."""
    text: TextConfig = field(default_factory=TextConfig)
    """Reading and packing of the text."""


def evaluate_file(artifact: Path, options: EvaluateFileOptions) -> str:
    """Measure the packed model of ``artifact`` on a text; returns the lines to print.

    Raises:
        UserError: not a whole artifact, unreadable text, or blocks longer than the model's context.
    """
    config, _ = read_artifact_config(artifact)
    positions = getattr(config.get_text_config(), "max_position_embeddings", None)
    if positions is not None and options.text.seq_len > positions:
        raise UserError(f"text.seq_len={options.text.seq_len}: the model has {positions} positions")
    tokenizer = load_tokenizer(str(artifact))
    store = token_store(options.data, tokenizer, options.text, max_tokens=options.max_tokens)
    blocks = batches(
        Blocks(store, options.text.seq_len, keep_last=True), options.batch_size, options.max_tokens
    )
    model = load_packed(artifact, getattr(torch, options.dtype))
    quality = measure(model, blocks, None, options.data)
    return (
        f"loss        {quality.loss:.4f} nats per token\n"
        f"perplexity  {quality.perplexity:.3f}\n"
        f"tokens      {quality.tokens:,} targets in blocks of {options.text.seq_len}, "
        f"{options.dtype}"
    )
