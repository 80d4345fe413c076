"""Quality of a model on held-out text, beside the original model's.

All figures are sums over the same target tokens in the same order: the mean loss in nats, its
exponential, the mean KL divergence from the original's next-token distribution, and the share of
positions at which both put the same token first.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional
from tqdm import tqdm
from transformers import PreTrainedModel

from qat.loss import forward_logits
from qat.packing import Batch
from qat.slices import Slice, Slices

REFERENCE_BYTES = 1 << 30
"""Logits of the original are kept in memory up to this size, and computed anew above it."""


@dataclass(frozen=True)
class EvaluateConfig:
    """Evaluation after training."""

    max_tokens: int = 32768
    """Held-out tokens that the report's rows are measured on."""
    batch_size: int = 8
    """Text blocks of one forward pass."""

    def __post_init__(self) -> None:
        """Raise ValueError for counts below one."""
        for name in ("max_tokens", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: at least 1")


@dataclass(frozen=True)
class Quality:
    """What one model scored."""

    loss: float
    """Mean token loss, nats."""
    perplexity: float
    """exp(loss)."""
    kl_to_original: float | None
    """Mean KL(original || model) per token, nats; None without an original."""
    top1_agreement: float | None
    """Share of positions where both models put the same token first."""
    tokens: int
    """Target tokens measured."""
    slices: dict[Slice, float] = field(default_factory=dict)
    """Mean loss of each part of the targets, nats; empty where none were asked for."""


class Reference:
    """The original model's logits on the evaluation blocks."""

    def __init__(self, model: PreTrainedModel, batches: Sequence[Batch]) -> None:
        self.model = model
        values = (
            sum(batch["input_ids"].numel() for batch in batches)
            * model.config.get_text_config().vocab_size
        )
        self.cache: list[Tensor] | None = [] if values * 4 <= REFERENCE_BYTES else None

    def logits(self, index: int, batch: Batch) -> Tensor:
        """fp32 logits [B, S, V] of batch number ``index``; call in order the first time."""
        if self.cache is not None and index < len(self.cache):
            return self.cache[index]
        value = forward_logits(self.model, batch).float()
        if self.cache is not None:
            self.cache.append(value)
        return value


@torch.no_grad()
def measure(
    model: PreTrainedModel,
    batches: Sequence[Batch],
    reference: Reference | None,
    name: str,
    slices: Slices | None = None,
) -> Quality:
    """Measure ``model`` in eval mode on ``batches``; its own dtype, no autocast.

    Args:
        model: any causal LM, prepared or not.
        batches: see `qat.module` for the fields.
        reference: the original model, or None.
        name: shown by the progress bar.
        slices: the parts of the same batches whose losses are wanted too, or None.
    """
    model.eval()
    loss = kl = 0.0
    agree = tokens = 0
    parts: Tensor | None = None
    for index, batch in enumerate(tqdm(batches, desc=f"evaluate {name}", delay=2, leave=False)):
        logits = forward_logits(model, batch).float()
        chosen = batch["labels"] != -100
        tokens += int(chosen.sum())
        logits = logits[chosen]
        each = functional.cross_entropy(logits, batch["labels"][chosen], reduction="none")
        loss += float(each.double().sum())
        if slices is not None:
            parts = slices.add(parts, each, batch)
        if reference is not None:
            original = reference.logits(index, batch)[chosen]
            agree += int((logits.argmax(-1) == original.argmax(-1)).sum())
            kl += float(
                functional.kl_div(
                    logits.log_softmax(-1),
                    original.log_softmax(-1),
                    reduction="sum",
                    log_target=True,
                )
            )
    if not tokens:
        raise ValueError("the evaluation text has no target token")
    mean = loss / tokens
    return Quality(
        loss=mean,
        perplexity=math.exp(min(mean, 700.0)),
        kl_to_original=kl / tokens if reference else None,
        top1_agreement=agree / tokens if reference else None,
        tokens=tokens,
        slices={} if slices is None or parts is None else slices.losses(parts),
    )
