"""W8A8 linear: integer paths against the reference with equality, fp32 against the fake-quant."""

import copy
import pickle
from itertools import product

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from qat_kernels import explain, w8a8
from qat_kernels.numerics import (
    QuantSpec,
    compute_scale,
    dequantize,
    fake_quantize_with,
    quantize,
    token_scale,
)
from qat_kernels.w8a8 import InputReuse, linear, prepare, reference

vnni = pytest.mark.skipif(
    not torch.cpu._is_vnni_supported(), reason="exact int8 sums take AVX512-VNNI"
)
SHAPES = [(1, 64, 128), (2, 33, 37), (5, 1, 64), (16, 40, 1), (17, 96, 2048)]
"""(M, N, K): sizes off every block of the op, one feature in, one out, sums above 2^24."""


class Case:
    """Int8 weights and activations: codes [N, K], scale, x [M, K], bias."""

    def __init__(self, m: int, n: int, k: int, dtype: torch.dtype, whole: bool = False) -> None:
        generator = torch.Generator().manual_seed(1000 * m + n + k)
        spec = QuantSpec(bits=8, granularity="tensor" if whole else "channel", grid="absmax")
        weight = torch.randn(n, k, generator=generator)
        self.scale, _ = compute_scale(weight, spec)
        self.codes = quantize(weight, self.scale, None, spec)
        self.x = torch.randn(m, k, generator=generator).to(dtype)
        self.bias = torch.randn(n, generator=generator).to(dtype)
        self.input_scale = torch.tensor([0.0173])
        self.dtype = dtype

    def prepare(self, static: bool = False, path: w8a8.Path | None = None) -> w8a8.PackedInt8:
        scale = self.input_scale if static else None
        return prepare(self.codes, self.scale, None, scale, dtype=self.dtype, path=path)


# ---------------------------------------------------------------------------- activations


def special_rows(dtype: torch.dtype) -> Tensor:
    """Rows of ties, zeros, tiny and huge values, and one number."""
    largest = torch.finfo(dtype).max
    ties = torch.arange(-128, 128) * 0.5
    rows = [ties, torch.zeros(256), torch.full((256,), largest), torch.full((256,), -largest)]
    rows += [torch.linspace(-1, 1, 256) * torch.finfo(dtype).tiny, torch.eye(256)[3] * -7]
    rows += [torch.randn(256, generator=torch.Generator().manual_seed(s)) * 9 for s in range(50)]
    return torch.stack(rows).to(dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("static", [None, 0.5, 0.0173, 1e-30, 1e30])
def test_codes_are_those_of_numerics(dtype: torch.dtype, static: float | None) -> None:
    x = special_rows(dtype)
    scale = None if static is None else torch.tensor([static])
    q, s = w8a8.codes_and_scale(x, scale)
    shifted, found = w8a8.quantize_shifted(x, scale)
    torch.testing.assert_close(shifted.to(torch.int16) - 128, q.to(torch.int16), atol=0, rtol=0)
    torch.testing.assert_close(found, s, atol=0, rtol=0)
    # codes times scale are what the fake-quant module computes with
    given = token_scale(x) if scale is None else scale
    expected = fake_quantize_with(x, given, w8a8.INPUT)[0]
    torch.testing.assert_close(q.to(torch.float32) * s, expected, atol=0, rtol=0)


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_values_that_are_no_numbers_stay_none(bad: float, static: bool) -> None:
    case = Case(3, 8, 64, torch.bfloat16)
    case.x[1, 5] = bad
    packed = case.prepare(static)
    y = linear(case.x, packed)
    # like compressed-tensors, the fake-quant arithmetic clamps infinity where the scale is given
    clamped = static and bad == float("inf") and packed.path == "dequantize"
    assert bool(y[1].isfinite().any()) == clamped
    assert bool(y[::2].isfinite().all())


# ---------------------------------------------------------------------------- the product


@vnni
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("static", "whole"), list(product([False, True], repeat=2)))
@pytest.mark.parametrize(("m", "n", "k"), SHAPES)
def test_integers_equal_the_reference(
    m: int, n: int, k: int, static: bool, whole: bool, dtype: torch.dtype
) -> None:
    case = Case(m, n, k, dtype, whole)
    packed = case.prepare(static)
    assert packed.path == "onednn"
    scale = case.input_scale if static else None
    for bias in (None, case.bias):
        expected = reference(case.x, case.codes, case.scale, bias, scale)
        torch.testing.assert_close(linear(case.x, packed, bias), expected, atol=0, rtol=0)


