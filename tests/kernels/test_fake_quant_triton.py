"""The fake-quantization kernel against the quantizer that it must equal, for every fp32 input.

The kernel runs in the interpreter when TRITON_INTERPRET=1 is set before triton is imported;
`test_kernel_in_the_interpreter` starts this file again in such a process. The same checks run
compiled where there is a GPU.
"""

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from torch import Tensor

from qat_kernels import fake_quant, fake_quant_launch, fake_quant_learned
from qat_kernels.fake_quant import reference, trial_weight
from qat_kernels.fake_quant_launch import launch
from qat_kernels.fake_quant_learned import learned_gradients
from qat_kernels.numerics import (
    SCALE_MAX,
    SCALE_MIN,
    QuantSpec,
    clip_gradient,
    compute_scale,
    fake_quantize,
)
from tests.kernels.interpreter import INTERPRETED, compiled, passed_in_the_interpreter

DEVICE = torch.device("cpu" if INTERPRETED or not torch.cuda.is_available() else "cuda")
# NaN and infinity are among the inputs, and numpy remarks on what they turn into
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


def kernel(test):
    """Marks a test of the kernel's values: in the interpreter, or on a GPU."""
    if INTERPRETED:
        return test
    missing = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
    return pytest.mark.gpu(missing(test))


GRIDS = [("signed_absmax", True), ("absmax", True), ("absmax", False)]
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
CORNERS = (
    *(3.4028235e38, 65504.0, 65280.0, SCALE_MAX, 1.0, SCALE_MIN, 2.0**-18, 2.0**-126),
    *(1e-45, 1e-40, 0.0),
)


def spec_of(bits: int, group: int, grid: tuple[str, bool], scale: str = "bfloat16") -> QuantSpec:
    return QuantSpec(
        bits=bits, group_size=group, grid=grid[0], symmetric=grid[1], scale_dtype=scale
    )


def around_ties(spec: QuantSpec, rows: int, group: int) -> Tensor:
    """Values within 2 units in the last place of the half-integers times scales of 8 bits."""
    generator = torch.Generator().manual_seed(group + spec.bits)
    scale = (torch.rand(rows, 1, generator=generator) + 0.5).bfloat16().float()
    halves = torch.randint(
        2 * spec.q_min - 3, 2 * spec.q_max + 4, (rows, group), generator=generator
    )
    w = halves / 2 * scale
    # the code -2^(bits-1), so that signed_absmax finds the scale again
    w[:, 0] = spec.q_min * scale[:, 0]
    moved = w.view(torch.int32) + torch.randint(-2, 3, w.shape, generator=generator).int()
    moved[:, 0] = w.view(torch.int32)[:, 0]
    return moved.view(torch.float32)


def adversarial(spec: QuantSpec, group: int) -> Tensor:
    """fp32 [R, group]: corners of the format, ties, borders, NaN and infinity."""
    generator = torch.Generator().manual_seed(group)
    corners = torch.tensor(CORNERS)
    corners = torch.cat((corners, -corners))
    picked = corners[torch.randint(0, len(corners), (24, group), generator=generator)]
    odd = torch.randn(7, group, generator=generator)
    odd[0, 1], odd[1, 0], odd[2, 1], odd[3, 0] = torch.nan, torch.inf, -torch.inf, -torch.nan
    odd[4], odd[5], odd[6] = torch.nan, -odd[5].abs(), odd[6].abs()
    return torch.cat((trial_weight(group, spec), picked, around_ties(spec, 24, group), odd))


def check(w: Tensor, grad: Tensor, spec: QuantSpec, out_dtype: torch.dtype) -> None:
    """Forward and backward of the kernel equal the quantizer's; grad's dtype is its own."""
    got, _ = launch("forward", w.to(DEVICE), spec, out_dtype)
    assert got.dtype == out_dtype
    assert got.shape == w.shape
    expected = fake_quantize(w, spec, out_dtype)
    torch.testing.assert_close(got.cpu(), expected, atol=0, rtol=0, equal_nan=True)
    got, _ = launch("backward", w.to(DEVICE), spec, w.dtype, grad=grad.to(DEVICE))
    expected = clip_gradient(grad, w, spec, w.dtype)
    torch.testing.assert_close(got.cpu(), expected, atol=0, rtol=0, equal_nan=True)


