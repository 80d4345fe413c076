"""Activation quantization: the kernel against the reference, the reference against `numerics`."""

import re
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qat_kernels import activation_quant
from qat_kernels.activation_quant import (
    MAX_FEATURES,
    check,
    choose,
    launch,
    quantize_activation,
    quantize_activation_op,
    reference,
    rms_norm,
)
from qat_kernels.aot import compile_shipped
from qat_kernels.numerics import QuantSpec, fake_quantize_with, token_scale
from tests.kernels.interpreter import compiled, interpreted, passed_in_the_interpreter

CPU = torch.device("cpu")
FORMATS = ["int8", "e4m3"]
TYPES = [torch.float32, torch.bfloat16, torch.float16]
INT8 = QuantSpec(bits=8, granularity="token", dynamic=True, grid="absmax")


def values(rows: int, k: int, dtype: torch.dtype) -> torch.Tensor:
    generator = torch.Generator().manual_seed(rows + k)
    x = torch.randn(rows, k, generator=generator)
    # an outlier, a row of zeros, tiny rows, huge rows
    x[0, k // 2] = 50.0
    if rows > 3:
        x[1] = 0.0
        x[2] *= 1e-6
        x[3] *= 1e3
    return x.to(dtype)


@compiled
@pytest.mark.parametrize("dtype", TYPES)
def test_int8_is_the_one_quantizer(dtype: torch.dtype) -> None:
    x = values(9, 100, dtype)
    codes, scale = reference(x)
    assert torch.equal(scale, token_scale(x))
    assert torch.equal(codes.float() * scale, fake_quantize_with(x, scale, INT8)[0])
    static = torch.tensor(0.03)
    codes, found = reference(x, static)
    assert torch.equal(codes.float() * static, fake_quantize_with(x, static, INT8)[0])
    assert torch.equal(found, static)


@compiled
def test_e4m3_never_overflows() -> None:
    codes, _ = reference(values(9, 64, torch.float32), to="e4m3")
    assert codes.dtype == torch.float8_e4m3fn
    assert bool(codes.float().isfinite().all())
    assert float(codes.float().abs().max()) == 448.0
    codes, _ = reference(torch.tensor([[1e30, -1e30, 0.0]]), torch.tensor(1.0), to="e4m3")
    assert codes.float().tolist() == [[448.0, -448.0, 0.0]]


@compiled
@pytest.mark.parametrize("dtype", TYPES)
def test_the_norm_is_that_of_transformers(dtype: torch.dtype) -> None:
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    norm = LlamaRMSNorm(64, eps=1e-5).to(dtype)
    with torch.no_grad():
        norm.weight.copy_(torch.randn(64, generator=torch.Generator().manual_seed(0)))
    x = values(5, 64, dtype)
    assert torch.equal(rms_norm(x, norm.weight, 1e-5), norm(x))


@interpreted
@pytest.mark.parametrize("to", FORMATS)
def test_the_self_test_passes(to: str) -> None:
    assert check(CPU, to)


@interpreted
@pytest.mark.parametrize("to", FORMATS)
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize(("rows", "k"), [(1, 1), (5, 33), (4, 513), (2, 4097)])
def test_kernel_equals_the_reference(rows: int, k: int, dtype: torch.dtype, to: str) -> None:
    x = values(rows, k, dtype)
    for scale in (None, torch.tensor(0.037)):
        codes, found = launch(x, scale, None, 0.0, to)
        expected, expected_scale = reference(x, scale, to=to)
        assert torch.equal(codes.float(), expected.float())
        assert torch.equal(found, expected_scale)


@interpreted
@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1, max_size=9))
def test_kernel_equals_the_reference_on_any_finite_row(row: list[float]) -> None:
    x = torch.tensor([row])
    codes, scale = launch(x, None, None, 0.0, "int8")
    expected, expected_scale = reference(x)
    assert torch.equal(scale, expected_scale)
    assert torch.equal(codes, expected)


