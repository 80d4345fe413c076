"""The learned step size against autograd through an equivalent differentiable expression."""

import pytest
import torch

from qat_kernels import QuantSpec, compute_scale, dequantize, quantize
from qat_kernels.fake_quant import encode, fake_quantize_ste, reference
from qat_kernels.fake_quant_learned import (
    fake_quantize_learned,
    fake_quantize_learned_backward_op,
    fake_quantize_learned_op,
    learned_gradients,
)
from qat_kernels.numerics import round_scale

SPECS = [
    QuantSpec(bits=bits, granularity=granularity, symmetric=symmetric, grid="absmax")
    for bits in (2, 4, 8)
    for granularity in ("tensor", "channel", "group")
    for symmetric in (True, False)
]


def case(spec, dtype=torch.float32, shape=(3, 5, 96)):
    """(w, scale, zero point, grad): scales on the portable grid, some values beyond the codes."""
    generator = torch.Generator().manual_seed(spec.bits)
    w = torch.randn(shape, generator=generator).to(dtype)
    scale, _ = compute_scale(w, spec)
    scale = scale * torch.empty_like(scale).uniform_(0.4, 1.2, generator=generator)
    zero_point = None
    if not spec.symmetric:
        codes = torch.randint(spec.q_min, spec.q_max + 1, scale.shape, generator=generator)
        zero_point = codes.to(torch.int8)
    grad = torch.randn(shape, generator=generator)
    return w.requires_grad_(), round_scale(scale, spec).requires_grad_(), zero_point, grad


