import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from data.sampler import StepBatchSampler
from qat import bestfit
from qat.bestfit import PackedBlocks, best_fit
from qat.packing import IGNORE, attention_mask, batches, collate
from qat.tokens import TokenStore
from tests.tiny import CONFIGS, VOCAB, tiny

LENGTHS = st.lists(st.integers(1, 40), min_size=1, max_size=60)


def store_of(lengths, seed=0, targets=True):
    rng = np.random.default_rng(seed)
    total = int(sum(lengths))
    flags = rng.integers(0, 2, total).astype(np.uint8) if targets else None
    tokens = rng.integers(3, VOCAB, total).astype(np.uint16)
    return TokenStore(tokens, np.cumsum([0, *lengths]), flags)


def first_come(lengths, size):
    """Number of blocks when each item goes into the last block or opens a new one."""
    count, space = 0, 0
    for length in lengths:
        if length > space:
            count, space = count + 1, size
        space -= length
    return count


def by_hand(lengths, size):
    """Best fit by looking at every block."""
    spaces, blocks = [], [0] * len(lengths)
    for item in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        fitting = [b for b, space in enumerate(spaces) if space >= lengths[item]]
        if not fitting:
            spaces.append(size)
            fitting = [len(spaces) - 1]
        best = min(fitting, key=lambda b: spaces[b])
        spaces[best] -= lengths[item]
        blocks[item] = best
    return sorted(spaces)


@settings(max_examples=200, deadline=None)
@given(LENGTHS, st.integers(40, 130))
def test_best_fit(lengths, size):
    array = np.array(lengths, dtype=np.int64)
    blocks = best_fit(array, size)
    used = np.bincount(blocks, weights=array)
    assert used.max() <= size
    assert used.min() > 0
    # which of two blocks with equal space is taken makes no difference to the spaces
    assert sorted(size - used) == by_hand(lengths, size)
    assert len(used) <= first_come(lengths, size)
    first = [int(np.flatnonzero(blocks == b)[0]) for b in range(len(used))]
    assert first == sorted(first)
    assert np.array_equal(blocks, best_fit(array, size))


@pytest.mark.parametrize("size", [64, 512])
def test_less_padding_than_first_come(size):
    rng = np.random.default_rng(1)
    lengths = np.minimum(size, rng.lognormal(np.log(size / 4), 0.8, 2000).astype(np.int64) + 1)
    blocks = int(best_fit(lengths, size).max()) + 1
    assert lengths.sum() / (blocks * size) > 0.98
    assert lengths.sum() / (first_come(lengths.tolist(), size) * size) < 0.9


def conversations(block):
    """Tokens and labels of each segment, by segment number; the last one may be padding."""
    segments = block["segment_ids"]
    for number in range(int(segments.max()) + 1):
        chosen = segments == number
        assert block["position_ids"][chosen].tolist() == list(range(int(chosen.sum())))
        yield tuple(block["input_ids"][chosen].tolist()), tuple(block["labels"][chosen].tolist())


def expected_of(store, size):
    for begin, end in zip(store.offsets[:-1], store.offsets[1:]):
        end = min(end, begin + size)
        labels = [
            int(store.tokens[t]) if store.targets is None or store.targets[t] else IGNORE
            for t in range(begin + 1, end)
        ]
        if any(label != IGNORE for label in labels):
            yield tuple(store.tokens[begin:end].tolist()), (*labels, IGNORE)


