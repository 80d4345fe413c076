"""The operators: dispatch, gradients, compile, autocast."""

import subprocess
import sys

import pytest
import torch
from torch.nn import functional

from qat_kernels import explain, nf4
from qat_kernels.nf4 import (
    DTYPES,
    Spec4bit,
    dequantize_4bit,
    dequantize_absmax,
    linear_4bit,
    quantize_4bit,
    reference,
)

SPECS = [Spec4bit(), Spec4bit("fp4", 32, False), Spec4bit("nf4", 128)]
SHAPE = (96, 160)  # K is no multiple of 64 or 128: blocks run over the ends of rows


def case(spec, dtype=torch.float32, weight_dtype=torch.bfloat16):
    """(x, packed, W in the dtype of x, bias, gradient of y)."""
    torch.manual_seed(0)
    packed = quantize_4bit(torch.randn(SHAPE), spec)
    weight = dequantize_4bit(packed, spec, SHAPE, weight_dtype).to(dtype)
    x = torch.randn(3, 7, SHAPE[1], dtype=dtype, requires_grad=True)
    bias = torch.randn(SHAPE[0], requires_grad=True)
    return x, packed, weight, bias, torch.randn(3, 7, SHAPE[0], dtype=dtype)


def run(function, x, bias, grad):
    y = function(x, bias)
    return (y, *torch.autograd.grad(y, [x, bias], grad))


