"""Matmul of int8 and FP8 codes: the kernel against the reference, that against integers."""

from dataclasses import replace

import pytest
import torch

from qat_kernels import scaled_matmul as module
from qat_kernels.aot import compile_shipped
from qat_kernels.scaled_matmul import (
    DECODE,
    MAX_INT8_FEATURES,
    PREFILL,
    Tile,
    check,
    choose,
    launch,
    reference,
    scaled_matmul,
    scaled_matmul_op,
    tile,
)
from tests.kernels.interpreter import compiled, interpreted, passed_in_the_interpreter

CPU = torch.device("cpu")
INT8, E4M3 = torch.int8, torch.float8_e4m3fn
SHAPES = [(1, 7, 16), (3, 40, 33), (17, 65, 200), (5, 16, 513)]
SMALL = Tile(16, 32, 64, 2, 1)
"""A tile in which the interpreter needs little time."""


class Case:
    """Random codes and scales; bias [N]."""

    def __init__(self, m: int, n: int, k: int, dtype: torch.dtype) -> None:
        generator = torch.Generator().manual_seed(m + n + k)
        if dtype == INT8:
            # +-64: the emulated fp32 sums of 513 products stay below 2^24 in magnitude
            self.x = torch.randint(-64, 65, (m, k), generator=generator).to(INT8)
            self.w = torch.randint(-64, 65, (n, k), generator=generator).to(INT8)
        else:
            self.x = torch.randn(m, k, generator=generator).to(E4M3)
            self.w = torch.randn(n, k, generator=generator).to(E4M3)
        self.x_scale = torch.rand(m, 1, generator=generator) + 0.5
        self.w_scale = torch.rand(n, 1, generator=generator) + 0.5
        self.bias = torch.randn(n, generator=generator)

    def arguments(self) -> tuple[torch.Tensor, ...]:
        return self.x, self.x_scale, self.w, self.w_scale, self.bias

    def cuda(self) -> tuple[torch.Tensor, ...]:
        return tuple(tensor.cuda() for tensor in self.arguments())

    def check_bound(self, y: torch.Tensor) -> None:
        """e4m3: |y - exact| <= (2 K 2^-14 + K 2^-24) sum|x w| s + 4 roundings of 2^-24, once 2^-8.

        A product of two e4m3 numbers has at most 8 bits. Hopper aligns the products of an
        instruction to the largest with at least 13 fraction bits and truncates, so each product
        and each addition loses less than 2^-13 = 2 * 2^-14 of the largest; fp32 adds 2^-24 each.
        """
        k = self.x.shape[1]
        scales = self.x_scale.double() * self.w_scale.double().T
        exact = self.x.double() @ self.w.double().T * scales + self.bias.double()
        size = self.x.double().abs() @ self.w.double().abs().T * scales
        size = size + self.bias.double().abs()
        slack = (2 * k * 2.0**-14 + (k + 4) * 2.0**-24) * size
        bound = slack + 1.01 * 2.0**-8 * (exact.abs() + slack)
        assert bool(((y.double() - exact).abs() <= bound).all())


@compiled
def test_int8_is_exact_up_to_the_longest_row() -> None:
    x = torch.full((1, MAX_INT8_FEATURES), -128, dtype=INT8)
    one = torch.ones(1)
    y = reference(x, one, x, one, dtype=torch.float32)
    # 2^31 - 2^14, rounded to fp32
    assert float(y) == float(torch.tensor(MAX_INT8_FEATURES * 128 * 128, dtype=torch.float32))


@compiled
@pytest.mark.parametrize(("m", "n", "k"), SHAPES)
def test_int8_epilogue_in_the_order_written(m: int, n: int, k: int) -> None:
    case = Case(m, n, k, INT8)
    total = (case.x.long() @ case.w.long().T).float()
    expected = total * case.w_scale.T * case.x_scale + case.bias
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        y = reference(*case.arguments(), dtype=dtype)
        assert torch.equal(y, expected.to(dtype))


@interpreted
@pytest.mark.parametrize("dtype", [INT8, E4M3])
def test_the_self_test_passes(dtype: torch.dtype) -> None:
    assert check(CPU, dtype)


@interpreted
@pytest.mark.parametrize(("m", "n", "k"), SHAPES)
@pytest.mark.parametrize("scales", ["rows", "one"])
def test_int8_kernel_equals_the_reference(m: int, n: int, k: int, scales: str) -> None:
    case = Case(m, n, k, INT8)
    if scales == "one":
        case.x_scale, case.w_scale = torch.tensor([[0.3]]), torch.tensor([[0.7]])
    for dtype in (torch.float32, torch.float16):
        y = launch(*case.arguments(), dtype, SMALL)
        assert torch.equal(y, reference(*case.arguments(), dtype=dtype))
        y = launch(*case.arguments()[:4], None, dtype, SMALL)
        assert torch.equal(y, reference(*case.arguments()[:4], dtype=dtype))


@interpreted
def test_scales_and_bias_of_any_stride() -> None:
    case = Case(5, 40, 33, INT8)
    case.x_scale = torch.rand(5, 2)[:, 1:]
    case.w_scale = torch.tensor([[0.7]]).expand(40, 1)
    case.bias = torch.rand(80)[::2]
    y = launch(*case.arguments(), torch.float32, SMALL)
    assert torch.equal(y, reference(*case.arguments(), dtype=torch.float32))


