"""Loss by slice of the held-out text: where a model is better or worse than another.

Two ways to cut the targets, each into parts that are disjoint and cover all of them:

- ``context``: how many tokens of its document (within its block) the model sees when it predicts
  the target, in quarters of the most that any target has;
- ``frequency``: how common the target token is among all targets of the evaluation: ``frequent``
  tokens are the most common ones that make up half of the text, ``medium`` the next 40 %, ``rare``
  the remaining tenth.

The losses come from the same forward passes as the total, of which they are exact parts.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from qat.packing import IGNORE, Batch

SHARES = {"frequent": 0.5, "medium": 0.9, "rare": 1.0}
"""Class of tokens → share of the text that it ends at, from the most common token on."""


@dataclass(frozen=True)
class Slice:
    """One part of the targets."""

    by: str
    """The way of cutting: context or frequency."""
    name: str
    """Which part."""
    tokens: int
    """Targets in it."""


class Slices:
    """The parts of the targets of some batches; empty parts are left out."""

    def __init__(self, batches: Sequence[Batch]) -> None:
        chosen = [batch["labels"][batch["labels"] != IGNORE] for batch in batches]
        self._classes = _classes(torch.cat(chosen))
        places = [batch["position_ids"][batch["labels"] != IGNORE] for batch in batches]
        self._longest = int(torch.cat(places).max()) + 1
        edges = [-(-self._longest * quarter // 4) for quarter in range(5)]
        names = [
            ("context", f"{begin + 1} to {end} tokens of context") for begin, end in pairwise(edges)
        ]
        names += [("frequency", f"{name} tokens") for name in SHARES]
        counts = torch.zeros(len(names), dtype=torch.float64)
        for batch, labels in zip(batches, chosen):
            counts += self._sums(torch.ones(len(labels)), batch)
        self.parts = [Slice(by, name, int(n)) for (by, name), n in zip(names, counts)]
        """All parts, empty ones included, in the order of `add`."""

    def _sums(self, values: Tensor, batch: Batch) -> Tensor:
        """float64 [number of parts]: sums of values [T] of a batch's targets by part."""
        chosen = batch["labels"] != IGNORE
        quarter = batch["position_ids"][chosen] * 4 // self._longest
        kind = self._classes[batch["labels"][chosen]]
        sums = [
            torch.zeros(count, dtype=torch.float64).index_add_(0, index, values.double())
            for count, index in ((4, quarter), (len(SHARES), kind))
        ]
        return torch.cat(sums)

    def add(self, total: Tensor | None, values: Tensor, batch: Batch) -> Tensor:
        """Add the losses [T] of a batch's targets to running sums; None begins them."""
        sums = self._sums(values.cpu(), batch)
        return sums if total is None else total + sums

    def losses(self, sums: Tensor) -> dict[Slice, float]:
        """Mean loss of each part that has targets."""
        return {
            part: float(value) / part.tokens for part, value in zip(self.parts, sums) if part.tokens
        }


def _classes(labels: Tensor) -> Tensor:
    """int64 [largest label + 1]: the class of each token, a number into `SHARES`.

    A token belongs to the first class whose share is not reached by the more common tokens before
    it; equally common ones are in the order of their ids.
    """
    counts = torch.bincount(labels)
    order = torch.argsort(counts, descending=True, stable=True)
    # in float64, exact: a share of the text that lies before each token
    ordered = counts[order]
    before = (ordered.cumsum(0) - ordered).double() / len(labels)
    edges = torch.tensor(list(SHARES.values())[:-1], dtype=torch.float64)
    classes = torch.empty_like(order)
    classes[order] = torch.bucketize(before, edges, right=True)
    return classes


@dataclass(frozen=True)
class SliceRow:
    """The losses of several models on one part of the text."""

    by: str
    """The way of cutting: context or frequency."""
    slice: str
    """Which part."""
    tokens: int
    """Targets in it."""
    loss: dict[str, float]
    """Model → mean loss, nats."""
    change: float | None
    """Loss of the shipped model less that of ``original``; None where one was not measured."""
    low_bits: float | None
    """Loss of the shipped model less that of ``against``."""
    against: str | None
    """The model that was trained alike, without the low bits of the shipped one."""


def compare_slices(
    losses: Mapping[str, Mapping[Slice, float]], shipped: str | None, against: str | None = None
) -> list[SliceRow]:
    """One row for each part, worst change first; before all, what is unknown or not a number.

    Args:
        losses: model → part → mean loss.
        shipped: the model whose change against ``original`` is meant.
        against: the model that shows what low bits cost, where there is one.
    """
    found = []
    for part in dict.fromkeys(part for values in losses.values() for part in values):
        loss = {name: values[part] for name, values in losses.items() if part in values}
        change, low_bits = (
            loss[shipped] - loss[other] if shipped in loss and other in loss else None
            for other in ("original", against)
        )
        row = SliceRow(part.by, part.name, part.tokens, loss, change, low_bits, against)
        found.append(row)

    def worst_first(row: SliceRow) -> float:
        known = row.change is not None and math.isfinite(row.change)
        return -row.change if known and row.change is not None else -math.inf

    return sorted(found, key=worst_first)