@vnni
def test_sums_beyond_the_integers_of_fp32() -> None:
    k = 8192
    codes = torch.full((32, k), -128, dtype=torch.int8)
    codes[:, 1:][:, ::3] = 127
    x = torch.full((3, k), -1.0)
    x[1, ::2], x[2, ::5] = 1.0, 0.3
    x = x.to(torch.bfloat16)
    scale = torch.rand(32, 1, generator=torch.Generator().manual_seed(0))
    sums = w8a8.codes_and_scale(x, None)[0].long() @ codes.long().T
    assert int(sums.abs().max()) > 2**24
    expected = reference(x, codes, scale)
    torch.testing.assert_close(linear(x, prepare(codes, scale)), expected, atol=0, rtol=0)


@pytest.mark.parametrize("path", [pytest.param("onednn", marks=vnni), "dequantize"])
def test_a_row_does_not_depend_on_the_others(path: w8a8.Path) -> None:
    # many features in and out: where the matmuls of one row and of many differ in some bits
    case = Case(33, 512, 2048, torch.bfloat16)
    packed = case.prepare(path=path)
    together = linear(case.x, packed)
    for m in (1, 2, 4, 16):
        parts = torch.cat([linear(part, packed) for part in case.x.split(m)])
        torch.testing.assert_close(parts, together, atol=0, rtol=0)


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("group", [None, 32])
@pytest.mark.parametrize("symmetric", [True, False])
def test_fp32_is_the_fake_quant_layer_bit_for_bit(
    group: int | None, symmetric: bool, static: bool
) -> None:
    case = Case(6, 24, 96, torch.float32)
    spec = QuantSpec(
        bits=8,
        granularity="channel" if group is None else "group",
        group_size=group or 32,
        grid="absmax",
        symmetric=symmetric,
    )
    weight = torch.randn(24, 96, generator=torch.Generator().manual_seed(1))
    scale, zero = compute_scale(weight, spec)
    codes = quantize(weight, scale, zero, spec)
    input_scale = case.input_scale if static else None
    packed = prepare(codes, scale, zero, input_scale, dtype=torch.float32)
    assert packed.path == "dequantize"
    s_x = case.input_scale if static else token_scale(case.x)
    x_hat = fake_quantize_with(case.x, s_x, w8a8.INPUT)[0]
    expected = functional.linear(x_hat, dequantize(codes, scale, zero), case.bias)
    torch.testing.assert_close(linear(case.x, packed, case.bias), expected, atol=0, rtol=0)
    # the integers, which round elsewhere: 2 K eps of the sum of magnitudes
    if group is None and symmetric:
        size = x_hat.abs() @ dequantize(codes, scale, None).abs().T + case.bias.abs()
        difference = reference(case.x, codes, scale, case.bias, input_scale) - expected
        assert bool((difference.abs() <= 2 * (96 + 4) * 2.0**-24 * size).all())


def test_what_integers_cannot_do_is_dequantized() -> None:
    case = Case(4, 24, 96, torch.bfloat16)
    grouped = prepare(case.codes, case.scale.expand(-1, 3).contiguous())
    assert grouped.path == "dequantize"
    y = linear(case.x, grouped, case.bias)
    # rounded to bf16: activations, weights, result
    exact = reference(case.x.float(), case.codes, case.scale, case.bias)
    size = case.x.float().abs() @ dequantize(case.codes, case.scale, None).abs().T
    bound = 1.01 * (2 * 2.0**-8 * size + 2.0**-8 * exact.abs()) + 2.0**-8 * case.bias.abs()
    assert bool(((y.float() - exact).abs() <= bound).all())


