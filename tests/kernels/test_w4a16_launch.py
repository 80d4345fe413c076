"""The Triton path of W4A16: values in the interpreter, choice of configurations, GPU tests."""

from dataclasses import replace

import pytest
import torch

from qat_kernels import w4a16_launch
from qat_kernels.numerics import dequantize
from qat_kernels.w4a16_launch import Config, check, config_of, heuristic, matmul
from qat_kernels.w4a16_planes import layout, to_groups, to_planes
from tests.kernels.interpreter import compiled, interpreted, passed_in_the_interpreter

on_gpu = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
CASES = [
    (4, 32, torch.bfloat16, False),
    (4, 128, torch.float16, False),
    (4, 48, torch.bfloat16, True),
    (4, 512, torch.bfloat16, False),
    (2, 64, torch.bfloat16, True),
    (3, 32, torch.float16, False),
    (3, 256, torch.bfloat16, True),
    (8, 32, torch.bfloat16, False),
    (8, 256, torch.float16, False),
]
"""(bits, group, type, zero points)."""


@interpreted
@pytest.mark.parametrize(("bits", "group", "half", "zero"), CASES)
def test_exact_on_integers(bits: int, group: int, half: torch.dtype, zero: bool) -> None:
    assert check(torch.device("cpu"), bits, group, half, zero)


