"""Slices of the held-out text: disjoint, complete, and exact parts of the loss."""

import math

import pytest
import torch
from torch.nn import functional

from qat.evaluate import measure
from qat.loss import forward_logits
from qat.packing import IGNORE
from qat.slices import Slice, Slices, compare_slices
from tests.tiny import random_batch, tiny


@pytest.fixture(scope="module")
def batches():
    """Two batches of documents of 16 and 8 tokens in blocks of 24; some without a target."""
    made = [random_batch(3, 24), random_batch(2, 24, seed=1)]
    for batch in made:
        blocks = len(batch["labels"])
        batch["labels"] = batch["labels"].clone() % 13  # so that tokens repeat
        batch["labels"][:, 5::7] = IGNORE
        places = torch.cat([torch.arange(16), torch.arange(8)])
        batch["position_ids"] = places.expand(blocks, -1).contiguous()
        batch["segment_ids"] = (torch.arange(24) >= 16).int().expand(blocks, -1).contiguous()
    return made


def test_parts_add_up_to_the_whole(batches):
    model = tiny("llama")
    slices = Slices(batches)
    quality = measure(model, batches, None, "test", slices)
    assert measure(model, batches, None, "test").loss == quality.loss
    for by in ("context", "frequency"):
        parts = {part: loss for part, loss in quality.slices.items() if part.by == by}
        assert sum(part.tokens for part in parts) == quality.tokens
        total = sum(part.tokens * loss for part, loss in parts.items())
        # float64 sums of the same fp32 losses in another order
        assert total == pytest.approx(quality.tokens * quality.loss, rel=1e-14)


def test_each_part_against_direct_computation(batches):
    model = tiny("llama")
    quality = measure(model, batches, None, "test", Slices(batches))
    losses, positions, labels = [], [], []
    with torch.no_grad():
        for batch in batches:
            chosen = batch["labels"] != IGNORE
            logits = forward_logits(model, batch).float()[chosen]
            each = functional.cross_entropy(logits, batch["labels"][chosen], reduction="none")
            losses += each.double().tolist()
            positions += batch["position_ids"][chosen].tolist()
            labels += batch["labels"][chosen].tolist()
    for quarter in range(4):
        # targets have up to 16 tokens of context, whatever the length of the block
        low, high = 4 * quarter, 4 * quarter + 3
        wanted = [x for x, place in zip(losses, positions) if low <= place <= high]
        part = Slice("context", f"{low + 1} to {high + 1} tokens of context", len(wanted))
        assert quality.slices[part] == pytest.approx(sum(wanted) / len(wanted), rel=1e-14)
    counts = {token: labels.count(token) for token in set(labels)}
    order = sorted(counts, key=lambda token: (-counts[token], token))
    before, kinds = 0, {}
    for token in order:
        share = before / len(labels)
        kinds[token] = "frequent" if share < 0.5 else "medium" if share < 0.9 else "rare"
        before += counts[token]
    assert set(kinds.values()) == {"frequent", "medium", "rare"}
    for kind in ("frequent", "medium", "rare"):
        wanted = [x for x, token in zip(losses, labels) if kinds[token] == kind]
        part = Slice("frequency", f"{kind} tokens", len(wanted))
        assert quality.slices[part] == pytest.approx(sum(wanted) / len(wanted), rel=1e-14)


def test_a_length_that_four_does_not_divide():
    batch = random_batch(2, 10)
    batch["labels"] = torch.ones(2, 10, dtype=torch.int64)
    batch["position_ids"] = torch.arange(10).expand(2, -1).contiguous()
    parts = [part for part in Slices([batch]).parts if part.by == "context"]
    assert [part.name for part in parts] == [
        "1 to 3 tokens of context",
        "4 to 5 tokens of context",
        "6 to 8 tokens of context",
        "9 to 10 tokens of context",
    ]
    kept = batch["labels"] != IGNORE
    spans = [(0, 3), (3, 5), (5, 8), (8, 10)]
    assert [part.tokens for part in parts] == [int(kept[:, a:b].sum()) for a, b in spans]


def test_one_token_only():
    batch = random_batch(1, 8)
    batch["position_ids"] = torch.arange(8)[None]
    batch["labels"] = torch.full((1, 8), 3)
    counts = {part.name: part.tokens for part in Slices([batch]).parts if part.by == "frequency"}
    assert counts == {"frequent tokens": 8, "medium tokens": 0, "rare tokens": 0}


def test_the_worst_comes_first():
    a, b, c = (Slice("context", name, 10) for name in "abc")
    losses = {
        "original": {a: 1.0, b: 2.0, c: 3.0},
        "finetuned": {a: 1.25, b: 1.5, c: 3.0},
        "artifact": {a: 1.5, b: 1.75, c: 3.125},
    }
    rows = compare_slices(losses, "artifact", "finetuned")
    found = [(row.slice, row.change, row.low_bits) for row in rows]
    assert found == [("a", 0.5, 0.25), ("c", 0.125, 0.125), ("b", -0.25, 0.25)]
    losses["artifact"][b] = math.nan
    assert [row.slice for row in compare_slices(losses, "artifact")] == ["b", "a", "c"]
    del losses["original"], losses["finetuned"]
    rows = compare_slices(losses, "artifact")
    assert [(row.change, row.low_bits) for row in rows] == [(None, None)] * 3
    assert compare_slices({}, None) == []
    single = {"original": {}, "artifact": {a: 1.0}}
    assert [row.change for row in compare_slices(single, "artifact")] == [None]