# ------------------------------------------------------------------------------- computed scales


@kernel
@pytest.mark.parametrize("scale_dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize(
    ("bits", "group"), [(2, 32), (3, 64), (4, 32), (4, 128), (5, 48), (6, 256), (7, 2), (8, 33)]
)
def test_corners_ties_and_borders(bits, group, grid, scale_dtype):
    spec = spec_of(bits, group, grid, scale_dtype)
    w = adversarial(spec, group)
    grad = torch.randn(w.shape, generator=torch.Generator().manual_seed(0))
    grad[0, 0], grad[1, 1] = torch.inf, torch.nan
    check(w, grad, spec, torch.float32)


@kernel
@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.sampled_from(GRIDS),
    st.integers(2, 8),
    hnp.arrays(
        np.float32,
        st.tuples(st.integers(1, 3), st.just(64)),
        elements=st.floats(width=32, allow_nan=False, allow_infinity=False),
    ),
)
def test_any_finite_weight(grid, bits, array):
    w = torch.from_numpy(array)
    check(w, torch.ones_like(w), spec_of(bits, 32, grid), torch.float32)


@kernel
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("other", FLOATS, ids=str)
def test_dtypes(dtype, other):
    generator = torch.Generator().manual_seed(0)
    w = torch.randn(2, 3, 96, generator=generator).to(dtype)
    grad = torch.randn(w.shape, generator=generator).to(other)
    for grid in GRIDS:
        check(w, grad, spec_of(4, 32, grid), other)


@kernel
@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("k", [1, 7, 100, 256])
def test_channel(k, grid):
    spec = QuantSpec(granularity="channel", grid=grid[0], symmetric=grid[1])
    w = torch.randn(5, k, generator=torch.Generator().manual_seed(k))
    check(w, torch.ones_like(w), spec, torch.float32)


@kernel
@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_rows_longer_than_a_program(grid, monkeypatch):
    monkeypatch.setattr(fake_quant_launch, "MAX_BLOCK", 64)
    monkeypatch.setattr(fake_quant_launch, "LOOP_BLOCK", 32)
    spec = QuantSpec(granularity="channel", grid=grid[0], symmetric=grid[1])
    for k in (96, 101):
        w = adversarial(spec, k)[-12:]
        check(w, torch.ones_like(w), spec, torch.float32)
        check_learned(spec, k)


@kernel
def test_layouts():
    spec = spec_of(4, 32, GRIDS[0])
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(64 * 64 + 1, generator=generator)
    transposed = base[:4096].view(64, 64).t()
    # four bytes off: no load of 16 bytes is aligned
    misaligned = base[1:].view(64, 64)
    expanded = base[:64].expand(3, 64)
    for w in (transposed, misaligned, expanded, transposed[::2]):
        grad = torch.randn(w.shape[::-1], generator=generator).t()
        check(w, grad, spec, torch.bfloat16)


# ------------------------------------------------------------------------------------ given scale


def learned_case(spec: QuantSpec, k: int) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """(grad, w, scale, zero point) of a weight whose values reach beyond the codes."""
    generator = torch.Generator().manual_seed(k + spec.bits)
    w = torch.randn(7, k, generator=generator)
    scale, _ = compute_scale(w, spec)
    scale = scale * torch.empty_like(scale).uniform_(0.3, 1.3, generator=generator)
    scale[0], scale[1], scale[2] = 1e-9, 1e9, -scale[2]
    w[1, ::2], w[2, ::3] = 3e38, -0.0
    zero_point = None
    if not spec.symmetric:
        codes = torch.randint(spec.q_min, spec.q_max + 1, scale.shape, generator=generator)
        zero_point = codes.to(torch.int8)
    return torch.randn(w.shape, generator=generator), w, scale, zero_point


