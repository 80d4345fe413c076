"""Bit equality with bitsandbytes on the CPU, which computes everything here on its own."""

import math

import pytest
import torch

from qat_kernels import nf4_numerics
from qat_kernels.nf4 import (
    BLOCK_SIZES,
    DTYPES,
    Packed4bit,
    Spec4bit,
    codebook,
    dequantize_4bit,
    dequantize_absmax,
    dynamic_map,
    quantize_4bit,
    reference,
)

functional = pytest.importorskip("bitsandbytes.functional")

CPU = torch.device("cpu")
LARGEST = torch.finfo(torch.float32).max
SMALLEST_NORMAL = torch.finfo(torch.bfloat16).tiny


def edges(kind):
    """Values at each midpoint between codes and one ulp on either side, in a block of absmax 1."""
    bounds, _ = nf4_numerics._bounds(kind, CPU)
    ends = torch.tensor([-9.0, 9.0])
    around = [bounds, torch.nextafter(bounds, ends[:1]), torch.nextafter(bounds, ends[1:])]
    return torch.cat([torch.ones(1), *around])


def weights(kind, block):
    """Random and adversarial tensors by name."""
    torch.manual_seed(block)
    edge = edges(kind)
    sparse = (torch.rand(block * 100) < 1 / block) * torch.randn(block * 100)
    decades = torch.logspace(-38, 37, 257).repeat_interleave(block)
    return {
        "random": torch.randn(4, block * 75),
        "ragged": torch.randn(block * 300 + block // 2 + 1),
        "odd": torch.randn(5, 7),
        "one": torch.tensor([-0.7]),
        "zeros": torch.zeros(3, block),
        "negative zeros": torch.full((2, block), -0.0),
        "one per block": sparse,
        "all equal": torch.full((5, block), 0.3),
        "outliers": torch.randn(block * 600) * torch.rand(600).pow(8).repeat_interleave(block),
        "decades": torch.randn(block * 257).clamp(-9, 9) * decades,
        "largest": torch.full((1, block), LARGEST),
        "subnormal": torch.randn(block * 512) * 1e-40,
        "subnormal and ragged": torch.full((block + 3,), 1e-39),
        "least": torch.tensor([1e-45, 0.0, -1e-45]),
        "edges": torch.cat([edge * scale for scale in (1.0, 3.0, 0.7, 1e-20)]),
        "edges of many blocks": edge.repeat(-(-block * 5 // len(edge)))[: block * 5 + 3],
    }


def theirs(w, spec):
    codes, state = functional.quantize_4bit(
        w,
        blocksize=spec.block_size,
        compress_statistics=spec.double_quant,
        quant_type=spec.quant_type,
    )
    nested = state.state2.absmax if spec.double_quant else None
    return Packed4bit(codes.view(-1), state.absmax, nested, state.offset), codes, state


def assert_same(ours, packed, what=""):
    for name, a, b in zip(Packed4bit._fields, ours, packed):
        if a is None or b is None:
            assert a is b, (name, what)
        else:
            assert a.dtype == b.dtype, (name, what)
            assert torch.equal(a, b), (name, what)


def test_tables_are_those_of_bitsandbytes():
    for kind in ("nf4", "fp4"):
        assert torch.equal(codebook(kind, CPU), functional.get_4bit_type(kind, device="cpu"))
    assert torch.equal(dynamic_map(CPU), functional.create_dynamic_map())


@pytest.mark.parametrize("double", [True, False], ids=["double", "single"])
@pytest.mark.parametrize("block", BLOCK_SIZES)
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_quantizing_equals_bitsandbytes(kind, block, double):
    spec = Spec4bit(kind, block, double)
    for name, w in weights(kind, block).items():
        for dtype in DTYPES:
            cast = w.to(dtype)
            if not bool(torch.isfinite(cast).all()):
                cast = cast.clamp(-torch.finfo(dtype).max, torch.finfo(dtype).max)
            packed, _, state = theirs(cast, spec)
            if double and not math.isfinite(state.offset):
                # bitsandbytes goes on with NaN
                with pytest.raises(ValueError, match="double_quant=false"):
                    quantize_4bit(cast, spec)
                continue
            assert_same(quantize_4bit(cast, spec), packed, f"{name} in {dtype}")


@pytest.mark.parametrize("double", [True, False], ids=["double", "single"])
@pytest.mark.parametrize("block", [32, 64, 128, 1024])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_dequantizing_equals_bitsandbytes(kind, block, double):
    # sizes from 2048 and odd numbers of values run torch.compile in bitsandbytes: see below
    spec = Spec4bit(kind, block, double)
    for name, w in weights(kind, block).items():
        flat = w.flatten()[: w.numel() // 2 * 2]
        if not flat.numel() or (double and name in ("decades", "largest")):
            continue
        packed, codes, state = theirs(flat, spec)
        for dtype in DTYPES:
            state.dtype = dtype
            expected = functional.dequantize_4bit(codes, state).view(-1)
            got = dequantize_4bit(packed, spec, flat.shape, dtype)
            assert got.dtype == dtype
            if dtype == torch.bfloat16:
                # with AVX512-BF16 bitsandbytes flushes subnormal results to zero; the bf16 form
                # of a subnormal fp32 value is at most the smallest normal
                flushed = (expected == 0) & (got.abs() <= SMALLEST_NORMAL)
                expected = torch.where(flushed, got, expected)
            assert torch.equal(got, expected), (name, dtype)
            absmax = dequantize_absmax(packed)
            assert torch.equal(got, reference(packed.codes, absmax, spec, flat.shape, dtype))


@pytest.mark.parametrize("double", [True, False], ids=["double", "single"])
@pytest.mark.parametrize("block", [64, 2048, 4096])
@pytest.mark.parametrize("shape", [(3, 4096 + 7), (5, 7), (1,)])
def test_dequantizing_odd_and_large_blocks_equals_the_formula(shape, block, double):
    torch.manual_seed(1)
    spec = Spec4bit("nf4", block, double)
    packed, _, _ = theirs(torch.randn(shape), spec)
    numel = math.prod(shape)
    codes = torch.stack([packed.codes >> 4, packed.codes & 15], 1).flatten()[:numel].long()
    absmax = dequantize_absmax(packed).repeat_interleave(block)[:numel]
    expected = (codebook("nf4", CPU)[codes] * absmax).view(shape)
    for dtype in DTYPES:
        assert torch.equal(dequantize_4bit(packed, spec, shape, dtype), expected.to(dtype))


def test_double_quantized_absmax_equals_bitsandbytes():
    w = torch.randn(700, 64) * torch.rand(700, 1).pow(6)
    packed, _, state = theirs(w, Spec4bit())
    expected = functional.dequantize_blockwise(state.absmax, state.state2) + state.offset
    assert torch.equal(dequantize_absmax(packed), expected)


def test_result_does_not_depend_on_threads_and_equals_one_thread_of_bitsandbytes():
    # above 32768 blocks torch splits a sum among threads
    w, spec = torch.randn(40000 * 32), Spec4bit(block_size=32)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        two = quantize_4bit(w, spec)
        torch.set_num_threads(1)
        assert_same(quantize_4bit(w, spec), two)
        assert_same(two, theirs(w, spec)[0])
    finally:
        torch.set_num_threads(threads)


def test_chunks_change_nothing(monkeypatch):
    w = torch.randn(64 * 1000 + 5)
    for spec in (Spec4bit(), Spec4bit("fp4", 4096, False)):
        whole = quantize_4bit(w, spec)
        weight = dequantize_4bit(whole, spec, w.shape, torch.float32)
        with monkeypatch.context() as patch:
            patch.setitem(nf4_numerics._CHUNK, "cpu", 256)
            assert_same(quantize_4bit(w, spec), whole)
            assert torch.equal(dequantize_4bit(whole, spec, w.shape, torch.float32), weight)


def test_quantizing_a_view_and_a_parameter():
    w = torch.randn(64, 96)
    spec = Spec4bit()
    assert_same(quantize_4bit(w.t(), spec), quantize_4bit(w.t().contiguous(), spec))
    assert not quantize_4bit(torch.nn.Parameter(w), spec).absmax.requires_grad


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("place", [0, 70, 129])
def test_nan_and_infinity_are_refused(bad, place):
    w = torch.randn(130)
    w[place] = bad
    with pytest.raises(ValueError, match="weight: 1 of 130 values are NaN or infinite"):
        quantize_4bit(w, Spec4bit())


@pytest.mark.parametrize(
    "w", [torch.zeros(4, dtype=torch.float64), torch.zeros(4, dtype=torch.int8), torch.zeros(0)]
)
def test_other_inputs_are_refused(w):
    with pytest.raises(ValueError, match="non-empty float32, bfloat16 or float16"):
        quantize_4bit(w, Spec4bit())


def test_spec_names_the_field():
    with pytest.raises(ValueError, match="quant_type=int4: nf4 or fp4"):
        Spec4bit("int4")
    with pytest.raises(ValueError, match="block_size=48: one of 32, 64"):
        Spec4bit(block_size=48)
