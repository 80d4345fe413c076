"""FP8 layers: the two operators together equal the reference; scales, shapes, wrong input."""

import pytest
import torch

from qat_kernels.fp8 import E4M3, choose, linear, prepare, reference

STATIC = torch.tensor(0.01)


def tensors(
    m: int = 5, n: int = 24, k: int = 64
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(m, k, generator=generator)
    return x, torch.randn(n, k, generator=generator), torch.randn(n, generator=generator)


@pytest.mark.parametrize("granularity", ["channel", "tensor"])
@pytest.mark.parametrize("static", [None, STATIC])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_layer_equals_the_reference(granularity, static, dtype):
    x, w, bias = tensors()
    weight = prepare(w, granularity, static, dtype)
    assert weight.codes.dtype == E4M3
    assert tuple(weight.scale.shape) == ((24, 1) if granularity == "channel" else (1, 1))
    x = x.to(dtype)
    for b in (None, bias):
        got = linear(x, weight, b)
        assert got.dtype == dtype
        torch.testing.assert_close(got, reference(x, weight, b), atol=0, rtol=0)
    # a sequence axis changes nothing on the CPU
    got = linear(x.view(1, 5, 64), weight, bias)
    torch.testing.assert_close(got[0], linear(x, weight, bias), atol=0, rtol=0)


@pytest.mark.parametrize("granularity", ["channel", "tensor"])
def test_the_largest_weight_is_exact_and_the_others_within_a_rounding(granularity):
    _, w, _ = tensors()
    weight = prepare(w, granularity)
    decoded = weight.codes.float() * weight.scale
    largest = w.abs().amax(1) if granularity == "channel" else w.abs().amax()
    # 448 * (absmax / 448): two roundings of fp32
    torch.testing.assert_close(
        decoded.abs().amax(1) if granularity == "channel" else decoded.abs().amax(),
        largest, atol=0, rtol=2 * 2.0**-24,
    )  # fmt: skip
    # e4m3 has four significant bits: half a step is 2^-4 relative, or 2^-10 below 2^-6 codes
    bound = 1.001 * torch.maximum(w.abs() * 2.0**-4, weight.scale * 2.0**-10)
    assert bool(((decoded - w).abs() <= bound).all())


def test_integers_are_exact():
    x = torch.randint(-8, 9, (7, 64), generator=torch.Generator().manual_seed(1)).float()
    w = torch.randint(-8, 9, (9, 64), generator=torch.Generator().manual_seed(2)).float()
    # an absmax of 448 * 2^-5 makes every scale 2^-5
    x[:, 0], w[:, 0] = 14.0, 14.0
    weight = prepare(w, dtype=torch.float32)
    torch.testing.assert_close(linear(x, weight), x @ w.T, atol=0, rtol=0)


def test_no_rows():
    x, w, _ = tensors()
    assert tuple(linear(x[:0].to(torch.bfloat16), prepare(w)).shape) == (0, 24)


def test_wrong_input_is_a_value_error():
    x, w, bias = tensors()
    with pytest.raises(ValueError, match="float matrix"):
        prepare(w[0])
    with pytest.raises(ValueError, match="granularity=group"):
        prepare(w, "group")
    with pytest.raises(ValueError, match="NaN"):
        prepare(w * float("nan"))
    with pytest.raises(ValueError, match="positive"):
        prepare(w, input_scale=torch.tensor(0.0))
    with pytest.raises(ValueError, match="dtype"):
        prepare(w, dtype=torch.float64)
    with pytest.raises(ValueError, match="prepared for"):
        linear(x, prepare(w))
    weight = prepare(w, dtype=torch.float32)
    with pytest.raises(ValueError, match="does not fit"):
        linear(x[:, :32], weight)
    with pytest.raises(ValueError, match="bias"):
        linear(x, weight, bias[:3])


def test_the_choice():
    assert choose((1, 24, 64), torch.device("cpu")).path == "reference"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_integers_are_exact_on_the_gpu():
    x = torch.randint(-8, 9, (7, 64), generator=torch.Generator().manual_seed(1)).float()
    w = torch.randint(-8, 9, (9, 64), generator=torch.Generator().manual_seed(2)).float()
    x[:, 0], w[:, 0] = 14.0, 14.0
    weight = prepare(w.cuda(), dtype=torch.float32)
    torch.testing.assert_close(linear(x.cuda(), weight).cpu(), x @ w.T, atol=0, rtol=0)