@interpreted
@pytest.mark.parametrize("to", FORMATS)
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("norm", [False, True])
def test_a_nan_reaches_the_scale_of_its_row_only(dtype: torch.dtype, to: str, norm: bool) -> None:
    x = values(3, 40, dtype)
    weight = torch.ones(40, dtype=dtype) if norm else None
    clean = launch(x, None, weight, 1e-5, to)
    # the NaN that arithmetic makes on a GPU
    ones = torch.tensor(0x7FFFFFFF, dtype=torch.int32).view(torch.float32)
    for bad in (ones, torch.tensor(float("inf"))):
        x[1, 7] = bad
        with warnings.catch_warnings():
            # numpy's, when the interpreter converts NaN to an integer
            warnings.simplefilter("ignore", RuntimeWarning)
            codes, scale = launch(x, None, weight, 1e-5, to)
            expected, expected_scale = reference(x, None, weight, 1e-5, to=to)
        for rows in ([0], [2]):
            assert torch.equal(codes[rows].float(), clean[0][rows].float())
            assert torch.equal(scale[rows], clean[1][rows])
        assert torch.equal(scale[1].isnan(), expected_scale[1].isnan())
        assert not scale[1].isfinite()
        if to == "e4m3":
            assert torch.equal(codes[1].float().isnan(), expected[1].float().isnan())


@interpreted
def test_rounding_keeps_every_nan() -> None:
    """The bf16 of a NaN of many ones overflows into the sign, and would be -0.0."""
    x = torch.ones(1, 8, dtype=torch.bfloat16)
    weight = x[0].clone()
    weight[3] = torch.tensor(0x7FFF, dtype=torch.int16).view(torch.bfloat16)
    assert launch(x, None, weight, 1e-5, "e4m3")[1].isnan().all()


@interpreted
def test_a_weight_of_any_stride() -> None:
    x = values(3, 40, torch.float32).sign()
    weight = torch.rand(80)[::2]
    codes, scale = launch(x, None, weight, 1e-30, "int8")
    expected = launch(x, None, weight.clone(), 1e-30, "int8")
    assert torch.equal(codes, expected[0])
    assert torch.equal(scale, expected[1])


@compiled
def test_nan_is_kept_by_the_machine_too() -> None:
    """The interpreter's minimum and maximum always keep NaN; a GPU's do where asked."""
    pytest.importorskip("triton")
    for item in activation_quant.shipped():
        ptx = compile_shipped(item, 90).asm["ptx"]
        kinds = re.findall(r"\b(?:min|max)\.[\w.]*f32", ptx)
        assert kinds
        assert all(".NaN." in kind for kind in kinds), kinds


@interpreted
@pytest.mark.parametrize("dtype", TYPES)
def test_norm_is_exact_where_sums_are(dtype: torch.dtype) -> None:
    # squares sum to K: the mean is 1 in any order, and eps is lost beside it
    signs = torch.randint(0, 2, (7, 256), generator=torch.Generator().manual_seed(1)) * 2 - 1
    x = signs.to(dtype)
    weight = torch.linspace(-2, 2, 256).to(dtype)
    codes, scale = launch(x, None, weight, 1e-30, "int8")
    expected, expected_scale = reference(x, None, weight, 1e-30)
    assert torch.equal(codes, expected)
    assert torch.equal(scale, expected_scale)


@interpreted
def test_norm_differs_by_the_order_of_a_sum_only() -> None:
    """A sum of K squares in another order moves the mean by at most K 2^-24 relative, and so its
    root and the row by half of that; with 4 more roundings y and the scale differ by at most
    e = (K / 2 + 6) 2^-24, relatively. A quotient of at most 128 moves by 256 e + 2^-16 < 1/2, so a
    code moves by at most one, and only beside a rounding border."""
    x = values(6, 300, torch.float32)
    weight = torch.linspace(0.5, 2, 300)
    codes, scale = launch(x, None, weight, 1e-5, "int8")
    expected, expected_scale = reference(x, None, weight, 1e-5)
    e = (300 / 2 + 6) * 2.0**-24
    assert bool(((scale - expected_scale).abs() <= 2 * e * expected_scale).all())
    quotient = rms_norm(x, weight, 1e-5) / expected_scale
    border = (quotient - quotient.floor() - 0.5).abs() <= 256 * e + 2.0**-16
    differ = codes != expected
    assert not bool((differ & ~border).any())
    assert int((codes.int() - expected.int()).abs().max()) <= 1