@compiled
def test_the_epilogue_is_not_fused() -> None:
    """A fused multiply-add would round once where the reference rounds twice."""
    pytest.importorskip("triton")
    for item in module.shipped():
        if "decode" in item.name:
            ptx = compile_shipped(item, 90).asm["ptx"]
            assert "mul.rn.f32" in ptx
            assert "fma.rn.f32" not in ptx
    fused = compile_shipped(replace(next(iter(module.shipped())), fp_fusion=True), 90).asm["ptx"]
    assert "fma.rn.f32" in fused


@interpreted
@pytest.mark.parametrize(("m", "n", "k"), SHAPES)
def test_e4m3_kernel_within_the_derived_bound(m: int, n: int, k: int) -> None:
    case = Case(m, n, k, E4M3)
    case.check_bound(launch(*case.arguments(), torch.bfloat16, SMALL))
    case.check_bound(reference(*case.arguments()))


@compiled
def test_in_the_interpreter() -> None:
    assert passed_in_the_interpreter(__file__) == 17


@compiled
@pytest.mark.parametrize("dtype", [INT8, E4M3])
def test_operator(dtype: torch.dtype) -> None:
    case = Case(6, 24, 32, dtype)
    # torch's schema test multiplies its inputs, which FP8 tensors cannot
    utils = ["test_schema"] * (dtype == INT8) + ["test_faketensor", "test_aot_dispatch_static"]
    arguments = (*case.arguments(), torch.bfloat16, True)
    torch.library.opcheck(scaled_matmul_op, arguments, test_utils=utils)
    flat = scaled_matmul(*case.arguments())
    x, scale = case.x.view(2, 3, 32), case.x_scale.view(2, 3, 1)
    compiled_op = torch.compile(scaled_matmul, fullgraph=True, backend="eager")
    for op in (scaled_matmul, compiled_op):
        y = op(x, scale, case.w, case.w_scale, case.bias)
        assert tuple(y.shape) == (2, 3, 24)
        assert torch.equal(y.flatten(0, 1), flat)
    empty = scaled_matmul(case.x[:0], case.x_scale[:0], case.w, case.w_scale)
    assert tuple(empty.shape) == (0, 24)
    assert tuple(scaled_matmul(case.x, case.x_scale, case.w[:0], case.w_scale[:0]).shape) == (6, 0)
    strided = torch.stack((case.x.view(INT8),) * 2, -1)[..., 0].view(dtype)
    got = scaled_matmul(strided, *case.arguments()[1:])
    assert torch.equal(got, flat)


@compiled
def test_wrong_input_is_a_value_error() -> None:
    case = Case(6, 24, 32, INT8)
    x, x_scale, w, w_scale, bias = case.arguments()
    with pytest.raises(ValueError, match="both int8"):
        scaled_matmul(x.float(), x_scale, w, w_scale)
    with pytest.raises(ValueError, match="both int8"):
        scaled_matmul(x, x_scale, w.to(E4M3), w_scale)
    for width in (31, 0):
        with pytest.raises(ValueError, match="does not fit"):
            scaled_matmul(x[:, :width], x_scale, w, w_scale)
    with pytest.raises(ValueError, match="does not fit"):
        scaled_matmul(x[:, :0], x_scale, w[:, :0], w_scale)
    with pytest.raises(ValueError, match="x_scale"):
        scaled_matmul(x, x_scale[:5], w, w_scale)
    with pytest.raises(ValueError, match="w_scale"):
        scaled_matmul(x, x_scale, w, w_scale.double())
    with pytest.raises(ValueError, match=r"bias \(23,\)"):
        scaled_matmul(x, x_scale, w, w_scale, bias[:23])


def test_the_choice_and_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    assert choose((1, 2, 3), CPU).path == "reference"
    with pytest.raises(ValueError, match="int8 or float8"):
        choose((1, 2, 3), CPU, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="shape"):
        choose((1, 2), CPU)
    monkeypatch.setattr(module, "kernels_run_on", lambda device: None)
    monkeypatch.setattr(module, "capability_of", lambda device: (8, 0))
    cuda = torch.device("cuda")
    assert choose((1, 64, 64), cuda).path == "triton"
    assert choose((1, 64, MAX_INT8_FEATURES + 1), cuda).path == "reference"
    assert choose((1, 64, 64), cuda, dtype=E4M3).reason == "this GPU has no FP8"


def test_fp8_never_switches_by_the_number_of_sequences() -> None:
    assert {tile(m, True, False) for m in (1, 16, 64, 65, 1000)} == {DECODE}
    assert {tile(m, False, False) for m in (1, 1000)} == {PREFILL}
    assert tile(64, True, True) == DECODE
    assert tile(65, True, True) == PREFILL


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [INT8, E4M3])
@pytest.mark.parametrize(("m", "n", "k"), [*SHAPES, (200, 512, 4096)])
def test_kernel_on_the_gpu(m: int, n: int, k: int, dtype: torch.dtype) -> None:
    if choose((m, n, k), torch.device("cuda"), dtype=dtype).path != "triton":
        pytest.skip("no FP8 here")
    case = Case(m, n, k, dtype)
    y = scaled_matmul(*case.cuda()).cpu()
    if dtype == INT8:
        assert torch.equal(y, reference(*case.arguments()))
    else:
        case.check_bound(y)
    rows = [scaled_matmul(x[None], s, *case.cuda()[2:]) for x, s in zip(*case.cuda()[:2])]
    assert torch.equal(torch.cat(rows).cpu(), y)