@vnni
def test_a_shared_input_is_quantized_once(monkeypatch: pytest.MonkeyPatch) -> None:
    case, reuse = Case(4, 24, 96, torch.bfloat16), InputReuse()
    packed, x = case.prepare(), case.x
    calls = []
    real = w8a8.quantize_shifted
    monkeypatch.setattr(w8a8, "quantize_shifted", lambda *a: calls.append(1) or real(*a))
    expected = linear(x, packed)
    with torch.no_grad():
        for _ in range(3):
            assert torch.equal(linear(x, packed, None, reuse), expected)
        assert len(calls) == 2
        # an equal tensor is another tensor, and a changed one is no longer the same
        linear(x.clone(), packed, None, reuse)
        linear(x, packed, None, reuse)
        x.mul_(2)
        assert torch.equal(linear(x, packed, None, reuse), linear(x, packed))
    assert len(calls) == 6
    with torch.inference_mode():
        x = x + 1
        for _ in range(2):
            before = linear(x, packed, None, reuse)
            x.mul_(-1)
            assert torch.equal(linear(x, packed, None, reuse), linear(x, packed))
            assert not torch.equal(before, linear(x, packed))


@vnni
def test_no_input_is_kept_alive() -> None:
    case, reuse = Case(4, 24, 96, torch.bfloat16), InputReuse()
    packed, x = case.prepare(), case.x.clone()
    with torch.no_grad():
        linear(x, packed, None, reuse)
        assert reuse._last is not None
        for copied in (copy.deepcopy(reuse), pickle.loads(pickle.dumps(reuse))):
            assert copied._last is None
        # the end of an input that is not the last one takes nothing away
        other = x.clone()
        linear(other, packed, None, reuse)
        del x
        assert reuse._last is not None
        del other
    assert reuse._last is None


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("path", [None, "dequantize"])
def test_copies_and_pickles(path: w8a8.Path | None, whole: bool, static: bool) -> None:
    case = Case(3, 40, 96, torch.bfloat16, whole)
    packed = case.prepare(static, path)
    expected = linear(case.x, packed, case.bias)
    for copied in (copy.deepcopy(packed), pickle.loads(pickle.dumps(packed))):
        assert copied.path == packed.path
        torch.testing.assert_close(linear(case.x, copied, case.bias), expected, atol=0, rtol=0)


# ---------------------------------------------------------------------------- inputs, operator


def test_shapes_of_the_input() -> None:
    case = Case(6, 24, 64, torch.bfloat16)
    packed = case.prepare()
    flat = linear(case.x, packed)
    cubic = linear(case.x.view(2, 3, 64), packed)
    torch.testing.assert_close(cubic, flat.view(2, 3, 24), atol=0, rtol=0)
    strided = torch.stack((case.x, case.x), -1)[..., 0]
    assert not strided.is_contiguous()
    torch.testing.assert_close(linear(strided, packed), flat, atol=0, rtol=0)
    turned = case.x.T.contiguous().T
    torch.testing.assert_close(linear(turned, packed), flat, atol=0, rtol=0)
    torch.testing.assert_close(linear(case.x[0], packed), flat[0], atol=0, rtol=0)
    # not aligned to 16 bytes
    shifted = torch.cat((case.x.flatten()[:1], case.x.flatten()))[1:].view(6, 64)
    torch.testing.assert_close(linear(shifted, packed), flat, atol=0, rtol=0)
    for path in (None, "dequantize"):
        assert tuple(linear(case.x[:0], case.prepare(path=path)).shape) == (0, 24)


