"""Padding is skipped: attention and greedy answers have the bits of a sequence alone."""

from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import MistralConfig
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from qat.packed_layers import Int8Linear, KeptLinear, PackedLinear
from qat.row_attention import NAME, attend
from qat.runtime import load_packed
from qat_kernels import QuantSpec
from tests.qat.test_runtime import LLAMA_SIZES, int8_input, llama, write_artifact

INT8 = QuantSpec(bits=8, granularity="channel", grid="absmax")


class Heads(nn.Module):
    """What an attention function reads of its module: four query heads, two of keys."""

    num_key_value_groups = 2
    is_causal = True


def tensors(batch: int, queries: int, keys: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(queries + keys)
    shapes = ((batch, 4, queries, 16), (batch, 2, keys, 16), (batch, 2, keys, 16))
    q, k, v = (torch.randn(s, generator=generator).to(torch.bfloat16) for s in shapes)
    return q, k, v


@pytest.mark.parametrize("queries", [1, 12])
def test_a_padded_sequence_is_computed_alone(queries: int) -> None:
    q, k, v = tensors(3, queries, 12)
    pads = (0, 3, 7)
    causal = torch.ones(queries, 12, dtype=torch.bool).tril(12 - queries)
    mask = torch.stack([causal & (torch.arange(12) >= pad) for pad in pads])[:, None]
    output = attend(Heads(), q, k, v, mask, scaling=0.25)[0]
    for i, pad in enumerate(pads):
        real = slice(pad if queries > 1 else 0, None)
        one = slice(i, i + 1)
        cut = (q[one, :, real], k[one, :, pad:], v[one, :, pad:])
        alone = sdpa_attention_forward(Heads(), *cut, None, scaling=0.25)[0]
        assert torch.equal(output[one, real], alone)
        if queries > 1:
            assert not bool(output[i, :pad].any())


def test_windows_keep_their_mask_and_empty_rows_are_zero() -> None:
    q, k, v = tensors(2, 8, 8)
    window = torch.ones(8, 8, dtype=torch.bool).tril().triu(-2)
    mask = torch.stack((window, torch.zeros_like(window)))[:, None]
    output = attend(Heads(), q, k, v, mask)[0]
    expected = sdpa_attention_forward(Heads(), q[:1], k[:1], v[:1], window[None, None])[0]
    assert torch.equal(output[:1], expected)
    assert not bool(output[1].any())


def test_without_padding_it_is_sdpa() -> None:
    q, k, v = tensors(2, 8, 8)
    expected = sdpa_attention_forward(Heads(), q, k, v, None)[0]
    assert torch.equal(attend(Heads(), q, k, v, None)[0], expected)


def greedy(model: torch.nn.Module, prompts: list[torch.Tensor], new: int) -> torch.Tensor:
    length = max(map(len, prompts))
    ids = torch.zeros(len(prompts), length, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for i, prompt in enumerate(prompts):
        ids[i, length - len(prompt) :], mask[i, length - len(prompt) :] = prompt, 1
    options = {"max_new_tokens": new, "min_new_tokens": new, "pad_token_id": 0}
    out = model.generate(input_ids=ids, attention_mask=mask, do_sample=False, **options)
    return out[:, length:]


def prompts(equal: bool) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    lengths = [17] * 16 if equal else range(2, 34, 2)
    return [torch.randint(1, 96, (n,), generator=generator) for n in lengths]


@pytest.mark.parametrize("equal", [True, False], ids=["equal", "padded"])
@pytest.mark.parametrize("kind", ["int4", "int8", "mistral"])
def test_greedy_answers_do_not_depend_on_the_batch(tmp_path: Path, kind: str, equal: bool) -> None:
    if kind == "int8":
        write_artifact(tmp_path / "a", llama(), INT8, int8_input(True))
    elif kind == "mistral":
        write_artifact(tmp_path / "a", MistralConfig(**LLAMA_SIZES, sliding_window=8))
    else:
        write_artifact(tmp_path / "a", llama())
    model = load_packed(tmp_path / "a")
    assert model.config._attn_implementation == NAME
    expected = Int8Linear if kind == "int8" else PackedLinear
    assert sum(isinstance(m, expected) for m in model.modules()) == 14
    assert isinstance(model.lm_head, KeptLinear)
    together = greedy(model, prompts(equal), 24)
    alone = torch.cat([greedy(model, [p], 24) for p in prompts(equal)])
    assert torch.equal(together, alone)
    # the answers differ among themselves, so that the comparison sees something
    assert len({tuple(row.tolist()) for row in alone}) > 8


def test_fp32_stays_plain_transformers(tmp_path: Path) -> None:
    write_artifact(tmp_path / "a", llama())
    model = load_packed(tmp_path / "a", torch.float32)
    assert model.config._attn_implementation == "sdpa"
    assert not any(isinstance(m, KeptLinear) for m in model.modules())