def check_learned(spec: QuantSpec, k: int) -> None:
    grad, w, scale, zero_point = learned_case(spec, k)
    moved = {"scale": scale.to(DEVICE)}
    moved["zero_point"] = None if zero_point is None else zero_point.to(DEVICE)
    got, _ = launch("forward", w.to(DEVICE), spec, torch.float32, **moved)
    expected = reference(w, spec, scale, zero_point)
    torch.testing.assert_close(got.cpu(), expected, atol=0, rtol=0)
    arguments = (w.to(DEVICE), spec, torch.float32)
    got, got_scale = launch("learned", *arguments, grad=grad.to(DEVICE), **moved)
    again, again_scale = launch("learned", *arguments, grad=grad.to(DEVICE), **moved)
    assert torch.equal(got, again)
    assert torch.equal(got_scale, again_scale)
    expected, expected_scale = learned_gradients(grad, w, scale, zero_point, spec)
    torch.testing.assert_close(got.cpu(), expected, atol=0, rtol=0)
    # no term is larger than |grad| * 2^bits; a sum of n terms in any order is off by less than
    # n * 2^-24 of the sum of magnitudes, on either side, and the products and the factor round
    group = k // scale.shape[-1]
    size = grad.unflatten(-1, (-1, group)).abs().sum(-1) * 2**spec.bits
    bound = 2 * (group + 2) * 2.0**-24 * size * (group * spec.q_max) ** -0.5
    assert bool(((got_scale.cpu() - expected_scale).abs() <= bound).all())


@kernel
@pytest.mark.parametrize("scale_dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("bits", "group"), [(2, 32), (4, 64), (8, 48)])
def test_given_scale(bits, group, symmetric, scale_dtype):
    check_learned(spec_of(bits, group, ("absmax", symmetric), scale_dtype), 3 * group)


# --------------------------------------------------------------------------------- the self-tests


@kernel
@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_self_tests_pass(backward, grid):
    for group in (32, 100):
        spec = spec_of(4, group, grid)
        arguments = (backward, spec, group, torch.float32, torch.float32, DEVICE)
        assert fake_quant.self_test(*arguments)
        assert fake_quant_learned.self_test(*arguments)


@kernel
@pytest.mark.parametrize("backward", [False, True])
def test_self_tests_notice_one_wrong_value(backward, monkeypatch):
    def wrong(*arguments, **options):
        value, scale_grad = launch(*arguments, **options)
        value.view(-1)[value.numel() // 2 + 1] += 1.0
        return value, scale_grad

    monkeypatch.setattr(fake_quant_launch, "launch", wrong)
    arguments = (backward, spec_of(4, 32, GRIDS[0]), 32, torch.float32, torch.float32, DEVICE)
    assert not fake_quant.self_test(*arguments)
    assert not fake_quant_learned.self_test(*arguments)


# ------------------------------------------------------------------------- without running a kernel


@compiled
@pytest.mark.parametrize("error", [-2, -1, 0, 1, 2])
def test_three_instructions_divide_exactly(error):
    """The kernel's division in fp64, where its steps are exact, with r off by ``error`` units."""
    generator = np.random.default_rng(error + 2)
    # all significands of 8 bits; quotients of any 24-bit significand, and those next to half codes
    scale = np.arange(128, 256, dtype=np.float64)[:, None] / 128
    any_w = generator.integers(1 << 23, 1 << 24, (128, 40_000)).astype(np.float64) / 2**20
    halves = generator.integers(1, 512, (128, 10_000)) / 2 * scale
    near = halves.astype(np.float32).view(np.int32) + generator.integers(-4, 5, halves.shape)
    near = near.astype(np.int32).view(np.float32).astype(np.float64)
    w = np.concatenate((any_w, near), 1)
    r = (np.float32(1) / scale.astype(np.float32)).view(np.int32) + error
    r = r.astype(np.int32).view(np.float32).astype(np.float64)
    first = (w * r).astype(np.float32).astype(np.float64)
    rest = w - first * scale
    assert np.array_equal(rest.astype(np.float32), rest), "the remainder is a fp32 number"
    divided = (first + rest * r).astype(np.float32)
    assert np.array_equal(divided, w.astype(np.float32) / scale.astype(np.float32))


@compiled
def test_kernel_in_the_interpreter():
    assert passed_in_the_interpreter(__file__) == 94