def test_wrong_input_is_a_value_error() -> None:
    case = Case(2, 24, 64, torch.bfloat16)
    packed = case.prepare()
    with pytest.raises(ValueError, match=r"x is torch\.float32"):
        linear(case.x.float(), packed)
    with pytest.raises(ValueError, match="K = 32, not 64"):
        linear(case.x[:, :32], packed)
    with pytest.raises(ValueError, match="bias"):
        linear(case.x, packed, torch.zeros(3))
    with pytest.raises(ValueError, match="codes: int8"):
        prepare(case.codes.int(), case.scale)
    for scale in (case.scale[:5], case.scale[:, 0], case.scale.expand(-1, 3), case.scale.int()):
        with pytest.raises(ValueError, match="scale: a float tensor"):
            prepare(case.codes, scale)
    with pytest.raises(ValueError, match="zero point"):
        prepare(case.codes, case.scale, case.scale)
    for wrong in (torch.zeros(1), torch.tensor(float("nan")), torch.ones(2)):
        with pytest.raises(ValueError, match="input_scale"):
            prepare(case.codes, case.scale, None, wrong)
    with pytest.raises(ValueError, match="dtype"):
        prepare(case.codes, case.scale, dtype=torch.float64)
    with pytest.raises(ValueError, match="path=onednn: integer sums cannot cross zero points"):
        prepare(case.codes, case.scale, torch.zeros(24, 1, dtype=torch.int8), path="onednn")


def test_choices_are_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    shape = (1, 64, 64)
    if torch.cpu._is_vnni_supported():
        for m in (1, 8, 4096):
            assert explain("w8a8", (m, 64, 64), "cpu").path == "onednn"
        assert explain("w8a8", (1, 64, w8a8.MAX_K), "cpu").path == "onednn"
        assert "int32" in explain("w8a8", (1, 64, w8a8.MAX_K + 1), "cpu").reason
    for options, why in (
        ({"dtype": "float32"}, "exact reference"),
        ({"group_size": 32}, "groups of 32"),
        ({"symmetric": False}, "zero points"),
    ):
        choice = explain("w8a8", shape, "cpu", **options)
        assert choice.path == "dequantize"
        assert why in choice.reason
    with pytest.raises(ValueError, match="group_size=48"):
        explain("w8a8", shape, "cpu", group_size=48)
    monkeypatch.setattr(w8a8, "_onednn_is_exact", lambda: False)
    monkeypatch.setattr(torch.cpu, "_is_vnni_supported", lambda: True)
    assert "self-test" in explain("w8a8", shape, "cpu").reason
    monkeypatch.setattr(torch.cpu, "_is_vnni_supported", lambda: False)
    assert "AVX512-VNNI" in explain("w8a8", shape, "cpu").reason


@vnni
def test_the_self_test_finds_a_wrong_op(monkeypatch: pytest.MonkeyPatch) -> None:
    real = w8a8._qlinear
    w8a8._onednn_is_exact.cache_clear()
    try:
        monkeypatch.setattr(w8a8, "_qlinear", lambda *a: real(*a) * (1 + 2.0**-23))
        assert not w8a8._onednn_is_exact()
    finally:
        w8a8._onednn_is_exact.cache_clear()


def test_operator_registration() -> None:
    case = Case(3, 24, 64, torch.bfloat16)
    p = case.prepare(static=True, path="dequantize")
    arguments = (case.x, p.codes, p.scale, p.zero_point, case.bias, p.input_scale, p.path)
    # the schema, the fake kernel and the dispatch, without gradients (there are none). They cannot
    # read oneDNN's opaque weights, which the next test compiles with
    utils = ("test_schema", "test_faketensor", "test_aot_dispatch_static")
    torch.library.opcheck(w8a8.w8a8_linear, arguments, test_utils=utils)


@pytest.mark.parametrize("static", [False, True])
def test_compiled_without_a_break(static: bool) -> None:
    case = Case(3, 24, 64, torch.bfloat16)
    packed, reuse = case.prepare(static), InputReuse()
    run = torch.compile(
        lambda x: linear(x, packed, case.bias, reuse), fullgraph=True, backend="aot_eager"
    )
    with torch.no_grad():
        torch.testing.assert_close(run(case.x), linear(case.x, packed, case.bias), atol=0, rtol=0)


def test_backward_says_what_to_do() -> None:
    case = Case(3, 24, 64, torch.bfloat16)
    y = linear(case.x.requires_grad_(), case.prepare(), None, InputReuse())
    with pytest.raises(RuntimeError, match="no backward"):
        y.sum().backward()