class Random:
    """A random case: x [M, K], codes, scales on the 8-bit grid, bias, residual, device tensors."""

    def __init__(self, m: int, n: int, k: int, bits: int, group: int, device: str) -> None:
        generator = torch.Generator().manual_seed(m + n + k + bits)
        plan = layout(bits, group)
        assert plan is not None
        self.plan = plan
        low = -(1 << (bits - 1))
        codes = torch.randint(low, -low, (n, k), generator=generator).to(torch.int8)
        scale = torch.randn(n, k // group, generator=generator).to(torch.bfloat16).float()
        self.weight = dequantize(codes, scale, None)
        self.x = torch.randn(m, k, generator=generator).to(torch.bfloat16)
        self.bias = torch.randn(n, generator=generator).to(torch.bfloat16)
        self.residual = torch.randn(m, n, generator=generator).to(torch.bfloat16)
        self.device = device
        tensors = (*to_planes(codes, plan), to_groups(scale, plan, group, k), None)
        self.packed = [None if t is None else t.to(device) for t in tensors]

    def run(self, config: Config | None = None, rows: slice = slice(None)) -> torch.Tensor:
        x, residual = self.x[rows].to(self.device), self.residual[rows].to(self.device)
        bias = self.bias.to(self.device)
        return matmul(x, *self.packed, bias, residual, self.plan, config).cpu()

    def check_bound(self, y: torch.Tensor, splits: int) -> None:
        """|y - exact| <= (1.2 K + splits + 4) 2^-24 sum|x w| + one rounding to bf16 (2^-8 of it).

        The fp32 sum has K products of exact operands and K additions in any order, a multiplication
        by the scale for each group, the parts, the bias and the residual. A tensor core cuts the 17
        addends of an instruction at 2^-24 of the largest, and their sum at 2^-23, instead of
        rounding: (17 + 2) / 16 < 1.2 for each product.
        """
        exact = self.x.double() @ self.weight.double().T + self.bias.double()
        exact = exact + self.residual.double()
        size = self.x.double().abs() @ self.weight.double().abs().T
        size = size + self.bias.double().abs() + self.residual.double().abs()
        accumulated = 1.01 * (1.2 * self.x.shape[1] + splits + 4) * 2.0**-24 * size
        bound = accumulated + 1.01 * 2.0**-8 * (exact.abs() + accumulated)
        assert bool(((y.double() - exact).abs() <= bound).all())


SHAPES = [(1, 33, 96, 4, 32), (9, 40, 288, 3, 96), (17, 70, 1024, 2, 64), (5, 16, 208, 8, 16)]
"""(M, N, K, bits, group): K off the trip, N off the tile, groups that are cut."""


@interpreted
@pytest.mark.parametrize(("m", "n", "k", "bits", "group"), SHAPES)
@pytest.mark.parametrize("splits", [1, 3])
def test_within_the_derived_bound(
    m: int, n: int, k: int, bits: int, group: int, splits: int
) -> None:
    case = Random(m, n, k, bits, group, "cpu")
    config = Config(block_n=16, num_warps=1, num_stages=1, splits=splits)
    case.check_bound(case.run(config), splits)


@interpreted
@pytest.mark.parametrize("splits", [1, 2])
def test_a_strided_bias_is_read_with_its_stride(splits: int) -> None:
    """In fp32, for which the interpreter's launch makes no copy that would hide it."""
    case = Random(2, 33, 96, 4, 32, "cpu")
    x, bias, config = case.x.float(), case.bias.float(), Config(16, 1, 1, splits)
    expected = matmul(x, *case.packed, bias, None, case.plan, config)
    strided = torch.stack((bias, -bias), -1)[..., 0]
    assert not strided.is_contiguous()
    got = matmul(x, *case.packed, strided, None, case.plan, config)
    assert torch.equal(got, expected)


@compiled
def test_in_the_interpreter() -> None:
    assert passed_in_the_interpreter(__file__) == 25


def test_configurations_fill_the_gpu_and_do_not_depend_on_m() -> None:
    plan = layout(4, 128)
    assert plan is not None
    # 14,336 features are 448 programs; 512 are 16, so K = 4096 is cut in four
    assert heuristic(14336, plan, 16, fast=False) == Config(32, 2, 4, 1)
    assert heuristic(512, plan, 16, fast=False) == Config(32, 2, 4, 4)
    assert heuristic(512, plan, 1, fast=False).splits == 1
    assert "m" not in config_of.__wrapped__.__annotations__


def test_wgmma_is_refused_below_the_fixed_assembler(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    for version, expected in (((12, 8), False), ((13, 2), False), ((13, 3), True), ((14, 0), True)):
        monkeypatch.setattr(w4a16_launch, "ptxas_version", lambda found=version: found)
        assert w4a16_launch.fast_is_safe((9, 0)) is expected
        assert not w4a16_launch.fast_is_safe((8, 0))


def test_a_table_from_a_newer_assembler_brings_no_wgmma(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    plan = layout(4, 128)
    assert plan is not None
    entry = {"block_n": 128, "num_warps": 4, "num_stages": 3, "splits": 2}
    monkeypatch.setattr(w4a16_launch, "configuration", lambda *_: entry)
    for version, expected in (((12, 8), Config(32, 2, 4, 4)), ((13, 3), Config(**entry))):
        config_of.cache_clear()
        monkeypatch.setattr(w4a16_launch, "ptxas_version", lambda found=version: found)
        assert config_of(512, 4096, plan, (9, 0)) == expected
    config_of.cache_clear()


def test_the_self_test_covers_whole_and_cut_trips(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    monkeypatch.setattr(w4a16_launch, "_check_length", lambda *a: seen.append(a[-2]) is None)
    assert check(torch.device("cpu"), 4, 128, torch.bfloat16, False)
    # more whole trips of 256 than stages, and one that is half
    assert seen == [384, 1536]
    monkeypatch.setattr(w4a16_launch, "_check_length", lambda *a: a[-1] == 384)
    assert not check(torch.device("cpu"), 4, 128, torch.bfloat16, False)


def test_zero_points_of_8_bits_are_refused() -> None:
    plan = layout(8, 128)
    assert plan is not None
    words = torch.zeros(16, 64, dtype=torch.int16)
    scale, zero = torch.ones(16, 1), torch.ones(16, 1, dtype=torch.int8)
    with pytest.raises(ValueError, match="bits=8"):
        matmul(torch.ones(1, 128).half(), words, None, scale, zero, None, None, plan)


def test_rows_never_pick_another_instruction() -> None:
    """8 rows would get mma.sync where 16 get wgmma: the fast tile does not use them."""
    plan = layout(4, 128)
    assert plan is not None
    safe, fast = (heuristic(16384, plan, 64, variant) for variant in (False, True))
    assert [w4a16_launch._block_m(m, safe) for m in (1, 8, 9, 16, 17, 500)] == [
        8,
        8,
        16,
        16,
        32,
        32,
    ]
    assert [w4a16_launch._block_m(m, fast) for m in (1, 8, 9, 16, 17)] == [16, 16, 16, 16, 32]


class TestOnTheGpu:
    pytestmark = on_gpu

    @pytest.mark.parametrize(("bits", "group", "half", "zero"), CASES)
    def test_exact_on_integers(self, bits: int, group: int, half: torch.dtype, zero: bool) -> None:
        assert check(torch.device("cuda"), bits, group, half, zero)

    @pytest.mark.parametrize(("m", "n", "k", "bits", "group"), [*SHAPES, (40, 512, 4096, 4, 32)])
    def test_bound_and_independent_rows(
        self, m: int, n: int, k: int, bits: int, group: int
    ) -> None:
        case = Random(m, n, k, bits, group, "cuda")
        default = config_of(n, k, case.plan, torch.cuda.get_device_capability())
        for config in (default, replace(default, splits=3)):
            y = case.run(config)
            case.check_bound(y, 3)
            alone = torch.cat([case.run(config, slice(i, i + 1)) for i in range(m)])
            assert torch.equal(alone, y)
            assert torch.equal(case.run(config), y)
