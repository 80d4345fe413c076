"""Codes in planes: exact round trips, and the places that the kernel's equation names."""

import pytest
import torch

from qat_kernels.w4a16_planes import Layout, from_planes, layout, to_groups, to_planes

GROUPS = [16, 32, 48, 64, 96, 128, 192, 256, 384, 512, 1024, 4096]


def random_codes(n: int, k: int, bits: int) -> torch.Tensor:
    low = -(1 << (bits - 1))
    generator = torch.Generator().manual_seed(n + k + bits)
    return torch.randint(low, -low, (n, k), generator=generator).to(torch.int8)


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("group", GROUPS)
def test_a_layout_fits_its_group(bits: int, group: int) -> None:
    plan = layout(bits, group)
    assert plan is not None
    assert plan.bits == (bits if bits <= 4 else 8)
    assert group % plan.group == 0
    assert plan.chunk % plan.group == 0 or plan.group % plan.step == 0
    # one scale per field of words
    assert plan.group % plan.width == 0


@pytest.mark.parametrize("group", [1, 8, 20, 40])
def test_other_groups_have_none(group: int) -> None:
    assert layout(4, group) is None


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize(
    ("n", "k", "group"), [(1, 16, 16), (3, 96, 32), (5, 512, 128), (2, 80, 16)]
)
def test_round_trip(bits: int, n: int, k: int, group: int) -> None:
    plan = layout(bits, group)
    assert plan is not None
    codes = random_codes(n, k, bits)
    words, high = to_planes(codes, plan)
    assert words.dtype == torch.int16
    assert tuple(words.shape) == (n, -(-k // plan.step) * plan.step // plan.fields)
    assert (high is not None) == (bits == 3)
    assert torch.equal(from_planes(words, high, plan, k), codes)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_where_a_code_lies(bits: int) -> None:
    plan = layout(bits, 64)
    assert plan is not None
    codes = random_codes(1, 2 * plan.step, bits)
    words, _ = to_planes(codes, plan)
    for chunk, field, word in [(0, 0, 0), (1, plan.fields - 1, plan.width - 1), (0, 1, 7)]:
        k = chunk * plan.chunk + field * plan.width + word
        stored = int(words[0, chunk * plan.width + word]) >> (field * bits) & ((1 << bits) - 1)
        offset = 0 if bits == 8 else 1 << (bits - 1)
        assert stored == (int(codes[0, k]) + offset) & ((1 << bits) - 1)


def test_scales_are_repeated_and_padded_with_zeros() -> None:
    plan = layout(4, 96)
    assert plan == Layout(4, 32, 32)
    scale = torch.tensor([[1.0, 2.0]])
    # 192 inputs are six groups of 32, padded to 256
    assert to_groups(scale, plan, 96, 192).tolist() == [[1.0] * 3 + [2.0] * 3 + [0.0] * 2]


def test_one_scale_per_channel_stays_one() -> None:
    plan = layout(4, 1024)
    assert plan is not None
    assert to_groups(torch.ones(3, 1), plan, 1024, 1024).tolist() == [[1.0]] * 3
