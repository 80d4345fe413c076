"""W4A16 linear: each path against the reference that it imports.

The Triton kernels run in the interpreter when TRITON_INTERPRET=1 is set before triton is imported;
`test_kernel_in_the_interpreter` starts this file again in such a process.
"""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from qat_kernels import w4a16
from qat_kernels.numerics import QuantSpec, compute_scale, dequantize, pack, quantize, unpack
from qat_kernels.w4a16 import linear, prepare, reference
from qat_kernels.w4a16_cpu import PREFILL_TOKENS
from tests.kernels.interpreter import compiled, interpreted, passed_in_the_interpreter

int4pack = pytest.mark.skipif(
    torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"),
    reason="the ATen op is used on x86 with AVX2 or better",
)

SHAPES = [(1, 32, 64, 32), (2, 33, 96, 32), (5, 7, 128, 64), (16, 64, 256, 128), (17, 70, 32, 32)]
"""(M, N, K, group): one group, N off the block and off 16, M around the tile of 16."""
ROUNDING = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11, torch.float32: 0.0}
"""Largest relative error of one rounding to the dtype (8 and 11 significant bits)."""


class Case:
    """A quantized random weight with activations: x [M, K], packed [N, P], scale, zero, bias."""

    def __init__(
        self, m: int, n: int, k: int, spec: QuantSpec, dtype: torch.dtype, integers: bool = False
    ) -> None:
        generator = torch.Generator().manual_seed(1000 * m + n + k + spec.bits)
        self.spec, self.shape, self.dtype = spec, (n, k), dtype
        weight = torch.randn(n, k, generator=generator)
        self.scale, self.zero_point = compute_scale(weight, spec)
        self.codes = quantize(weight, self.scale, self.zero_point, spec)
        self.x = torch.randn(m, k, generator=generator).to(dtype)
        self.bias = torch.randn(n, generator=generator).to(dtype)
        if integers:
            # |sum| <= 512 * 8 * 2 * 2 < 2^24: every partial sum is an integer that fp32 holds;
            # few nonzeros keep the total within the 8 bits of bf16
            self.scale = torch.where(self.scale < 0, -2.0, 1.0)
            keep = torch.rand(m, k, generator=generator) < 4 / k
            self.x = (torch.randint(-2, 3, (m, k), generator=generator) * keep).to(dtype)
            self.bias = torch.randint(-3, 4, (n,), generator=generator).to(dtype)
        self.packed = pack(self.codes, spec.bits)

    def prepare(self, path: w4a16.Path | None = None) -> w4a16.PackedWeight:
        return prepare(
            self.packed, self.scale, self.zero_point, self.spec, self.shape, "cpu", self.dtype, path
        )

    def reference(self, bias: Tensor | None = None, residual: Tensor | None = None) -> Tensor:
        packed = (self.packed, self.scale, self.zero_point)
        return reference(self.x, *packed, bias, residual, bits=self.spec.bits)

    def rows(self, count: int) -> "Case":
        """The same weight with the first rows of x."""
        other = copy.copy(self)
        other.x = self.x[:count]
        return other

    def exact(self, bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The result in fp64 (all products are exact there) and the sum of its magnitudes."""
        weight = dequantize(self.codes, self.scale, self.zero_point).double()
        total = self.x.double() @ weight.T
        size = self.x.double().abs() @ weight.abs().T
        if bias is not None:
            total, size = total + bias.double(), size + bias.double().abs()
        return total, size


def check_bound(y: Tensor, case: Case, bias: Tensor | None = None, roundings: int = 1) -> None:
    """|y - exact| <= (K + 2) * 2^-24 * sum |x w| for the fp32 sum (K products and additions, in any
    order, one multiplication by the scale, one bias), then each rounding to the output's dtype."""
    exact, size = case.exact(bias)
    accumulated = 1.001 * (case.shape[1] + 2) * 2.0**-24 * size
    # between two roundings the value is at most the sum of magnitudes
    rounded = exact.abs() if roundings == 1 else size
    bound = accumulated + roundings * 1.01 * ROUNDING[y.dtype] * (rounded + accumulated)
    # fp16: half of the smallest subnormal
    bound = bound + 2.0**-25
    assert bool(((y.double() - exact).abs() <= bound).all())


def sequential(case: Case) -> Tensor:
    """The fp32 sum in the order of K, rounded once to bf16: what int4pack documents."""
    weight = dequantize(case.codes, case.scale, case.zero_point)
    total = torch.zeros(case.x.shape[0], case.shape[0])
    for k in range(case.shape[1]):
        # a bf16 times a 12-bit weight is exact in fp32, so a fused multiply-add changes nothing
        total = total + case.x[:, k : k + 1].float() * weight[:, k]
    return total.to(torch.bfloat16)


# ---------------------------------------------------------------------------- reference, dispatch


def all_specs() -> list[QuantSpec]:
    specs = [QuantSpec(bits=bits) for bits in range(2, 9)]
    specs += [QuantSpec(granularity="channel"), QuantSpec(granularity="tensor", bits=8)]
    asymmetric = {"symmetric": False, "grid": "absmax"}
    return specs + [QuantSpec(bits=b, **asymmetric) for b in (3, 4, 8)]


@compiled
@pytest.mark.parametrize("spec", all_specs(), ids=str)
@pytest.mark.parametrize("with_bias", [False, True])
def test_fp32_is_the_dense_layer_bit_for_bit(spec: QuantSpec, with_bias: bool) -> None:
    case = Case(3, 24, 96, spec, torch.float32)
    bias = case.bias if with_bias else None
    weight = dequantize(unpack(case.packed, spec.bits, 96), case.scale, case.zero_point)
    packed = case.prepare()
    assert packed.path == "reference"
    expected = functional.linear(case.x, weight, bias)
    torch.testing.assert_close(linear(case.x, packed, bias), expected, atol=0, rtol=0)


@compiled
@pytest.mark.parametrize("spec", all_specs(), ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_within_the_derived_bound(spec: QuantSpec, dtype: torch.dtype) -> None:
    case = Case(5, 40, 128, spec, dtype)
    check_bound(linear(case.x, case.prepare()), case)
    # int4pack rounds before it adds the bias
    check_bound(linear(case.x, case.prepare(), case.bias), case, case.bias, roundings=2)


@compiled
@int4pack
@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize(("m", "n", "k", "group"), SHAPES)
def test_int4pack_is_the_sequential_fp32_sum(m: int, n: int, k: int, group: int, bits: int) -> None:
    case = Case(m, n, k, QuantSpec(bits=bits, group_size=group), torch.bfloat16)
    packed = case.prepare()
    assert packed.path == "int4pack"
    torch.testing.assert_close(linear(case.x, packed), sequential(case), atol=0, rtol=0)


@compiled
@int4pack
@pytest.mark.parametrize("granularity", ["channel", "tensor"])
@pytest.mark.parametrize("k", [32, 96, 128, 1280])
def test_int4pack_repeats_coarse_scales(granularity: str, k: int) -> None:
    case = Case(4, 18, k, QuantSpec(granularity=granularity), torch.bfloat16)
    packed = case.prepare()
    assert packed.path == "int4pack"
    torch.testing.assert_close(linear(case.x, packed), sequential(case), atol=0, rtol=0)


@compiled
@int4pack
def test_int4pack_takes_zero_points_that_are_exact() -> None:
    case = Case(4, 32, 64, QuantSpec(symmetric=False, grid="absmax"), torch.bfloat16)
    case.scale = torch.exp2(torch.randint(-6, 2, case.scale.shape).float())
    packed = case.prepare()
    assert packed.path == "int4pack"
    torch.testing.assert_close(linear(case.x, packed), sequential(case), atol=0, rtol=0)
    case.scale[0, 0] = 1.0 + 2.0**-7
    case.zero_point[0, 0] = 7  # 7 * (1 + 2^-7) has ten significant bits
    assert case.prepare().path == "reference"
    with pytest.raises(ValueError, match="exactly"):
        case.prepare("int4pack")


@compiled
@int4pack
@pytest.mark.parametrize(
    ("spec", "n", "k", "dtype"),
    [
        (QuantSpec(bits=5), 32, 64, torch.bfloat16),
        (QuantSpec(group_size=16), 32, 64, torch.bfloat16),
        (QuantSpec(), 32, 64, torch.float16),
        (QuantSpec(), 32, 64, torch.float32),
        (QuantSpec(bits=8, granularity="channel"), 32, 80, torch.float16),
        (QuantSpec(bits=8, granularity="channel"), 32, 72, torch.bfloat16),
        (QuantSpec(granularity="channel"), 32, 72, torch.bfloat16),
        (QuantSpec(bits=8, granularity="channel", symmetric=False, grid="absmax"), 32, 80,
         torch.bfloat16),
        (QuantSpec(granularity="channel", symmetric=False, grid="absmax"), 32, 80, torch.bfloat16),
    ],
    ids=str,
)  # fmt: skip
def test_everything_else_takes_the_reference(
    spec: QuantSpec, n: int, k: int, dtype: torch.dtype
) -> None:
    assert Case(1, n, k, spec, dtype).prepare().path == "reference"


@compiled
@int4pack
def test_scales_that_bf16_does_not_hold_take_the_reference() -> None:
    case = Case(1, 32, 64, QuantSpec(), torch.bfloat16)
    case.scale = case.scale * (1 + 2.0**-12)
    assert case.prepare().path == "reference"


@compiled
@int4pack
@pytest.mark.parametrize("bits", [4, 8])
def test_a_row_does_not_depend_on_the_others(bits: int) -> None:
    granularity = "group" if bits == 4 else "channel"
    case = Case(33, 80, 256, QuantSpec(bits=bits, granularity=granularity), torch.bfloat16)
    packed = case.prepare()
    assert packed.path == f"int{bits}pack"
    together = linear(case.x, packed)
    for m in (1, 2, 4, 16):
        parts = torch.cat([linear(part, packed) for part in case.x.split(m)])
        torch.testing.assert_close(parts, together, atol=0, rtol=0)


@compiled
def test_a_row_of_the_reference_path_does_not_depend_on_the_others() -> None:
    # many features in and out: where the matmuls of one row and of many differ in some bits
    case = Case(2 * PREFILL_TOKENS, 512, 2048, QuantSpec(group_size=16), torch.float16)
    packed = case.prepare()
    assert packed.path == "reference"
    together = linear(case.x[:33], packed)
    for m in (1, 2, 5, 16):
        parts = torch.cat([linear(part, packed) for part in case.x[:33].split(m)])
        torch.testing.assert_close(parts, together, atol=0, rtol=0)
    prompts = case.x.view(2, PREFILL_TOKENS, 2048)
    alone = torch.cat([linear(prompt, packed) for prompt in prompts.split(1)])
    torch.testing.assert_close(linear(prompts, packed), alone, atol=0, rtol=0)


@compiled
@int4pack
@pytest.mark.parametrize("bits", [5, 6, 7, 8])
@pytest.mark.parametrize("granularity", ["channel", "tensor"])
@pytest.mark.parametrize(("m", "n", "k"), [(1, 16, 64), (3, 33, 80), (5, 7, 16), (17, 64, 256)])
def test_int8pack_within_the_derived_bound(
    m: int, n: int, k: int, granularity: str, bits: int
) -> None:
    case = Case(m, n, k, QuantSpec(bits=bits, granularity=granularity), torch.bfloat16)
    packed = case.prepare()
    assert packed.path == "int8pack"
    check_bound(linear(case.x, packed), case)
    check_bound(linear(case.x, packed, case.bias), case, case.bias, roundings=2)


@compiled
@int4pack
@pytest.mark.parametrize("bits", [4, 8])
def test_int8pack_is_exact_on_integers(bits: int) -> None:
    # K = 80 is no multiple of 32: 4-bit codes are held in 8 bits
    case = Case(5, 24, 80, QuantSpec(bits=bits, granularity="channel"), torch.bfloat16, True)
    packed = case.prepare()
    assert packed.path == "int8pack"
    torch.testing.assert_close(linear(case.x, packed), case.reference(), atol=0, rtol=0)


@compiled
@int4pack
def test_rows_that_pass_32_bit_offsets_are_split(monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case(9, 32, 64, QuantSpec(), torch.bfloat16)
    expected = linear(case.x, case.prepare())
    packed = case.prepare()
    monkeypatch.setattr(w4a16.w4a16_cpu, "_INT32_MAX", 64 * 4)
    torch.testing.assert_close(linear(case.x, packed), expected, atol=0, rtol=0)


@compiled
@int4pack
def test_conversion_in_slices_equals_conversion_in_one(monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case(1, 200, 64, QuantSpec(), torch.bfloat16)
    whole = case.prepare()
    monkeypatch.setattr(w4a16.w4a16_cpu, "_CONVERT_ROWS", 64)
    sliced = case.prepare()
    torch.testing.assert_close(whole.codes, sliced.codes, atol=0, rtol=0)


@compiled
def test_shapes_of_the_input() -> None:
    case = Case(6, 24, 64, QuantSpec(), torch.bfloat16)
    packed = case.prepare()
    flat = linear(case.x, packed)
    torch.testing.assert_close(linear(case.x.view(2, 3, 64), packed).flatten(0, 1), flat)
    strided = torch.stack((case.x, case.x), -1)[..., 0]
    assert not strided.is_contiguous()
    torch.testing.assert_close(linear(strided, packed), flat, atol=0, rtol=0)
    torch.testing.assert_close(linear(case.x[0], packed), flat[0], atol=0, rtol=0)
    assert tuple(linear(case.x[:0], packed).shape) == (0, 24)


@compiled
def test_wrong_input_is_a_value_error() -> None:
    case = Case(2, 24, 64, QuantSpec(), torch.bfloat16)
    packed = case.prepare()
    with pytest.raises(ValueError, match=r"x is torch\.float32"):
        linear(case.x.float(), packed)
    with pytest.raises(ValueError, match="K = 32, not 64"):
        linear(case.x[:, :32], packed)
    with pytest.raises(ValueError, match="bias"):
        linear(case.x, packed, torch.zeros(3))
    arguments = (case.zero_point, case.spec)
    with pytest.raises(ValueError, match="path=int8pack"):
        Case(2, 24, 72, QuantSpec(granularity="channel"), torch.bfloat16).prepare("int8pack")
    with pytest.raises(ValueError, match="packed codes"):
        prepare(case.packed.long(), case.scale, *arguments, (24, 64))
    with pytest.raises(ValueError, match="packed codes"):
        prepare(case.packed, case.scale, *arguments, (24, 96))
    with pytest.raises(ValueError, match="scale"):
        prepare(case.packed, case.scale[:, :1], *arguments, (24, 64))
    with pytest.raises(ValueError, match="zero point"):
        prepare(case.packed, case.scale, case.scale, case.spec, (24, 64))
    with pytest.raises(ValueError, match="dtype"):
        prepare(case.packed, case.scale, *arguments, (24, 64), dtype=torch.float64)
    with pytest.raises(ValueError, match="multiple of group_size"):
        prepare(torch.zeros(24, 5, dtype=torch.int32), case.scale, *arguments, (24, 40))


@compiled
def test_operator_registration() -> None:
    case = Case(3, 24, 64, QuantSpec(), torch.bfloat16)
    residual = torch.ones(3, 24, dtype=torch.bfloat16)
    for p in (case.prepare(), case.prepare("reference")):
        tensors = (case.x, p.codes, p.high, p.scale, None, case.bias, residual)
        arguments = (*tensors, p.bits, p.group, p.out_features, p.path)
        # the schema, the fake kernel and the dispatch, without gradients (there are none)
        utils = ("test_schema", "test_faketensor", "test_aot_dispatch_static")
        torch.library.opcheck(w4a16.w4a16_linear, arguments, test_utils=utils)


@compiled
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_whole_graphs_compile(dtype: torch.dtype) -> None:
    case = Case(3, 24, 64, QuantSpec(), dtype)
    packed = case.prepare()

    def layer(x: Tensor) -> Tensor:
        return linear(x, packed, case.bias) * 2

    with torch.no_grad():
        got = torch.compile(layer, fullgraph=True, backend="aot_eager")(case.x)
        torch.testing.assert_close(got, layer(case.x), atol=0, rtol=0)


@compiled
@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_residual_is_added_last(dtype: torch.dtype, bits: int) -> None:
    case = Case(3, 24, 64, QuantSpec(bits=bits, granularity="channel"), dtype, integers=True)
    residual = torch.arange(-36, 36).view(3, 24).to(dtype)
    # integers: adding in fp32 or in the dtype gives the same
    got = linear(case.x, case.prepare(), case.bias, residual)
    expected = case.reference(case.bias, residual)
    torch.testing.assert_close(got, expected, atol=0, rtol=0)
    torch.testing.assert_close(expected, case.reference(case.bias) + residual, atol=0, rtol=0)
    with pytest.raises(ValueError, match="residual"):
        linear(case.x, case.prepare(), None, residual[:2])


@compiled
def test_backward_says_what_to_do() -> None:
    case = Case(3, 24, 64, QuantSpec(), torch.bfloat16)
    y = linear(case.x.requires_grad_(), case.prepare())
    with pytest.raises(RuntimeError, match="no backward"):
        y.sum().backward()


# ---------------------------------------------------------------------------- Triton


@compiled
def test_the_choice_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    def path(**options: Any) -> str:
        return w4a16.choose((1, 64, 256), "cuda", **options).path

    if not torch.cuda.is_available():
        assert w4a16.choose((1, 64, 256), "cuda").reason == "no CUDA device here"
    monkeypatch.setattr(w4a16, "kernels_run_on", lambda device: None)
    for bits in (2, 3, 4, 8):
        assert path(bits=bits) == "triton"
        assert path(bits=bits, group_size=None) == "triton"
        assert path(bits=bits, tokens=63) == "triton"
        assert path(bits=bits, tokens=64) == "dequantize"
    assert path(dtype=torch.float32) == "reference"
    assert path(dtype=torch.float16) == "triton"
    assert path(symmetric=False) == "triton"
    assert path(bits=8, symmetric=False) == "reference"
    assert path(group_size=8) == "reference"
    # whatever M is, decode stays decode
    paths = {w4a16.choose((m, 64, 256), "cuda").path for m in (1, 16, 17, 64, 4096)}
    assert paths == {"triton"}


@compiled
def test_triton_is_refused_where_it_cannot_run() -> None:
    case = Case(1, 24, 64, QuantSpec(), torch.bfloat16)
    with pytest.raises(ValueError, match="path=triton cannot run"):
        case.prepare("triton")


SPECS = [
    QuantSpec(),
    QuantSpec(bits=2, group_size=64),
    QuantSpec(bits=3, group_size=48),
    QuantSpec(bits=4, granularity="channel"),
    QuantSpec(bits=4, granularity="tensor"),
    QuantSpec(bits=6, group_size=32),
    QuantSpec(bits=8, granularity="channel"),
    QuantSpec(bits=4, symmetric=False, grid="absmax"),
]


@interpreted
@pytest.mark.parametrize("spec", SPECS, ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_kernel_is_exact_on_integers(spec: QuantSpec, dtype: torch.dtype) -> None:
    case = Case(3, 25, 192, spec, dtype, integers=True)
    packed = case.prepare("triton")
    assert packed.path == "triton"
    torch.testing.assert_close(linear(case.x, packed), case.reference(), atol=0, rtol=0)
    residual = torch.ones(3, 25, dtype=dtype)
    got = linear(case.x, packed, case.bias, residual)
    torch.testing.assert_close(got, case.reference(case.bias, residual), atol=0, rtol=0)


@interpreted
@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_decode_and_prefill_within_the_derived_bound(spec: QuantSpec) -> None:
    case = Case(64, 19, 192, spec, torch.bfloat16)
    packed = case.prepare("triton")
    check_bound(linear(case.x[:5], packed), case.rows(5))
    # prefill rounds the weights to bf16, too: one rounding of every product
    y = linear(case.x[None], packed)[0]
    exact, size = case.exact()
    slack = (1.01 * 2.0**-8 + 1.001 * 194 * 2.0**-24) * size
    assert bool(((y.double() - exact).abs() <= slack + 1.01 * 2.0**-8 * exact.abs()).all())


@interpreted
def test_rows_misaligned_and_strided_inputs() -> None:
    case = Case(6, 25, 192, QuantSpec(), torch.bfloat16)
    packed = case.prepare("triton")
    whole = linear(case.x, packed)
    rows = torch.cat([linear(row[None], packed) for row in case.x])
    torch.testing.assert_close(rows, whole, atol=0, rtol=0)
    storage = torch.zeros(6 * 192 + 1, dtype=torch.bfloat16)
    shifted = storage[1:].view(6, 192).copy_(case.x)
    assert shifted.data_ptr() % 16
    torch.testing.assert_close(linear(shifted, packed), whole, atol=0, rtol=0)
    strided = torch.stack((case.x, case.x), -1)[..., 0]
    torch.testing.assert_close(linear(strided, packed), whole, atol=0, rtol=0)


@compiled
def test_in_the_interpreter() -> None:
    assert passed_in_the_interpreter(__file__) == 25


@compiled
@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("spec", SPECS, ids=str)
@pytest.mark.parametrize(("m", "n", "k"), [(1, 33, 192), (17, 70, 384), (33, 512, 768)])
def test_layer_on_the_gpu(m: int, n: int, k: int, spec: QuantSpec, dtype: torch.dtype) -> None:
    for integers in (True, False):
        case = Case(m, n, k, spec, dtype, integers)
        tensors = (case.packed, case.scale, case.zero_point, case.spec, case.shape, "cuda", dtype)
        packed = prepare(*tensors)
        assert packed.path == "triton"
        y = linear(case.x.cuda(), packed, case.bias.cuda()).cpu()
        if integers:
            torch.testing.assert_close(y, case.reference(case.bias), atol=0, rtol=0)
        else:
            check_bound(y, case, case.bias)
        alone = torch.cat([linear(row, packed, case.bias.cuda()) for row in case.x.cuda().split(1)])
        torch.testing.assert_close(alone.cpu(), y, atol=0, rtol=0)


@compiled
@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_layer_in_a_cuda_graph() -> None:
    case = Case(2, 64, 256, QuantSpec(), torch.bfloat16)
    tensors = (case.packed, case.scale, None, case.spec, case.shape, "cuda", torch.bfloat16)
    packed = prepare(*tensors)
    x = case.x.cuda()
    expected = linear(x, packed)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = linear(x, packed)
    y.zero_()
    graph.replay()
    torch.testing.assert_close(y, expected, atol=0, rtol=0)
