"""The straight-through estimator against a plain autograd formulation."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from qat_kernels import (
    QuantSpec,
    compute_scale,
    dequantize,
    fake_quant,
    fake_quant_launch,
    quantize,
)
from qat_kernels.fake_quant import (
    choose,
    decode,
    encode,
    fake_quantize_activation_ste,
    fake_quantize_backward_op,
    fake_quantize_op,
    fake_quantize_ste,
    reference,
    round_to_ste,
)
from qat_kernels.support import Choice

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


# ------------------------------------------------------------------------- dtypes, layouts, inputs

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("out_dtype", DTYPES, ids=str)
def test_result_and_gradient_of_every_dtype(dtype, out_dtype):
    torch.manual_seed(0)
    w = torch.randn(4, 64).to(dtype).requires_grad_()
    grad = torch.randn(4, 64).to(out_dtype)
    out = fake_quantize_ste(w, QuantSpec(), out_dtype)
    out.backward(grad)
    assert out.dtype == out_dtype
    assert torch.equal(out, reference(w, QuantSpec(), out_dtype=out_dtype))
    _, inside = straight_through(w.float(), QuantSpec())
    assert w.grad.dtype == dtype
    assert torch.equal(w.grad, grad.to(dtype) * inside)


@pytest.mark.parametrize(
    ("w", "spec", "out_dtype", "message"),
    [
        (torch.zeros(2, 32, dtype=torch.int8), QuantSpec(), None, "takes float weights, not torch"),
        (torch.zeros(2, 33), QuantSpec(), None, "K = 33 is not a multiple of group_size = 32"),
        (torch.zeros(32), QuantSpec(), None, r"shape \[\.\.\., N, K\], not \[32\]"),
        (torch.zeros(2, 32), QuantSpec(), torch.int8, "out_dtype=torch.int8"),
        (
            torch.zeros(2, 32),
            QuantSpec(grid="absmax", granularity="token", dynamic=True),
            None,
            "granularity=token is for activations",
        ),
    ],
)
def test_bad_input(w, spec, out_dtype, message):
    with pytest.raises(ValueError, match=message):
        fake_quantize_ste(w, spec, out_dtype)


@pytest.mark.parametrize("shape", [(0, 64), (4, 0), (2, 0, 64)], ids=str)
@pytest.mark.parametrize("granularity", ["group", "channel", "tensor"])
def test_empty_weights(shape, granularity):
    w = torch.zeros(shape, requires_grad=True)
    out = fake_quantize_ste(w, QuantSpec(granularity=granularity), torch.bfloat16)
    assert out.shape == shape
    assert out.dtype == torch.bfloat16
    out.sum().backward()
    assert w.grad.shape == shape


def test_misaligned_and_expanded_weights():
    torch.manual_seed(0)
    base = torch.randn(4 * 64 + 1)
    for w in (base[1:].view(4, 64), base[:64].expand(4, 64), base[:256].view(4, 64)[::2]):
        assert torch.equal(fake_quantize_ste(w, QuantSpec()), reference(w, QuantSpec()))


# -------------------------------------------------------------------------------- which path, ops


def test_the_choice_says_why(monkeypatch):
    shape, cpu, cuda = (64, 128), torch.device("cpu"), torch.device("cuda")
    assert choose(shape, cpu).path == "vectorised"
    assert choose(shape, cpu, spec=QuantSpec(granularity="tensor")).path == "reference"
    # as on a machine with a GPU that runs the kernels
    monkeypatch.setattr(fake_quant, "kernels_run_on", lambda device: None)
    assert choose(shape, cuda, dtype=torch.bfloat16).path == "triton"
    cases = [
        ({"spec": QuantSpec(grid="mse")}, "grid=mse"),
        ({"spec": QuantSpec(granularity="tensor")}, "granularity=tensor"),
        ({"dtype": torch.float64}, "torch.float64"),
    ]
    for options, reason in cases:
        choice = choose(shape, cuda, **options)
        assert choice.path == "reference"
        assert reason in choice.reason
    assert choose(shape, cuda, spec=QuantSpec(grid="mse"), learned=True).path == "triton"
    monkeypatch.setattr(fake_quant, "kernels_run_on", lambda device: Choice("reference", "old"))
    assert choose(shape, cuda) == Choice("reference", "old")
    with pytest.raises(ValueError, match="not a multiple"):
        choose((64, 100), cuda)


@pytest.mark.parametrize("spec", SPECS[::5], ids=str)
def test_a_spec_survives_the_operators_argument(spec):
    assert decode(encode(spec)) == spec


@pytest.mark.parametrize("grad", [False, True])
def test_operators_are_registered_right(grad):
    w = torch.randn(4, 64, requires_grad=grad)
    torch.library.opcheck(fake_quantize_op, (w, encode(QuantSpec()), torch.bfloat16))
    arguments = (torch.randn(4, 64).bfloat16(), w.detach(), encode(QuantSpec()))
    torch.library.opcheck(fake_quantize_backward_op, arguments)


@pytest.mark.parametrize("out_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("spec", [QuantSpec(), SPECS[-1]], ids=str)
def test_compiled_in_one_graph(spec, out_dtype):
    torch.manual_seed(0)
    w, x = torch.randn(16, 64, requires_grad=True), torch.randn(3, 64).to(out_dtype)

    def step(w, x):
        return torch.nn.functional.linear(x, fake_quantize_ste(w, spec, out_dtype)).square().sum()

    expected = step(w, x)
    expected.backward()
    expected_grad, w.grad = w.grad, None
    torch._dynamo.reset()
    value = torch.compile(step, fullgraph=True, backend="aot_eager")(w, x)
    value.backward()
    assert torch.equal(value, expected)
    assert torch.equal(w.grad, expected_grad)


def test_fake_tensors_take_the_operator():
    with FakeTensorMode():
        w = torch.empty(1024, 4096, dtype=torch.bfloat16, requires_grad=True)
        out = fake_quantize_ste(w, QuantSpec(), torch.float32)
        out.sum().backward()
    assert out.dtype == torch.float32
    assert w.grad.shape == w.shape
    assert w.grad.dtype == torch.bfloat16


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_cuda_is_the_cpu_bit_for_bit(spec, compiled):
    torch.manual_seed(0)
    w, grad = torch.randn(3, 70, 256, dtype=torch.bfloat16), torch.randn(3, 70, 256)
    results = []
    for device in ("cpu", "cuda"):
        leaf = w.to(device).requires_grad_()
        torch._dynamo.reset()
        run = torch.compile(fake_quantize_ste, fullgraph=True) if compiled else fake_quantize_ste
        out = run(leaf, spec, torch.float32)
        out.backward(grad.to(device))
        results.append((out.detach().cpu(), leaf.grad.cpu()))
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_kernel_that_fails_its_test_is_not_used(monkeypatch):
    def wrong(*arguments, **options):
        value, scale_grad = launch(*arguments, **options)
        return value + 1, scale_grad

    launch = fake_quant_launch.launch
    monkeypatch.setattr(fake_quant_launch, "launch", wrong)
    monkeypatch.setattr("qat_kernels.support._VERIFIED", {})
    w = torch.randn(8, 64)
    with pytest.warns(RuntimeWarning, match="computes wrong values"):
        out = fake_quantize_ste(w.cuda(), QuantSpec())
    assert torch.equal(out.cpu(), reference(w, QuantSpec()))