def differentiable(w, scale, zero_point, spec):
    """The same function for autograd: the rounding is a constant, the clipping a mask."""
    groups = w.unflatten(-1, (-1, spec.group_of(w.shape[-1])))
    scale_g = scale.unsqueeze(-1)
    zero = 0 if zero_point is None else zero_point.unsqueeze(-1).to(w.dtype)
    t = groups / scale_g
    shifted = (t + zero).detach()
    inside = (shifted >= spec.q_min - 0.5) & (shifted <= spec.q_max + 0.5)
    codes = quantize(w.float(), scale.detach().float(), zero_point, spec).to(w.dtype)
    codes = codes.unflatten(-1, groups.shape[-2:]) - zero
    passing = torch.where(inside, t, 0.0)
    return ((passing + (codes - passing).detach()) * scale_g).flatten(-2)


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_value_and_gradients(spec):
    w, scale, zero_point, grad = case(spec)
    out = fake_quantize_learned(w, scale, spec, zero_point)
    out.backward(grad)
    codes = quantize(w, scale.detach(), zero_point, spec)
    assert torch.equal(out, dequantize(codes, scale.detach(), zero_point))
    # in fp64, so that the expression's own rounding does not count
    w64, scale64 = (t.detach().double().requires_grad_() for t in (w, scale))
    differentiable(w64, scale64, zero_point, spec).backward(grad.double())
    # d(t * s) / dw is 1 up to the rounding of a division and a product in fp64
    torch.testing.assert_close(w.grad.double(), w64.grad, atol=0, rtol=1e-15)
    shared = w.numel() // scale.numel()
    expected = scale64.grad * (shared * spec.q_max) ** -0.5
    # a term |grad| * |q - t| <= |grad| * 2^bits; its difference, product and sum round in fp32,
    # and so does t, to half a unit in the last place of at most 2^bits
    size = grad.abs().sum() * 2**spec.bits if spec.granularity == "tensor" else None
    if size is None:
        size = grad.unflatten(-1, (-1, shared)).abs().sum(-1) * 2**spec.bits
    bound = (shared + 4) * 2.0**-24 * size.double() * (shared * spec.q_max) ** -0.5
    assert bool(((scale.grad.double() - expected).abs() <= bound).all())


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_integer_valued_gradients_are_exact(spec):
    _, scale, zero_point, _ = case(spec)
    generator = torch.Generator().manual_seed(1)
    scale = torch.exp2(torch.randint(-3, 3, scale.shape, generator=generator)).requires_grad_()
    groups = 96 // spec.group_of(96)
    quarters = torch.randint(-40, 40, (3, 5, groups, 96 // groups), generator=generator)
    w = (quarters * scale.detach().unsqueeze(-1) / 4).flatten(-2).requires_grad_()
    grad = torch.randint(-2, 3, w.shape, generator=generator).float()
    fake_quantize_learned(w, scale, spec, zero_point).backward(grad)
    w_again, scale_again = (t.detach().clone().requires_grad_() for t in (w, scale))
    differentiable(w_again, scale_again, zero_point, spec).backward(grad)
    factor = (w.numel() // scale.numel() * spec.q_max) ** -0.5
    # every term is a multiple of 1/4 below 2^10 and every partial sum of 1,440 terms exact; powers
    # of two times integers are exact in the expression, too
    assert torch.equal(w.grad, w_again.grad)
    assert torch.equal(scale.grad, scale_again.grad * factor)


def test_the_scale_is_used_as_it_will_be_saved():
    spec = QuantSpec()
    w, scale, _, grad = case(spec)
    raw = (scale.detach() * 1.001).requires_grad_()
    with torch.no_grad():
        raw[0, 0, 0], raw[0, 1, 0], raw[0, 2, 0] = 1e-9, 1e9, -1e-9
    out = fake_quantize_learned(w, raw, spec)
    out.backward(grad)
    assert torch.equal(out, reference(w, spec, round_scale(raw.detach(), spec)))
    # straight through the rounding, at its bounds too: a scale that got there can leave again
    _, expected = learned_gradients(grad, w, round_scale(raw.detach(), spec), None, spec)
    assert torch.equal(raw.grad, expected)


def test_a_computed_scale_given_back_changes_nothing():
    spec = QuantSpec()
    w = torch.randn(4, 64)
    scale, _ = compute_scale(w, spec)
    assert torch.equal(fake_quantize_learned(w, scale, spec), fake_quantize_ste(w, spec))


def test_a_step_along_the_gradient_lowers_the_error():
    spec = QuantSpec(bits=3)
    w = torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
    scale = (compute_scale(w, spec)[0] * 1.7).requires_grad_()
    first = None
    for _ in range(50):
        scale.grad = None
        error = (fake_quantize_learned(w, scale, spec) - w).square().sum()
        first = error.detach() if first is None else first
        error.backward()
        with torch.no_grad():
            scale -= 0.02 * scale.grad
    assert float(error.detach()) < 0.6 * float(first)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_dtypes(dtype):
    spec = QuantSpec()
    w, scale, _, grad = case(spec, dtype)
    half_scale = scale.detach().bfloat16().requires_grad_()
    out = fake_quantize_learned(w, half_scale, spec, out_dtype=torch.bfloat16)
    out.backward(grad.bfloat16())
    assert torch.equal(out, reference(w, spec, scale.detach(), out_dtype=torch.bfloat16))
    assert w.grad.dtype == dtype
    assert half_scale.grad.dtype == torch.bfloat16


def test_chunks_do_not_change_the_result(monkeypatch):
    spec = QuantSpec()
    w, scale, _, grad = case(spec)
    expected = learned_gradients(grad, w, scale, None, spec)
    value = fake_quantize_learned(w, scale, spec)
    monkeypatch.setattr("qat_kernels.numerics.CHUNK_ELEMENTS", 2 * 96)
    got = learned_gradients(grad, w, scale, None, spec)
    assert torch.equal(fake_quantize_learned(w, scale, spec), value)
    assert torch.equal(got[0], expected[0])
    assert torch.equal(got[1], expected[1])


def test_static_scale_and_strides():
    spec = QuantSpec()
    w, scale, _, grad = case(spec, shape=(96, 96))
    turned = w.detach().t().contiguous().t().requires_grad_()
    for weight in (w, turned):
        fake_quantize_learned(weight, scale.detach(), spec).backward(grad)
    assert torch.equal(w.grad, turned.grad)


@pytest.mark.parametrize("shape", [(0, 64), (4, 0)], ids=str)
def test_empty_weight(shape):
    w = torch.zeros(shape, requires_grad=True)
    scale = torch.ones(shape[0], shape[1] // 32, requires_grad=True)
    fake_quantize_learned(w, scale, QuantSpec()).sum().backward()
    assert w.grad.shape == shape
    assert scale.grad.shape == scale.shape


@pytest.mark.parametrize(
    ("scale", "zero_point", "symmetric", "message"),
    [
        (torch.ones(4, 3), None, True, r"expected a float tensor \[4, 2\]"),
        (torch.ones(4, 2, dtype=torch.int32), None, True, "expected a float tensor"),
        (torch.ones(4, 2, device="meta"), None, True, "scale is on meta, the weight on cpu"),
        (torch.ones(4, 2), torch.zeros(4, 2, dtype=torch.int8), True, "zero_point goes with"),
        (torch.ones(4, 2), None, False, "zero_point goes with symmetric=false"),
        (torch.ones(4, 2), torch.zeros(4, 2), False, r"zero_point: expected int8 \[4, 2\]"),
    ],
)
def test_bad_input(scale, zero_point, symmetric, message):
    spec = QuantSpec(symmetric=symmetric, grid="absmax")
    with pytest.raises(ValueError, match=message):
        fake_quantize_learned(torch.zeros(4, 64), scale, spec, zero_point)


# ------------------------------------------------------------------------------- operators, CUDA


@pytest.mark.parametrize("spec", [SPECS[-2], SPECS[-1]], ids=str)
def test_operators_are_registered_right(spec):
    w, scale, zero_point, grad = case(spec)
    arguments = (w, scale, zero_point, encode(spec), torch.bfloat16)
    torch.library.opcheck(fake_quantize_learned_op, arguments)
    arguments = (grad, w.detach(), scale.detach(), zero_point, encode(spec))
    torch.library.opcheck(fake_quantize_learned_backward_op, arguments)


@pytest.mark.parametrize("spec", [SPECS[-2], SPECS[-1]], ids=str)
def test_compiled_in_one_graph(spec):
    w, scale, zero_point, grad = case(spec)
    fake_quantize_learned(w, scale, spec, zero_point).backward(grad)
    expected = (w.grad, scale.grad)
    w.grad = scale.grad = None
    torch._dynamo.reset()
    run = torch.compile(fake_quantize_learned, fullgraph=True, backend="aot_eager")
    run(w, scale, spec, zero_point).backward(grad)
    assert torch.equal(w.grad, expected[0])
    assert torch.equal(scale.grad, expected[1])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_cuda_is_the_cpu(spec):
    w, scale, zero_point, grad = case(spec, shape=(70, 256))
    moved_w, moved_scale = (t.detach().cuda().requires_grad_() for t in (w, scale))
    moved_zero = None if zero_point is None else zero_point.cuda()
    out = fake_quantize_learned(w, scale, spec, zero_point)
    moved = fake_quantize_learned(moved_w, moved_scale, spec, moved_zero)
    out.backward(grad)
    moved.backward(grad.cuda())
    assert torch.equal(moved.cpu(), out)
    assert torch.equal(moved_w.grad.cpu(), w.grad)
    # two orders of one fp32 sum, as in `test_value_and_gradients`
    shared = w.numel() // scale.numel()
    size = grad.abs().sum() if spec.granularity == "tensor" else None
    if size is None:
        size = grad.unflatten(-1, (-1, shared)).abs().sum(-1)
    bound = 2 * (shared + 4) * 2.0**-24 * size * 2**spec.bits * (shared * spec.q_max) ** -0.5
    assert bool(((moved_scale.grad.cpu() - scale.grad).abs() <= bound).all())