@compiled
def test_in_the_interpreter() -> None:
    assert passed_in_the_interpreter(__file__) == 46


@compiled
@pytest.mark.parametrize("to", FORMATS)
def test_operator_registration(to: str) -> None:
    x, weight = values(4, 32, torch.bfloat16), torch.ones(32, dtype=torch.bfloat16)
    utils = ("test_schema", "test_faketensor", "test_aot_dispatch_static")
    for arguments in ((x, None, None, 1e-6, to), (x, torch.tensor(0.1), weight, 1e-6, to)):
        torch.library.opcheck(quantize_activation_op, arguments, test_utils=utils)


@compiled
def test_under_compile() -> None:
    x = values(4, 32, torch.bfloat16)
    compiled_op = torch.compile(quantize_activation, fullgraph=True, backend="eager")
    for got, expected in zip(compiled_op(x), quantize_activation(x)):
        assert torch.equal(got, expected)


@compiled
def test_shapes() -> None:
    x = values(6, 40, torch.float32)
    codes, scale = quantize_activation(x.view(2, 3, 40))
    assert tuple(codes.shape) == (2, 3, 40)
    assert tuple(scale.shape) == (2, 3, 1)
    assert torch.equal(codes.view(6, 40), reference(x)[0])
    for strided in (torch.stack((x, x), -1)[..., 0], x.t().contiguous().t()):
        assert not strided.is_contiguous()
        codes, scale = quantize_activation(strided)
        assert torch.equal(codes, reference(x)[0])
        # as the fake operator says, whatever the layout of x
        assert codes.is_contiguous()
        assert scale.is_contiguous()
    codes, scale = quantize_activation(x[:0])
    assert tuple(codes.shape) == (0, 40)
    assert tuple(scale.shape) == (0, 1)


@compiled
def test_wrong_input_is_a_value_error() -> None:
    x = torch.ones(2, 8)
    with pytest.raises(ValueError, match=r"torch\.int64"):
        quantize_activation(x.long())
    with pytest.raises(ValueError, match=r"\(2, 0\)"):
        quantize_activation(x[:, :0])
    with pytest.raises(ValueError, match="one fp32 value"):
        quantize_activation(x, torch.ones(2))
    with pytest.raises(ValueError, match="one fp32 value"):
        quantize_activation(x, torch.tensor(1))
    with pytest.raises(ValueError, match="K = 8 weights"):
        quantize_activation(x, weight=torch.ones(7))
    with pytest.raises(ValueError, match="to=int4"):
        quantize_activation(x, to="int4")  # type: ignore[arg-type]


def test_the_choice_and_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    assert choose((2, 64), CPU).path == "reference"
    monkeypatch.setattr(activation_quant, "kernels_run_on", lambda device: None)
    monkeypatch.setattr(activation_quant, "capability_of", lambda device: (8, 0))
    cuda = torch.device("cuda")
    assert choose((2, 64), cuda).path == "triton"
    assert choose((2, MAX_FEATURES + 1), cuda).path == "reference"
    assert choose((2, 64), cuda, to="e4m3").reason == "this GPU has no FP8"
    with pytest.raises(ValueError, match="to=int4"):
        choose((2, 64), CPU, to="int4")  # type: ignore[arg-type]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("to", FORMATS)
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize(("rows", "k"), [(1, 1), (5, 33), (4, 513), (3, 20000)])
def test_kernel_on_the_gpu(rows: int, k: int, dtype: torch.dtype, to: str) -> None:
    if choose((rows, k), torch.device("cuda"), to=to).path != "triton":
        pytest.skip("no FP8 here")
    x = values(rows, k, dtype).cuda()
    for scale in (None, torch.tensor(0.037, device="cuda")):
        codes, found = quantize_activation(x, scale, to=to)
        expected, expected_scale = reference(x, scale, to=to)
        assert torch.equal(codes.float(), expected.float())
        assert torch.equal(found, expected_scale)
