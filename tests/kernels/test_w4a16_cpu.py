"""Prefill on the CPU: ATen's layout of 4-bit codes is read back exactly, and phases are chosen."""

import pytest
import torch
from torch.nn import functional

from qat_kernels import explain, w4a16_cpu
from qat_kernels.numerics import QuantSpec, dequantize
from qat_kernels.w4a16 import PackedWeight, linear
from qat_kernels.w4a16_cpu import PREFILL_TOKENS, dequantize_int4pack, tile
from tests.kernels.interpreter import compiled
from tests.kernels.test_w4a16 import Case, int4pack

pytestmark = [compiled, int4pack]


def weight_of(case: Case) -> torch.Tensor:
    """The weight [N, K] rounded once to bf16: what plain transformers multiplies with."""
    return dequantize(case.codes, case.scale, case.zero_point).to(torch.bfloat16)


def read_back(packed: PackedWeight) -> torch.Tensor:
    n = packed.codes.shape[0]
    whole = n // 64 * 64
    parts = []
    for start, stop in ((0, whole), (whole, n)):
        if stop > start:
            blocks = dequantize_int4pack(packed.codes, packed.scale, start, stop)
            parts.append(blocks.transpose(1, 2).flatten(0, 1))
    return torch.cat(parts)[: packed.out_features]


@pytest.mark.parametrize("n", [16, 20, 32, 48, 64, 80, 128, 200, 1100])
@pytest.mark.parametrize("group", [32, 64])
def test_the_tiled_codes_are_read_back(n: int, group: int) -> None:
    case = Case(1, n, 128, QuantSpec(group_size=group), torch.bfloat16)
    torch.testing.assert_close(read_back(case.prepare()), weight_of(case), atol=0, rtol=0)


def test_zero_points_are_read_back() -> None:
    case = Case(1, 96, 64, QuantSpec(symmetric=False, grid="absmax"), torch.bfloat16)
    # scales of four bits: -z * s is exact in bf16
    case.scale = case.scale.sign() * torch.exp2(case.scale.abs().log2().round()) * 1.125
    assert bool((case.zero_point != 0).any())
    packed = case.prepare()
    assert packed.path == "int4pack"
    torch.testing.assert_close(read_back(packed), weight_of(case), atol=0, rtol=0)


def test_another_layout_is_found_or_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def pairs(codes: torch.Tensor) -> torch.Tensor:
        """Blocks of 32 rows: neighbours share a byte."""
        u = codes.view(-1, 16, 2, codes.shape[1]).transpose(1, 3).transpose(2, 3)
        return (u[..., 0] | (u[..., 1] << 4)).to(torch.uint8).reshape(codes.shape[0], -1)

    def scrambled(codes: torch.Tensor) -> torch.Tensor:
        flat = pairs(codes).flatten()
        return flat[torch.randperm(flat.numel())].view(codes.shape[0], -1)

    tile.cache_clear()
    try:
        with monkeypatch.context() as patch:
            patch.setattr(w4a16_cpu, "_convert", pairs)
            assert tile(64) == (32, (*range(0, 32, 2), *range(1, 32, 2)))
            tile.cache_clear()
            patch.setattr(w4a16_cpu, "_convert", scrambled)
            with pytest.raises(RuntimeError, match="unknown layout"):
                tile(64)
    finally:
        tile.cache_clear()


@pytest.mark.parametrize("spec", [QuantSpec(), QuantSpec(bits=8, granularity="channel")], ids=str)
@pytest.mark.parametrize("n", [24, 64, 168])
def test_prefill_is_the_bf16_matmul_of_each_sequence(
    spec: QuantSpec, n: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(w4a16_cpu, "BLOCK_ELEMENTS", 64 * 96)
    case = Case(2 * PREFILL_TOKENS, n, 96, spec, torch.bfloat16)
    packed = case.prepare()
    x = case.x.view(2, PREFILL_TOKENS, 96)
    y = linear(x, packed)
    exact = x.double() @ weight_of(case).double().T
    size = x.double().abs() @ weight_of(case).double().abs().T
    # K fp32 additions of exact products in any order, then one rounding to bf16
    bound = 1.001 * 96 * 2.0**-24 * size
    bound = bound + (exact.abs() + bound) * 2.0**-8
    assert bool(((y.double() - exact).abs() <= bound).all())
    for i in range(2):
        # a sequence does not depend on the batch, and its bias is added to the rounded sum
        alone = linear(x[i : i + 1], packed, case.bias)
        torch.testing.assert_close(alone[0], y[i] + case.bias, atol=0, rtol=0)


def test_the_phase_follows_the_tokens_of_a_sequence() -> None:
    case = Case(PREFILL_TOKENS, 64, 64, QuantSpec(), torch.bfloat16)
    packed = case.prepare()
    flat = linear(case.x, packed)
    # rows without a token axis, and many sequences of few tokens, are decoded
    for shape in ((PREFILL_TOKENS, 1, 64), (2, PREFILL_TOKENS // 2, 64)):
        decoded = linear(case.x.view(shape), packed).view(-1, 64)
        torch.testing.assert_close(decoded, flat, atol=0, rtol=0)
    prefill = linear(case.x[None], packed)[0]
    dense = functional.linear(case.x, weight_of(case))
    # the two matmuls add in different orders: compare through fp64, as above
    assert float((prefill.double() - dense.double()).abs().max()) <= 2.0**-6 * float(
        dense.abs().max()
    )
    assert not torch.equal(prefill, flat)


def test_choices_are_explained() -> None:
    shape = (1, 64, 64)
    assert explain("w4a16", shape, "cpu").path == "int4pack"
    prefill = explain("w4a16", shape, "cpu", tokens=PREFILL_TOKENS)
    assert prefill.path == "dequantize"
    assert f"prefill of {PREFILL_TOKENS} tokens" in prefill.reason
    for m in (1, 8, 64):
        assert explain("w4a16", (m, 64, 64), "cpu", bits=8, group_size=None).path == "int8pack"
    for options, why in (
        ({"bits": 8}, "8-bit codes in groups of 32"),
        ({"bits": 8, "group_size": None, "symmetric": False}, "zero points"),
        ({"group_size": 16}, "groups of 16"),
        ({"dtype": "float16"}, "bfloat16 only"),
        ({"dtype": "float32"}, "exact reference"),
    ):
        choice = explain("w4a16", shape, "cpu", **options)
        assert choice.path == "reference"
        assert why in choice.reason
    for options in ({"bits": 9}, {"group_size": 48}, {"tokens": 0}, {"nonsense": 1}):
        with pytest.raises(ValueError):
            explain("w4a16", shape, "cpu", **options)
