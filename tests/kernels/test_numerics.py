"""The quantizer: exact round trips for every spec, and the properties that the design promises."""

import math

import numpy as np
import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32, unpack_from_int32
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization.lifecycle.forward import fake_quantize as reader_fake_quantize
from compressed_tensors.quantization.utils import compute_dynamic_scales_and_zp
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from qat_kernels import QuantSpec, compute_scale, dequantize, fake_quantize, pack, quantize, unpack
from qat_kernels.numerics import (
    SCALE_MAX,
    SCALE_MIN,
    check_finite,
    clip_gradient,
    fake_quantize_with,
    token_scale,
)

GRIDS = [
    (True, "signed_absmax"),
    (True, "absmax"),
    (True, "mse"),
    (False, "absmax"),
    (False, "mse"),
]
SPECS = [
    QuantSpec(bits=bits, symmetric=symmetric, grid=grid, granularity=granularity, group_size=32)
    for bits in range(2, 9)
    for symmetric, grid in GRIDS
    for granularity in ("tensor", "channel", "group")
]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
specs = st.sampled_from(SPECS)
# every finite fp32, denormals and the largest included
floats = st.floats(width=32, allow_nan=False, allow_infinity=False)
matrices = hnp.arrays(np.float32, st.tuples(st.integers(1, 3), st.just(64)), elements=floats)


def spec_id(spec):
    kind = "sym" if spec.symmetric else "asym"
    return f"int{spec.bits}-{spec.granularity}-{spec.grid}-{kind}"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("spec", SPECS, ids=spec_id)
def test_round_trip(spec, dtype):
    torch.manual_seed(0)
    w = torch.randn(3, 5, 96).to(dtype)
    scale, zero_point = compute_scale(w, spec)
    codes = quantize(w, scale, zero_point, spec)
    assert codes.dtype == torch.int8
    assert codes.shape == w.shape
    assert spec.q_min <= int(codes.min())
    assert int(codes.max()) <= spec.q_max
    packed = pack(codes, spec.bits)
    assert packed.shape == (3, 5, math.ceil(96 * spec.bits / 32))
    assert torch.equal(unpack(packed, spec.bits, 96), codes)
    value = dequantize(codes, scale, zero_point)
    assert value.dtype == torch.float32
    assert torch.equal(fake_quantize(w, spec), value)
    groups = {"tensor": (3, 1, 1), "channel": (3, 5, 1), "group": (3, 5, 3)}[spec.granularity]
    assert scale.shape == groups
    assert (zero_point is None) == spec.symmetric


@settings(max_examples=300, deadline=None)
@given(specs, matrices)
def test_any_finite_weight(spec, array):
    w = torch.from_numpy(array)
    scale, zero_point = compute_scale(w, spec)
    assert bool(torch.isfinite(scale).all())
    assert float(scale.abs().min()) >= SCALE_MIN
    assert float(scale.abs().max()) <= SCALE_MAX
    # portable: exact in bf16, fp16 and fp32
    assert torch.equal(scale.bfloat16().float(), scale)
    assert torch.equal(scale.half().float(), scale)
    codes = quantize(w, scale, zero_point, spec)
    assert torch.equal(unpack(pack(codes, spec.bits), spec.bits, 64), codes)
    value = dequantize(codes, scale, zero_point)
    assert bool(torch.isfinite(value).all())
    assert torch.equal(fake_quantize(w, spec), value)


@settings(max_examples=300, deadline=None)
@given(st.integers(2, 8), st.sampled_from(["tensor", "channel", "group"]), matrices)
def test_signed_absmax_is_idempotent(bits, granularity, array):
    spec = QuantSpec(bits=bits, granularity=granularity, grid="signed_absmax")
    w = torch.from_numpy(array)
    scale, _ = compute_scale(w, spec)
    codes = quantize(w, scale, None, spec)
    value = dequantize(codes, scale, None)
    again, _ = compute_scale(value, spec)
    codes_again = quantize(value, again, None, spec)
    assert torch.equal(dequantize(codes_again, again, None), value)
    # a group of codes that are all zero has no scale to find again; any other keeps its own
    alive = (codes.unflatten(-1, (scale.shape[-1], -1)) != 0).any(-1, keepdim=True)
    alive = alive.any(-3, keepdim=True) if granularity == "tensor" else alive
    assert torch.equal(codes_again, codes)
    assert torch.equal(again[alive.squeeze(-1)], scale[alive.squeeze(-1)])


@settings(max_examples=200, deadline=None)
@given(
    st.integers(2, 8),
    hnp.array_shapes(min_dims=2, max_dims=3, max_side=7),
    st.integers(1, 70),
    st.randoms(use_true_random=False),
)
def test_pack_is_the_readers_layout(bits, leading, k, random):
    generator = torch.Generator().manual_seed(random.getrandbits(32))
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1)
    codes = torch.randint(low, high, (*leading, k), generator=generator, dtype=torch.int8)
    codes = codes.reshape(-1, k)
    packed = pack(codes, bits)
    assert torch.equal(packed, pack_to_int32(codes, bits))
    assert torch.equal(unpack(packed, bits, k), codes)
    assert torch.equal(unpack_from_int32(packed, bits, codes.shape), codes)


@pytest.mark.parametrize("spec", SPECS, ids=spec_id)
def test_zero_groups(spec):
    w = torch.zeros(2, 64)
    scale, zero_point = compute_scale(w, spec)
    assert torch.equal(fake_quantize(w, spec), w)
    assert torch.equal(dequantize(quantize(w, scale, zero_point, spec), scale, zero_point), w)
    assert torch.equal(scale, torch.full_like(scale, SCALE_MIN))