@settings(max_examples=100, deadline=None)
@given(LENGTHS, st.integers(8, 60), st.booleans())
def test_every_conversation_once(lengths, size, targets):
    store = store_of(lengths, targets=targets)
    blocks = PackedBlocks(store, size)
    expected = sorted(expected_of(store, size))
    found = []
    for index in range(len(blocks)):
        block = blocks[index]
        for name, values in block.items():
            assert values.shape == (size,)
            assert values.dtype == (torch.int32 if name == "segment_ids" else torch.int64)
        parts = list(conversations(block))
        used = sum(len(ids) for ids, _ in parts if (ids, _) in expected)
        if used < size:
            padding = parts.pop()
            assert set(padding[0]) == {0}
            assert set(padding[1]) == {IGNORE}
        found += parts
    assert sorted(found) == expected
    assert blocks.conversations == len(expected)
    assert blocks.dropped == len(lengths) - len(expected)
    cut = sum(len(ids) == size for ids, _ in expected) - sum(
        length == size and (store_tokens in {ids for ids, _ in expected})
        for length, store_tokens in whole(store)
    )
    assert blocks.cut == cut
    counts = [int((blocks[i]["labels"] != IGNORE).sum()) for i in range(len(blocks))]
    assert blocks.loss_tokens().tolist() == counts
    tokens = sum(len(ids) for ids, _ in expected)
    assert blocks.efficiency == (tokens / (len(blocks) * size) if len(blocks) else 0)
    with pytest.raises(IndexError):
        blocks[len(blocks)]


def whole(store):
    for begin, end in zip(store.offsets[:-1], store.offsets[1:]):
        yield end - begin, tuple(store.tokens[begin:end].tolist())


def test_counting_by_parts(monkeypatch):
    store = store_of(np.random.default_rng(2).integers(1, 30, 100))
    once = PackedBlocks(store, 16)
    monkeypatch.setattr(bestfit, "_PART", 7)
    parts = PackedBlocks(store, 16)
    assert np.array_equal(once.loss_tokens(), parts.loss_tokens())
    assert (once.cut, once.dropped) == (parts.cut, parts.dropped)


def test_resumed_batches_are_the_same():
    blocks = PackedBlocks(store_of(np.random.default_rng(3).integers(2, 40, 90)), 48)

    def seen(start, steps):
        sampler = iter(
            StepBatchSampler(len(blocks), blocks.loss_tokens(), 4, 2, seed=5, start_step=start)
        )
        for _ in range(2 * steps):
            items = next(sampler)
            yield collate([blocks[index] for index, _ in items], items[0][1])

    whole_run, resumed = list(seen(0, 30)), list(seen(11, 19))
    for expected, batch in zip(whole_run[22:], resumed, strict=True):
        assert all(torch.equal(expected[name], batch[name]) for name in expected)
    for first, second in zip(whole_run[::2], whole_run[1::2]):
        targets = sum(int((half["labels"] != IGNORE).sum()) for half in (first, second))
        assert int(first["loss_tokens"]) == int(second["loss_tokens"]) == targets


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2", "mistral", "opt", "mixtral"])
def test_packed_logits_are_those_of_each_conversation_alone(family):
    model = tiny(family)
    store = store_of([30, 20, 1, 13, 9, 26], targets=False)
    blocks = PackedBlocks(store, 64)
    alone = {}
    for begin, end in zip(store.offsets[:-1], store.offsets[1:]):
        ids = torch.from_numpy(store.tokens[begin:end].astype(np.int64))[None]
        alone[tuple(ids[0].tolist())] = model(input_ids=ids, use_cache=False).logits[0]
    compared = 0
    for batch in batches(blocks, 2):
        mask = attention_mask(batch["segment_ids"], CONFIGS[family], model.dtype)
        logits = model(
            input_ids=batch["input_ids"],
            attention_mask=mask,
            position_ids=batch["position_ids"],
            use_cache=False,
        ).logits
        for row, segments, ids in zip(logits, batch["segment_ids"], batch["input_ids"]):
            for number in range(int(segments.max()) + 1):
                chosen = segments == number
                expected = alone.get(tuple(ids[chosen].tolist()))
                if expected is None:  # the padding
                    continue
                # as in test_packing: sums over 96 channels and 64 positions, in 2 layers and head
                bound = 3 * (96 + 64) * torch.finfo(torch.float32).eps * expected.abs().max()
                assert (row[chosen] - expected).abs().max() <= bound
                compared += 1
    # the conversation of a single token has no target and is left out
    assert compared == blocks.conversations == 5
