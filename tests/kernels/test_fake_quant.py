"""The straight-through estimator against a plain autograd formulation."""

import pytest
import torch

from qat_kernels import QuantSpec, compute_scale, dequantize, quantize
from qat_kernels.fake_quant import fake_quantize_activation_ste, fake_quantize_ste, round_to_ste

SPECS = [
    QuantSpec(bits=bits, granularity=granularity, symmetric=symmetric, grid=grid)
    for bits in (2, 4, 8)
    for granularity in ("tensor", "channel", "group")
    for symmetric, grid in [(True, "signed_absmax"), (True, "mse"), (False, "absmax")]
]


def straight_through(w, spec):
    """The estimator written with detach: value of the quantizer, gradient of a clamp."""
    scale, zero_point = compute_scale(w, spec)
    value = dequantize(quantize(w, scale, zero_point, spec), scale, zero_point)
    groups = w.detach().unflatten(-1, (scale.shape[-1], -1)) / scale.unsqueeze(-1)
    if zero_point is not None:
        groups = groups + zero_point.unsqueeze(-1)
    inside = (groups >= spec.q_min - 0.5) & (groups <= spec.q_max + 0.5)
    return value, inside.flatten(-2)


@pytest.mark.parametrize("shape", [(6, 96), (3, 5, 64)], ids=str)
@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_forward_and_gradient(spec, shape):
    torch.manual_seed(0)
    w = torch.randn(shape, requires_grad=True)
    grad = torch.randn(shape)
    value, inside = straight_through(w, spec)
    out = fake_quantize_ste(w, spec)
    out.backward(grad)
    assert torch.equal(out, value)
    assert torch.equal(w.grad, grad * inside)
    assert int(inside.sum()) > 0


def test_chunks_do_not_change_the_result(monkeypatch):
    torch.manual_seed(0)
    w, grad = torch.randn(2, 50, 64, requires_grad=True), torch.randn(2, 50, 64)
    whole = fake_quantize_ste(w, QuantSpec())
    whole.backward(grad)
    expected, w.grad = w.grad, None
    monkeypatch.setattr("qat_kernels.numerics.CHUNK_ELEMENTS", 7 * 64)
    chunked = fake_quantize_ste(w, QuantSpec())
    chunked.backward(grad)
    assert torch.equal(chunked, whole)
    assert torch.equal(w.grad, expected)


def test_only_the_weight_is_saved():
    saved = []

    def keep(tensor):
        saved.append(tensor.data_ptr())
        return tensor

    w = torch.randn(4, 64, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        fake_quantize_ste(w, QuantSpec())
    assert saved == [w.data_ptr()]


def test_output_dtype_is_the_fp32_value_rounded_once():
    w = torch.randn(4, 64)
    assert torch.equal(
        fake_quantize_ste(w, QuantSpec(), torch.bfloat16),
        fake_quantize_ste(w, QuantSpec()).bfloat16(),
    )


def test_empty_weight():
    w = torch.zeros(0, 64, requires_grad=True)
    fake_quantize_ste(w, QuantSpec()).sum().backward()
    assert w.grad.shape == (0, 64)


def test_transposed_weight_and_gradient():
    torch.manual_seed(0)
    w = torch.randn(64, 6).t().requires_grad_()
    grad = torch.randn(64, 6).t()
    value, inside = straight_through(w, QuantSpec())
    out = fake_quantize_ste(w, QuantSpec())
    out.backward(grad)
    assert torch.equal(out, value)
    assert torch.equal(w.grad, grad * inside)


def test_activations():
    spec = QuantSpec(
        bits=8, granularity="token", dynamic=True, grid="absmax", scale_dtype="float32"
    )
    x = torch.tensor([[-300.0, 1.4, 127.5, 127.6, 0.0]], requires_grad=True)
    out = fake_quantize_activation_ste(x, torch.tensor(1.0), spec)
    out.backward(torch.ones_like(x))
    assert out.tolist() == [[-128, 1, 127, 127, 0]]
    assert x.grad.tolist() == [[0, 1, 1, 0, 1]]


def test_round_to():
    x = torch.randn(8, requires_grad=True)
    out = round_to_ste(x, torch.bfloat16)
    out.sum().backward()
    assert torch.equal(out, x.bfloat16().float())
    assert torch.equal(x.grad, torch.ones(8))