def test_largest_value_is_exact_up_to_the_scales_rounding():
    w = torch.randn(64, 128)
    spec = QuantSpec()
    groups = w.unflatten(-1, (-1, 32))
    largest = groups.gather(-1, groups.abs().argmax(-1, keepdim=True))
    got = fake_quantize(w, spec).unflatten(-1, (-1, 32))
    got = got.gather(-1, groups.abs().argmax(-1, keepdim=True))
    # the code is -8 exactly; bf16 has 8 significant bits, so a rounded scale is off by at most
    # half a unit in the last place, 2^-8 of its value
    assert float(((got - largest) / largest).abs().max()) <= 2**-8


def test_sqnr_of_the_grids_on_gaussian_groups():
    """The figures of the design: 21.3 dB for signed_absmax, 20.5 for absmax, at int4 g32."""
    w = torch.randn(4096, 1024, generator=torch.Generator().manual_seed(0))

    def sqnr(grid):
        error = fake_quantize(w, QuantSpec(grid=grid)) - w
        return 10 * math.log10(float(w.square().mean() / error.square().mean()))

    # the figures are rounded to 0.1 dB, so 0.05; sampling adds little: the standard error of a mean
    # square over 2^22 values is sqrt(2 / 2^22) of it, 0.003 dB
    assert sqnr("signed_absmax") == pytest.approx(21.3, abs=0.05)
    assert sqnr("absmax") == pytest.approx(20.5, abs=0.05)
    assert sqnr("mse") > sqnr("signed_absmax")


def test_division_is_true_and_rounding_half_to_even():
    spec = QuantSpec(granularity="channel")
    scale = torch.tensor([[1.0]])
    w = torch.tensor([[0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 7.5, -8.5]])
    assert quantize(w, scale, None, spec).tolist() == [[0, 2, 2, 0, -2, -2, 7, -8]]
    # numpy divides in fp32 with correct rounding and rounds half to even
    torch.manual_seed(0)
    w, scale = torch.randn(1000, 64), torch.rand(1000, 1) + 0.01
    expected = torch.from_numpy(np.clip(np.round(w.numpy() / scale.numpy()), -8, 7).astype(np.int8))
    assert torch.equal(quantize(w, scale, None, spec), expected)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_nan_and_infinity_are_rejected_by_name(bad):
    w = torch.zeros(4, 4)
    w[1, 2] = bad
    with pytest.raises(ValueError, match=r"model\.layers\.3\.weight: 1 of 16 values"):
        check_finite(w, "model.layers.3.weight")
    check_finite(torch.full((4,), 3e38), "large but finite")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"bits": 1}, "bits=1"),
        ({"bits": 9}, "bits=9"),
        ({"group_size": 1}, "group_size=1"),
        ({"symmetric": False}, "grid=signed_absmax needs symmetric=true"),
        ({"dynamic": True}, "dynamic=true with granularity=group"),
        ({"granularity": "token"}, "dynamic=false with granularity=token"),
    ],
)
def test_impossible_specs(arguments, message):
    with pytest.raises(ValueError, match=message):
        QuantSpec(**arguments)


def test_group_that_does_not_divide():
    with pytest.raises(ValueError, match="K = 48 is not a multiple of group_size = 32"):
        compute_scale(torch.zeros(2, 48), QuantSpec())


def test_pack_and_unpack_refuse_what_does_not_fit():
    with pytest.raises(ValueError, match="do not fit 4 bits"):
        pack(torch.tensor([[8]], dtype=torch.int8), 4)
    with pytest.raises(ValueError, match="int8 codes"):
        pack(torch.tensor([[1]]), 4)
    with pytest.raises(ValueError, match="expected int32"):
        unpack(torch.zeros(1, 3, dtype=torch.int32), 4, 8)


@settings(max_examples=100, deadline=None)
@given(hnp.arrays(np.float32, (1, 3, 32), elements=st.floats(-(2.0**100), 2.0**100, width=32)))
def test_dynamic_activations_follow_the_reader(array):
    x = torch.from_numpy(array)
    spec = QuantSpec(
        bits=8, granularity="token", dynamic=True, grid="absmax", scale_dtype="float32"
    )
    arguments = QuantizationArgs(num_bits=8, strategy="token", dynamic=True, symmetric=True)
    scale, zero_point = compute_dynamic_scales_and_zp(x, arguments, torch.nn.Module())
    expected = reader_fake_quantize(x, scale, zero_point, arguments)
    assert torch.equal(token_scale(x), scale)
    assert torch.equal(fake_quantize_with(x, token_scale(x), spec)[0], expected)


def test_clip_gradient_passes_half_a_step_beyond_the_codes():
    spec = QuantSpec(granularity="channel", grid="absmax")
    # absmax 7.5 gives scale 1: codes reach from -8 to 7, gradients from -8.5 to 7.5
    w = torch.tensor([[7.5, 7.4, -7.5, 0.0]])
    grad = torch.ones_like(w)
    assert clip_gradient(grad, w, spec).tolist() == [[1, 1, 1, 1]]
    spec = QuantSpec(granularity="channel")
    # the largest value, -8, gives scale 1: 7.5 is the border, 7.51 is clipped
    w = torch.tensor([[-8.0, 7.5, 7.51, 1.0]])
    assert clip_gradient(grad, w, spec).tolist() == [[1, 1, 0, 1]]
