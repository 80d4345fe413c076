import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, BloomConfig, FalconConfig, MambaConfig, Qwen3Config

from qat.errors import UserError
from qat.packing import Blocks, attention_mask, batches, check_packing
from qat.tokens import TokenStore
from tests.tiny import BASE, CONFIGS, VOCAB, tiny

LENGTHS = (30, 20, 1, 13)  # two of them above the tiny models' sliding window of 16
SIZE = sum(LENGTHS)

# Per logit: sums over at most 96 channels and SIZE positions, in 2 layers and the head, each
# rounding to eps relative to the largest magnitude in play, which the largest logit stands for.
BOUND = 3 * (96 + SIZE) * torch.finfo(torch.float32).eps


def store_of(lengths) -> TokenStore:
    total = sum(lengths)
    tokens = np.random.default_rng(0).integers(3, VOCAB, total).astype(np.uint16)
    return TokenStore(tokens, np.cumsum([0, *lengths]))


@torch.no_grad()
def packed_and_separate(model):
    block = batches(Blocks(store_of(LENGTHS), SIZE), 1)[0]
    ids, places = block["input_ids"], block["position_ids"]
    mask = attention_mask(block["segment_ids"], model.config, model.dtype)
    packed = model(input_ids=ids, attention_mask=mask, position_ids=places, use_cache=False).logits
    separate = torch.cat(
        [model(input_ids=part, use_cache=False).logits for part in ids.split(LENGTHS, dim=1)], dim=1
    )
    careless = model(input_ids=ids, position_ids=places).logits
    return packed, separate, careless


@pytest.mark.parametrize("family", sorted(CONFIGS))
def test_packed_logits_are_the_separate_ones(family):
    packed, separate, _ = packed_and_separate(tiny(family))
    assert (packed - separate).abs().max() <= BOUND * separate.abs().max()


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma2", "opt", "falcon", "gpt2"])
def test_position_ids_alone_leak(family):
    _, separate, careless = packed_and_separate(tiny(family))
    first = LENGTHS[0]
    difference = (careless - separate)[:, first:].abs().max()
    assert difference > 100 * BOUND * separate.abs().max()


@pytest.mark.parametrize("family", ["mistral", "gemma2", "gemma3"])
def test_the_window_matters(family):
    model = tiny(family)
    wide = type(model.config)(**{**model.config.to_dict(), "sliding_window": 64})
    segments = torch.zeros(1, 40, dtype=torch.int32)
    narrow = attention_mask(segments, model.config, torch.float32)
    mixed = len(set(getattr(model.config, "layer_types", None) or [])) > 1
    assert isinstance(narrow, dict) == mixed
    sliding = narrow["sliding_attention"] if mixed else narrow
    assert (sliding[0, 0] == 0).sum(1).max() == 16
    assert (attention_mask(segments, wide, torch.float32)[0, 0] == 0).sum(1).max() == 40


def test_qwen_with_sliding_layers():
    torch.manual_seed(0)
    config = Qwen3Config(
        **BASE, head_dim=16, use_sliding_window=True, sliding_window=16, max_window_layers=1
    )
    assert set(config.layer_types) == {"full_attention", "sliding_attention"}
    packed, separate, _ = packed_and_separate(AutoModelForCausalLM.from_config(config).eval())
    assert (packed - separate).abs().max() <= BOUND * separate.abs().max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_mask_values(dtype):
    mask = attention_mask(torch.tensor([[0, 0, 1, 1]]), CONFIGS["llama"], dtype)
    low = torch.finfo(dtype).min
    expected = [[0, low, low, low], [0, 0, low, low], [low, low, 0, low], [low, low, 0, 0]]
    assert mask.dtype == dtype
    assert mask.tolist() == [[expected]]


@pytest.mark.parametrize("family", sorted(CONFIGS))
def test_check_packing_accepts(family):
    check_packing(tiny(family), 64)


def test_check_packing_names_too_many_positions():
    with pytest.raises(UserError, match=r"text\.seq_len=129: the model has 128 positions"):
        check_packing(tiny("gpt2"), 129)


@pytest.mark.parametrize(
    "config",
    [
        BloomConfig(hidden_size=32, n_layer=1, n_head=2, vocab_size=VOCAB),
        FalconConfig(hidden_size=32, num_attention_heads=2, alibi=True),
        MambaConfig(hidden_size=32, num_hidden_layers=1),
        Qwen3Config(**BASE, layer_types=["full_attention", "linear_attention"]),
    ],
    ids=lambda c: c.model_type,
)
def test_refused_architectures(config):
    with pytest.raises(UserError, match="see each other"):
        attention_mask(torch.zeros(1, 4, dtype=torch.int32), config, torch.float32)


def test_check_packing_finds_an_unknown_leak():
    model = tiny("llama")
    attend = model.model.layers[1].self_attn
    forward = attend.forward
    attend.forward = lambda *args, **kwargs: forward(*args, **{**kwargs, "attention_mask": None})
    with pytest.raises(UserError, match="ignore the attention mask"):
        check_packing(model, 64)


def by_hand(store, size, keep_last):
    """The definition, token by token."""
    document = np.repeat(np.arange(store.documents), np.diff(store.offsets))
    total = len(store.tokens)
    for begin in range(0, total, size):
        rows = range(begin, min(begin + size, total))
        if len(rows) < size and not keep_last:
            return
        labels = [
            int(store.tokens[t + 1]) if t + 1 < total and document[t + 1] == document[t] else -100
            for t in rows
        ]
        places = [t - max(begin, int(store.offsets[document[t]])) for t in rows]
        segments = [int(document[t] - document[begin]) for t in rows]
        padding = size - len(rows)
        yield (
            [int(store.tokens[t]) for t in rows] + [0] * padding,
            labels + [-100] * padding,
            places + list(range(padding)),
            segments + [segments[-1] + 1] * padding,
        )


@pytest.mark.parametrize("lengths", [LENGTHS, (1,) * 9, (40,), (4, 4, 4), (8, 3, 5, 1)])
@pytest.mark.parametrize("size", [2, 4, 7, 64])
@pytest.mark.parametrize("keep_last", [True, False])
def test_blocks(lengths, size, keep_last):
    store = store_of(lengths)
    blocks = Blocks(store, size, keep_last)
    expected = list(by_hand(store, size, keep_last))
    assert len(blocks) == len(expected)
    for index, fields in enumerate(expected):
        block = blocks[index]
        for name, values in zip(("input_ids", "labels", "position_ids", "segment_ids"), fields):
            assert block[name].tolist() == values, (index, name)
            assert block[name].dtype == (torch.int32 if name == "segment_ids" else torch.int64)
    counts = [sum(label != -100 for label in fields[1]) for fields in expected]
    assert blocks.loss_tokens().tolist() == counts
    with pytest.raises(IndexError):
        blocks[len(blocks)]


def test_batches():
    blocks = Blocks(store_of((30, 25)), 8, keep_last=True)
    sizes = [b["input_ids"].shape[0] for b in batches(blocks, 3)]
    assert sizes == [3, 3, 1]
    assert len(batches(blocks, 1, max_tokens=17)) == 3
    total = sum(int(b["loss_tokens"]) for b in batches(blocks, 3))
    assert total == 55 - 2