@pytest.mark.parametrize("spec", SPECS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_linear_equals_a_linear_on_the_dequantized_weight(spec, dtype):
    x, packed, weight, bias, grad = case(spec, dtype)
    ours = run(lambda x, b: linear_4bit(x, packed, spec, SHAPE, torch.bfloat16, b), x, bias, grad)
    plain = run(lambda x, b: functional.linear(x, weight, b.to(dtype)), x, bias, grad)
    for a, b in zip(ours[:2], plain[:2]):
        assert a.dtype == b.dtype == dtype
        assert torch.equal(a, b)
    # the gradient of the bias is summed in fp32 here and in the dtype of x there
    expected = grad.reshape(-1, SHAPE[0]).sum(0, dtype=torch.float32)
    assert torch.equal(ours[2], expected)


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_compiled_equals_eager(spec):
    x, packed, _, bias, grad = case(spec)

    def function(x, bias):
        weight = dequantize_4bit(packed, spec, SHAPE, torch.float32)
        return linear_4bit(x * 2, packed, spec, SHAPE, torch.bfloat16, bias) + weight.sum()

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    for a, b in zip(run(function, x, bias, grad), run(compiled, x, bias, grad)):
        assert torch.equal(a, b)


def test_compiled_training_does_not_keep_the_weight():
    spec = Spec4bit()
    x, packed, _, _, _ = case(spec)
    kept = []

    def function(x):
        return linear_4bit(x, packed, spec, SHAPE, torch.float32)

    for one in (function, torch.compile(function, fullgraph=True, backend="aot_eager")):
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
            one(x)
    sizes = {tuple(t.shape) for t in kept}
    assert SHAPE not in sizes
    assert tuple(packed.codes.shape) in sizes


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_operators_are_registered_correctly(spec):
    x, packed, _, bias, _ = case(spec)
    tensors = [tensor for tensor in packed if tensor is not None]
    options = (spec.quant_type, spec.block_size)
    torch.library.opcheck(
        nf4.linear_4bit_op, (x, tensors, bias, *options, SHAPE[0], torch.bfloat16)
    )
    torch.library.opcheck(nf4.dequantize_4bit_op, (tensors, *options, SHAPE, torch.bfloat16))


def test_autocast_leaves_the_dtype_to_the_caller():
    spec = Spec4bit()
    x, packed, _, bias, grad = case(spec)

    def function(x, b):
        return linear_4bit(x, packed, spec, SHAPE, torch.bfloat16, b)

    plain = run(function, x, bias, grad)
    with torch.autocast("cpu", torch.bfloat16):
        under = run(function, x, bias, grad)
    for a, b in zip(plain, under):
        assert a.dtype == b.dtype
        assert torch.equal(a, b)


def test_no_tokens():
    spec = Spec4bit()
    _, packed, _, _, _ = case(spec)
    x = torch.randn(0, SHAPE[1], requires_grad=True)
    y = linear_4bit(x, packed, spec, SHAPE, torch.float32)
    assert y.shape == (0, SHAPE[0])
    y.sum().backward()
    assert x.grad.shape == x.shape


def test_compiled_operator_of_bitsandbytes_is_used_and_equal(monkeypatch):
    pytest.importorskip("bitsandbytes")
    op = nf4._compiled(torch.device("cpu"))
    assert op is not None
    calls = []
    monkeypatch.setattr(nf4, "_compiled", lambda device: lambda *a: calls.append(a) or op(*a))
    for spec in SPECS:
        _, packed, _, _, _ = case(spec)
        calls.clear()
        for dtype in DTYPES:
            got = dequantize_4bit(packed, spec, SHAPE, dtype)
            absmax = dequantize_absmax(packed)
            assert torch.equal(got, reference(packed.codes, absmax, spec, SHAPE, dtype))
        assert len(calls) == len(DTYPES)


def test_without_bitsandbytes_the_reference_runs(monkeypatch):
    spec = Spec4bit()
    _, packed, _, _, _ = case(spec)
    expected = dequantize_4bit(packed, spec, SHAPE, torch.bfloat16)
    nf4._compiled.cache_clear()
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    try:
        assert nf4._compiled(torch.device("cpu")) is None
        assert torch.equal(dequantize_4bit(packed, spec, SHAPE, torch.bfloat16), expected)
    finally:
        nf4._compiled.cache_clear()


def test_an_operator_with_other_results_is_refused():
    def off_by_one(codes, absmax, size, kind, shape, dtype):
        right = reference(codes.view(-1), absmax, Spec4bit(kind, size, False), shape, dtype)
        right[-1, -1] += 1
        return right

    assert not nf4._self_test(off_by_one, torch.device("cpu"))


def test_importing_needs_no_bitsandbytes():
    code = "import sys, qat_kernels.nf4; assert 'bitsandbytes' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_what_does_not_fit_is_refused():
    spec = Spec4bit()
    x, packed, _, bias, _ = case(spec)
    with pytest.raises(ValueError, match=r"a weight \(96, 161\) as Spec4bit"):
        dequantize_4bit(packed, spec, (96, 161), torch.float32)
    with pytest.raises(ValueError, match="consists of"):
        dequantize_4bit(packed, Spec4bit(double_quant=False), SHAPE, torch.float32)
    with pytest.raises(ValueError, match=r"do not fit a weight \(96, 160\)"):
        linear_4bit(x[..., :-1], packed, spec, SHAPE, torch.float32)
    with pytest.raises(ValueError, match="do not fit"):
        linear_4bit(x, packed, spec, SHAPE, torch.float32, bias[:-1])


def test_input_of_other_kinds_is_refused():
    spec = Spec4bit()
    x, packed, _, _, _ = case(spec)
    with pytest.raises(ValueError, match=r"x is torch\.int64 on cpu: expected floats on cpu"):
        linear_4bit(x.long(), packed, spec, SHAPE, torch.float32)
    with pytest.raises(ValueError, match="expected floats on cpu, where the weight is"):
        linear_4bit(x.to("meta"), packed, spec, SHAPE, torch.float32)
    with pytest.raises(ValueError, match=r"x \(\) and bias None"):
        linear_4bit(torch.tensor(1.0), packed, spec, SHAPE, torch.float32)


def test_the_path_is_explained(monkeypatch):
    choice = explain("nf4", (1, 4096, 4096))
    assert str(choice) == "reference: Triton kernels are for CUDA, this is cpu"
    monkeypatch.setattr(nf4, "kernels_run_on", lambda device: None)
    shape = (1, 4096, 4096)
    assert explain("nf4", shape).path == "fused"
    assert explain("nf4", (8, 4096, 4096), decode=True).path == "fused"
    for options, why in (
        ({"shape": (8, 4096, 4096)}, "many tokens"),
        ({"decode": False}, "many tokens"),
        ({"dtype": "float32"}, "takes bfloat16 and float16"),
        ({"dtype": "float16", "weight_dtype": "bfloat16"}, "cast to torch.float16"),
        ({"block_size": 32}, "blocks of at least 64"),
        ({"shape": (1, 4096, 4000)}, "multiples of 64"),
    ):
        choice = explain("nf4", **{"shape": shape, **options})
        assert choice.path == "dequantize"
        assert why in choice.reason
    with pytest.raises(ValueError, match="block_size=63"):
        explain("nf4", shape, block_size=63)
    with pytest.raises(ValueError, match=r"shape=\(1, 2\)"):
        explain("nf4", (1, 2))


@pytest.mark.parametrize(
    ("shape", "decodes"),
    [((5,), True), ((1, 5), True), ((4, 1, 5), True), ((4, 5), False), ((1, 2, 5), False)],
)
def test_one_token_per_sequence_is_decoding(shape, decodes):
    assert nf4.decodes(torch.empty(shape)) == decodes


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_cuda_dequantizes_to_the_same_bits(spec):
    _, packed, _, _, _ = case(spec)
    moved = nf4.Packed4bit(*(None if t is None else t.cuda() for t in packed))
    for dtype in DTYPES:
        expected = dequantize_4bit(packed, spec, SHAPE, dtype)
        assert torch.equal(dequantize_4bit(moved, spec, SHAPE, dtype).cpu(), expected)
        absmax = dequantize_absmax(moved)
        plain = reference(moved.codes, absmax, spec, SHAPE, dtype)
        assert torch.equal(plain.cpu(), expected)
