"""Numbers of the KV cache: codes, scales, layout, and the definition of attention."""

import pytest
import torch
from torch.nn import functional

from qat_kernels.kv_cache_numerics import (
    BITS,
    bytes_per_token,
    dequantize,
    quantize,
    reference,
    vector_scale,
)
from qat_kernels.numerics import fake_quantize_with, token_scale


def vectors(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def test_int8_scale_is_that_of_dynamic_tokens_in_bf16() -> None:
    x = vectors(3, 5, 80)
    expected = token_scale(x).squeeze(-1).to(torch.bfloat16)
    torch.testing.assert_close(vector_scale(x, 8), expected, atol=0, rtol=0)


def test_int4_scale_puts_the_largest_value_on_minus_eight() -> None:
    x = vectors(40, 64)
    largest = x.gather(-1, x.abs().argmax(-1, keepdim=True)).squeeze(-1)
    scale = vector_scale(x, 4)
    torch.testing.assert_close(scale, (largest / -8).to(torch.bfloat16), atol=0, rtol=0)
    assert {bool(s < 0) for s in scale} == {True, False}
    # the larger of two equals is the positive one
    assert vector_scale(torch.tensor([2.0, -2.0]), 4) == -0.25


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_codes_are_those_of_the_one_quantizer(dtype: torch.dtype, bits: int) -> None:
    from qat_kernels.kv_cache_numerics import SPECS

    x = vectors(2, 3, 96).to(dtype)
    codes, scale = quantize(x, bits)
    assert codes.dtype == (torch.int8 if bits == 8 else torch.uint8)
    assert tuple(codes.shape) == (2, 3, 96 * bits // 8)
    expected, _ = fake_quantize_with(x, scale.float().unsqueeze(-1), SPECS[bits])
    torch.testing.assert_close(dequantize(codes, scale), expected, atol=0, rtol=0)


@pytest.mark.parametrize("bits", BITS)
def test_quantizing_again_changes_nothing(bits: int) -> None:
    codes, scale = quantize(vectors(200, 64), bits)
    again, scale_again = quantize(dequantize(codes, scale), bits)
    if bits == 4:
        torch.testing.assert_close((again, scale_again), (codes, scale), atol=0, rtol=0)
    # int8 has no code at absmax / s = 127.5: a second pass moves the scale by up to 1 / 127
    else:
        assert bool(((scale_again.float() - scale.float()).abs() <= scale.float() / 100).all())


def test_int4_halves_of_a_byte() -> None:
    x = torch.tensor([[-8.0, 1.0, 2.0, 3.0, 7.0, -1.0, 0.0, -3.0]])
    codes, scale = quantize(x, 4)
    assert scale.tolist() == [1.0]
    low, high = x.to(torch.int64).add(8).chunk(2, -1)
    assert codes.tolist() == (low + 16 * high).tolist()


@pytest.mark.parametrize("bits", BITS)
def test_vectors_without_a_normal_scale(bits: int) -> None:
    x = vectors(6, 64)
    x[0] = 0
    x[1] *= 1e-41
    x[2, 3], x[3, 4] = torch.nan, torch.inf
    x[4] *= 0.98 * torch.finfo(torch.float32).max / x[4].abs().max()
    back = dequantize(*quantize(x, bits))
    assert bool((back[:2] == 0).all())
    assert bool(back[2:4].isnan().all())
    assert bool(back[4:].isfinite().all())
    codes, scale = quantize(x, bits)
    assert bool((scale[:2].float() == torch.finfo(torch.float32).eps).all())
    assert bool((codes[2:4] == (0 if bits == 8 else 0x88)).all())


@pytest.mark.parametrize(("bits", "least"), [(8, 43.0), (4, 19.0)])
@pytest.mark.parametrize("d", [64, 128])
def test_signal_to_noise_on_gaussian_vectors(d: int, bits: int, least: float) -> None:
    """Measured: 44.4 and 43.7 dB for int8, 20.4 and 19.7 for int4, at 64 and 128."""
    x = vectors(4000, d)
    noise = dequantize(*quantize(x, bits)) - x
    assert 10 * torch.log10(x.square().sum() / noise.square().sum()) > least


@pytest.mark.parametrize("bits", BITS)
def test_reference_is_torch_attention_over_dequantized_values(bits: int) -> None:
    b, h, g, capacity, d = 2, 2, 3, 20, 80
    kv = [quantize(x, bits) for x in vectors(2, b, h, capacity, d)]
    (k_codes, k_scale), (v_codes, v_scale) = kv
    q = vectors(b, h * g, d)
    span = torch.tensor([[0, 4], [20, 17]], dtype=torch.int32)
    out = reference(q, k_codes, k_scale, v_codes, v_scale, span, 0.1)
    for i, (start, end) in enumerate(span.t().tolist()):
        k, v = (dequantize(*pair)[i : i + 1, :, start:end] for pair in kv)
        expected = functional.scaled_dot_product_attention(
            q[i : i + 1, :, None], k, v, scale=0.1, enable_gqa=True
        )
        # two fp32 softmax attentions over 20 tokens of size below 4: 100 roundings of 4
        torch.testing.assert_close(out[i], expected[0, :, 0], atol=100 * 4 * 2.0**-24, rtol=0)
    last = reference(q, k_codes, k_scale, v_codes, v_scale, span, 0.1, window=5)
    cut = torch.tensor([[15, 12], [20, 17]], dtype=torch.int32)
    expected = reference(q, k_codes, k_scale, v_codes, v_scale, cut, 0.1)
    torch.testing.assert_close(last, expected, atol=0, rtol=0)


def test_an_empty_sequence_answers_zeros_whatever_lies_in_the_buffers() -> None:
    codes, scale = quantize(vectors(1, 1, 4, 64), 8)
    scale[...] = torch.nan
    span = torch.tensor([[3], [3]], dtype=torch.int32)
    out = reference(vectors(1, 2, 64), codes, scale, codes, scale, span, 1.0)
    assert bool((out == 0).all())


def test_bytes_per_token() -> None:
    # bf16: 2 * 8 * 128 * 2 = 4096
    assert bytes_per_token(8, 128, 8) == 2 * 8 * (128 + 2)
    assert bytes_per_token(8, 128, 4) == 2 * 8 * (64 + 2)
    assert 4096 / bytes_per_token(8, 128, 8) == pytest.approx(1.969, abs=1e-3)


def test_wrong_input() -> None:
    for bits in (2, 16):
        with pytest.raises(ValueError, match=f"bits={bits}"):
            quantize(torch.zeros(2, 8), bits)
    with pytest.raises(ValueError, match="head size 7"):
        quantize(torch.zeros(2, 7), 4)
