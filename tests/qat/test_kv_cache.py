"""The quantized KV cache in transformers: exact numbers, every step alike, memory, refusals."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional
from transformers import AutoModelForCausalLM, DynamicCache, LlamaConfig, PreTrainedModel, T5Config

from data.corpus import documents
from data.demo import MODEL_DIRECTORY
from qat.errors import UserError
from qat.generate import GenerateOptions, generate
from qat.kv_cache import (
    ATTENTION,
    GROWTH,
    PLAIN,
    QuantizedKVCache,
    attend_to_codes,
    make_cache,
)
from qat.models import load_model, load_tokenizer
from qat_kernels.kv_cache import BITS, bytes_per_token, dequantize, quantize
from tests.qat.test_generate import tokenizer
from tests.qat.test_runtime import llama, write_artifact
from tests.tiny import CONFIGS

IDS = torch.randint(3, 256, (2, 13), generator=torch.Generator().manual_seed(0))
PADDED = torch.ones_like(IDS).index_put((torch.tensor([0]), torch.arange(4)), torch.tensor(0))
COVERED = [name for name in CONFIGS if name not in ("mistral", "gemma2", "gemma3")]


class FakeQuantCache(DynamicCache):
    """The definition: transformers' own cache, with keys and values rounded when they enter."""

    def __init__(self, config: Any, bits: int) -> None:
        super().__init__(config=config)
        self.bits = bits

    def update(self, k: Tensor, v: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        k, v = (dequantize(*quantize(x, self.bits), x.dtype) for x in (k, v))
        return super().update(k, v, *args, **kwargs)


def model_of(name: str, dtype: torch.dtype = torch.float32, **changes: Any) -> PreTrainedModel:
    torch.manual_seed(0)
    config = type(CONFIGS[name])(**{**CONFIGS[name].to_dict(), **changes})
    model = AutoModelForCausalLM.from_config(config).to(dtype).eval()
    if dtype == torch.float64 and name in ("mixtral", "qwen3_moe"):
        # the fused one takes no fp64
        model.set_experts_implementation("eager")
    return model


@torch.no_grad()
def steps(model: PreTrainedModel, cache: Any, prompt: int) -> Tensor:
    """Logits [B, T, V] of a prompt of ``prompt`` tokens and then of one token at a time."""
    parts = [IDS[:, :prompt], *(IDS[:, i : i + 1] for i in range(prompt, IDS.shape[1]))]
    seen, logits = 0, []
    for part in parts:
        seen += part.shape[1]
        out = model(part, attention_mask=PADDED[:, :seen], past_key_values=cache, use_cache=True)
        logits.append(out.logits)
    return torch.cat(logits, 1)


# ---------------------------------------------------------------------- numbers


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", COVERED)
def test_every_logit_is_that_of_rounded_keys_and_values(
    name: str, dtype: torch.dtype, bits: int
) -> None:
    model = model_of(name, dtype)
    expected = steps(model, FakeQuantCache(model.config, bits), 5)
    got = steps(model, QuantizedKVCache(model.config, bits), 5)
    torch.testing.assert_close(got, expected, atol=0, rtol=0)
    assert not torch.equal(got, steps(model, DynamicCache(config=model.config), 5))


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("name", ["llama", "qwen3", "gpt_neox"])
def test_token_by_token_equals_one_long_prompt(name: str, bits: int) -> None:
    """A prompt attends to the rounded values, too, so nothing depends on how it is cut.

    In fp64: other shapes sum in another order, which moves keys by some 1e-15, and codes come from
    their fp32 roundings, so they are equal. What is left in the logits are roundings of 2^-53 of
    below 10,000 terms of size below 10 (measured: 3e-16).
    """
    model = model_of(name, torch.float64)
    whole = QuantizedKVCache(model.config, bits, capacity=IDS.shape[1])
    once = steps(model, whole, IDS.shape[1])
    seen = PADDED.bool()
    for prompt in (1, 6):
        cache = QuantizedKVCache(model.config, bits, capacity=IDS.shape[1])
        got = steps(model, cache, prompt)
        torch.testing.assert_close(got[seen], once[seen], atol=1e5 * 2.0**-53, rtol=0)
        for layer, expected in zip(cache.layers, whole.layers):
            for one, other in zip(layer.buffers.tensors, expected.buffers.tensors):
                # padding has no defined answer, so neither have its keys behind the first layer
                one, other = (x.transpose(1, 2)[seen] for x in (one, other))
                torch.testing.assert_close(one, other, atol=0, rtol=0)


@pytest.mark.parametrize("name", [n for n in COVERED if CONFIGS[n].model_type in PLAIN])
def test_attending_to_codes_gives_the_same_logits(name: str) -> None:
    """The path of CUDA, through the reference: equal but for the order of fp32 sums.

    In fp64, where only the attention itself (fp32: 13 tokens of 16 values) rounds, by 2^-24 of
    values below 10 in each of two layers.
    """
    model = model_of(name, torch.float64)
    expected = steps(model, QuantizedKVCache(model.config, 8), 5)
    assert attend_to_codes(model)
    cache = QuantizedKVCache(model.config, 8, fused=True)
    got = steps(model, cache, 5)
    difference = (got - expected).abs().max()
    assert 0 < difference < 2 * 10 * 100 * 2.0**-24
    # other caches, and this one where it may not, compute what sdpa computes
    for fused in (False, None):
        other = QuantizedKVCache(model.config, 8, fused=fused)
        torch.testing.assert_close(steps(model, other, 5), expected, atol=0, rtol=0)


def test_attending_to_codes_reads_masks() -> None:
    """Left padding becomes a span; a mask with holes is dequantized and masked."""
    model = model_of("llama", torch.float64)
    holes = torch.ones(2, 13, dtype=torch.int64)
    holes[0, 4] = holes[1, 0] = 0

    def last(fused: bool, mask: Tensor | None, **step: Any) -> Tensor:
        cache = QuantizedKVCache(model.config, 8, fused=fused)
        with torch.no_grad():
            model(IDS[:, :12], past_key_values=cache)
            return model(IDS[:, 12:], attention_mask=mask, past_key_values=cache).logits

    everything = torch.ones(2, 1, 1, 13, dtype=torch.bool)
    additive = torch.zeros(2, 1, 1, 13, dtype=torch.float64)
    additive[:, :, :, 3] = -5.0
    for mask in (None, PADDED, holes, everything, additive):
        model.set_attn_implementation("sdpa")
        expected = last(False, mask)
        attend_to_codes(model)
        torch.testing.assert_close(last(True, mask), expected, atol=2000 * 2.0**-24, rtol=0)
        with torch.inference_mode():
            mask = None if mask is None else mask.clone()
            got = last(True, mask)
        torch.testing.assert_close(got, expected, atol=2000 * 2.0**-24, rtol=0)


def test_placeholders_are_never_mistaken_for_values() -> None:
    model = model_of("llama")
    attend_to_codes(model)
    cache = QuantizedKVCache(model.config, 8, fused=True)
    k = torch.ones(1, 2, 1, 16)
    cache.update(k, k, 0)
    handle, _ = cache.update(k, k, 0)
    assert tuple(handle.shape) == (1, 2, 2, 16)
    assert bool((handle * 1).isnan().all())


# ---------------------------------------------------------------------- the interface


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize(
    "options", [{}, {"num_beams": 3}, {"num_beams": 2, "num_return_sequences": 2}]
)
def test_generation_is_that_of_rounded_keys_and_values(
    options: dict[str, int], fused: bool
) -> None:
    model = model_of("llama")
    common = {
        "attention_mask": PADDED,
        "max_new_tokens": 8,
        "do_sample": False,
        "eos_token_id": None,
        **options,
    }
    expected = model.generate(IDS, past_key_values=FakeQuantCache(model.config, 8), **common)
    if fused:
        attend_to_codes(model)
    cache = QuantizedKVCache(model.config, 8, fused=fused)
    assert torch.equal(model.generate(IDS, past_key_values=cache, **common), expected)
    assert cache.get_seq_length() == 20


def test_assisted_generation_takes_tokens_back() -> None:
    model, assistant = model_of("llama"), model_of("llama_tied")
    options = {"max_new_tokens": 10, "do_sample": False, "eos_token_id": None}
    ids = IDS[:1]
    expected = model.generate(ids, past_key_values=QuantizedKVCache(model.config), **options)
    cache = QuantizedKVCache(model.config)
    got = model.generate(ids, past_key_values=cache, assistant_model=assistant, **options)
    assert torch.equal(got, expected)


@pytest.mark.parametrize("bits", BITS)
def test_reorder_repeat_select_crop_reset_move(bits: int) -> None:
    config = CONFIGS["llama"]
    k, v = torch.randn(2, 3, 2, 5, 16, generator=torch.Generator().manual_seed(1))

    def cache() -> QuantizedKVCache:
        made = QuantizedKVCache(config, bits)
        made.update(k, v, 0)
        return made

    def held(made: QuantizedKVCache) -> tuple[Tensor, Tensor]:
        return made.layers[0].read(torch.float32)

    whole = held(cache())
    order = torch.tensor([2, 0, 0])
    for change, index in (
        (lambda c: c.reorder_cache(order), order),
        (lambda c: c.batch_select_indices(torch.tensor([1])), torch.tensor([1])),
        (lambda c: c.batch_select_indices(torch.tensor([True, False, True])), torch.tensor([0, 2])),
        (lambda c: c.batch_repeat_interleave(2), torch.tensor([0, 0, 1, 1, 2, 2])),
        (lambda c: (c.layers[0].offload(), c.layers[0].prefetch()), torch.arange(3)),
    ):
        changed = cache()
        changed.layers.pop()  # the second layer holds nothing yet
        change(changed)
        assert changed.batch_size == len(index)
        expected = tuple(x[index] for x in whole)
        torch.testing.assert_close(held(changed), expected, atol=0, rtol=0)
    cropped = cache()
    cropped.crop(-2)
    assert (cropped.get_seq_length(), cropped.get_mask_sizes(1, 0)) == (3, (4, 0))
    torch.testing.assert_close(held(cropped), tuple(x[:, :, :3] for x in whole), atol=0, rtol=0)
    cropped.update(k[:, :, 3:], v[:, :, 3:], 0)
    torch.testing.assert_close(held(cropped), whole, atol=0, rtol=0)
    cropped.crop(4)
    cropped.crop(0)
    assert cropped.get_seq_length() == 4
    cropped.reset()
    assert (cropped.get_seq_length(), cropped.nbytes, cropped.is_initialized) == (0, 0, False)
    cropped.update(k[:1], v[:1], 0)
    assert cropped.layers[0].batch_size == 1
    assert cropped.get_max_length() == -1
    assert "length=5" in repr(cropped)


def test_early_initialization_and_growth() -> None:
    config = CONFIGS["llama"]
    cache = QuantizedKVCache(config, 8)
    cache.early_initialization(2, 2, 16, torch.float32, torch.device("cpu"))
    assert cache.is_initialized
    x = torch.randn(2, 2, GROWTH + 3, 16, generator=torch.Generator().manual_seed(2))
    for start in range(0, GROWTH + 3, 7):
        k, _ = cache.update(x[:, :, start : start + 7], x[:, :, start : start + 7], 1)
    assert cache.layers[1].buffers.capacity == 2 * GROWTH
    torch.testing.assert_close(k, dequantize(*quantize(x, 8)), atol=0, rtol=0)


# ---------------------------------------------------------------------- memory, quality


@pytest.mark.parametrize("bits", BITS)
def test_bytes_held_per_token_are_exact(bits: int) -> None:
    """Codes and one bf16 scale per vector, and nothing else, in every layer."""
    model = model_of("llama")
    cache = QuantizedKVCache(model.config, bits, capacity=IDS.shape[1])
    steps(model, cache, 5)
    layers, heads, d = 2, 2, 16
    per_token = layers * 2 * heads * (d * bits // 8 + 2)
    assert per_token == layers * bytes_per_token(heads, d, bits)
    assert cache.nbytes == IDS.numel() * per_token
    kept = [x for layer in cache.layers for x in vars(layer).values() if isinstance(x, Tensor)]
    assert kept == []


@torch.no_grad()
def test_loss_of_the_demo_model_with_each_cache() -> None:
    """On 8 x 512 held-out tokens of the demo corpus, in fp32, heads of 64 values.

    Measured: 3.7732 without, 3.7730 with int8, 3.7796 with int4.
    """
    model, words = load_model(str(MODEL_DIRECTORY)), load_tokenizer(str(MODEL_DIRECTORY))
    text = "\n\n".join(document for document, _ in zip(documents("validation"), range(40)))
    ids = torch.tensor(words(text).input_ids[: 8 * 512]).view(8, 512)
    losses = {}
    for name in ("none", "int8", "int4"):
        cache = make_cache(model, name, 512)
        logits = model(ids, **cache).logits[:, :-1]
        losses[name] = functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()).item()
    assert math.isfinite(losses["none"])
    assert abs(losses["int8"] - losses["none"]) < 0.001
    assert abs(losses["int4"] - losses["none"]) < 0.02


# ---------------------------------------------------------------------- input


@pytest.mark.parametrize("name", ["mistral", "gemma2", "gemma3"])
def test_sliding_windows_are_refused_by_name(name: str) -> None:
    config = CONFIGS[name]
    with pytest.raises(
        UserError, match=rf"kv_cache=int4: layer 0 of 2 of this {config.model_type}"
    ):
        QuantizedKVCache(config, 4)


def test_a_mistral_without_a_window_is_covered() -> None:
    model = model_of("mistral", sliding_window=None)
    expected = steps(model, FakeQuantCache(model.config, 8), 5)
    got = steps(model, QuantizedKVCache(model.config, 8), 5)
    torch.testing.assert_close(got, expected, atol=0, rtol=0)


def test_wrong_input() -> None:
    config = CONFIGS["llama"]
    with pytest.raises(UserError, match="bits=3"):
        QuantizedKVCache(config, 3)
    with pytest.raises(UserError, match="capacity=0"):
        QuantizedKVCache(config, 8, capacity=0)
    with pytest.raises(UserError, match="encoder-decoder"):
        QuantizedKVCache(T5Config(), 8)
    with pytest.raises(UserError, match=r"differ in shape.*kv_cache=none"):
        QuantizedKVCache(config, 8).update(torch.ones(1, 2, 3, 16), torch.ones(1, 2, 3, 8), 0)
    with pytest.raises(ValueError, match="even one"):
        QuantizedKVCache(config, 4).update(torch.ones(1, 2, 3, 15), torch.ones(1, 2, 3, 15), 0)
    cache = QuantizedKVCache(config, 8)
    cache.update(torch.ones(1, 2, 3, 16), torch.ones(1, 2, 3, 16), 0)
    with pytest.raises(ValueError, match="k: expected a float tensor"):
        cache.update(torch.ones(2, 2, 3, 16), torch.ones(2, 2, 3, 16), 0)
    with pytest.raises(UserError, match="kv_cache=int2: none, int8 or int4"):
        make_cache(model_of("llama"), "int2", 8)  # type: ignore[arg-type]


def test_models_of_other_attention_keep_their_own() -> None:
    model = model_of("falcon")
    assert not attend_to_codes(model)
    assert model.config._attn_implementation != ATTENTION


def test_linear_attention_is_refused() -> None:
    config = LlamaConfig(num_hidden_layers=2, hidden_size=64, num_attention_heads=4)
    config.layer_types = ["full_attention", "linear_attention"]
    with pytest.raises(UserError, match=r"layer 1 of 2 .* LinearAttentionLayer"):
        QuantizedKVCache(config, 8)


@pytest.mark.parametrize("kv_cache", ["int8", "int4"])
def test_generate_from_an_artifact(kv_cache: Any, tmp_path: Path) -> None:
    write_artifact(tmp_path / "a", llama())
    tokenizer().save_pretrained(tmp_path / "a")
    options = {"max_new_tokens": 8, "dtype": "float32"}
    plain = generate(tmp_path / "a", "hello", GenerateOptions(**options))
    assert generate(tmp_path / "a", "hello", GenerateOptions(**options, kv_cache="none")) == plain
    assert generate(tmp_path / "a", "hello", GenerateOptions(**options, kv_cache=kv_cache))
    write_artifact(tmp_path / "b", type(CONFIGS["mistral"])(**CONFIGS["mistral"].to_dict()))
    tokenizer().save_pretrained(tmp_path / "b")
    with pytest.raises(UserError, match=f"kv_cache={kv_cache}: layer 0"):
        generate(tmp_path / "b", "hello", GenerateOptions(**options, kv_cache=kv_cache))


# ---------------------------------------------------------------------- GPU


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("bits", BITS)
def test_decoding_on_the_gpu_attends_to_the_codes(bits: int) -> None:
    """bf16 logits of the fused path lie no farther from fp32's than four times sdpa's do."""
    torch.manual_seed(0)
    config = LlamaConfig(**{**CONFIGS["llama"].to_dict(), "head_dim": 64})
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        exact = steps(model, QuantizedKVCache(config, bits), 5)
        model = model.to("cuda", torch.bfloat16)
        global IDS, PADDED
        saved, IDS, PADDED = (IDS, PADDED), IDS.cuda(), PADDED.cuda()
        try:
            sdpa = steps(model, QuantizedKVCache(config, bits), 5).float().cpu()
            attend_to_codes(model)
            cache = QuantizedKVCache(model.config, bits)
            fused = steps(model, cache, 5).float().cpu()
        finally:
            IDS, PADDED = saved
    assert cache.layers[0].buffers.path == "triton"
    seen = PADDED.bool()
    assert (fused - exact)[seen].abs().max() <= 4 * (sdpa - exact)[seen].abs().max()
