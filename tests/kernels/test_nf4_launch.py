"""The Triton kernels on 4-bit weights, against the reference that they import.

They run in the interpreter when TRITON_INTERPRET=1 is set before triton is imported;
`test_kernels_in_the_interpreter` starts this file again in such a process. The operators of `nf4`
and `nf4_lora` run there, too, told that the CPU is a place for Triton.
"""

import itertools
import warnings
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from qat_kernels import nf4, nf4_launch, nf4_lora, support
from qat_kernels.nf4 import linear_4bit, quantize_4bit
from qat_kernels.nf4_launch import Adapter, dequantize, matmul, multiplies
from qat_kernels.nf4_numerics import (
    BLOCK_SIZES,
    DTYPES,
    Packed4bit,
    Spec4bit,
    dequantize_absmax,
    reference,
)
from tests.kernels.interpreter import compiled, interpreted, passed_in_the_interpreter

gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
CPU = torch.device("cpu")

SPECS = [
    Spec4bit(),
    Spec4bit("nf4", 64, False),
    Spec4bit("fp4", 128, True),
    Spec4bit("fp4", 4096, False),
]
SHAPES = [(1, 19, 64), (3, 40, 192), (9, 16, 1024), (17, 33, 1152)]
"""(M, N, K): one chunk; less than a trip, N off the tile; a whole trip; a trip and a part."""
ROUNDING = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
"""Largest relative error of one rounding to the dtype (8 and 11 significant bits)."""


def case(
    m: int, n: int, k: int, spec: Spec4bit, dtype: torch.dtype
) -> tuple[Tensor, Packed4bit, Tensor, Tensor]:
    """(x, packed, W_hat in ``dtype``, bias)."""
    generator = torch.Generator().manual_seed(m * n + k)
    packed = quantize_4bit(torch.randn(n, k, generator=generator), spec)
    weight = reference(packed.codes, dequantize_absmax(packed), spec, (n, k), dtype)
    x = torch.randn(m, k, generator=generator).to(dtype)
    return x, packed, weight, torch.randn(n, generator=generator).to(dtype)


def moved(packed: Packed4bit, device: str) -> Packed4bit:
    return Packed4bit(*(None if t is None else t.to(device) for t in packed))


def check_bound(
    y: Tensor, x: Tensor, weight: Tensor, bias: Tensor, adapter: Adapter | None, roundings: int = 1
) -> None:
    """|y - exact| <= (K + R + 4) 2^-24 * the sum of magnitudes (of the products of bf16 or fp16,
    which fp32 holds, summed in any order; the scaling, its addition, the bias), then each rounding
    to the dtype, of at most that sum."""
    exact = x.double() @ weight.double().T + bias.double()
    size = x.double().abs() @ weight.double().abs().T + bias.double().abs()
    terms = x.shape[1] + 4
    if adapter is not None:
        t, b = adapter.t.double(), adapter.b.to(x.dtype).double()
        exact = exact + adapter.scaling * (t @ b.T)
        size = size + abs(adapter.scaling) * (t.abs() @ b.abs().T)
        terms += t.shape[1]
    summed = 1.001 * terms * 2.0**-24 * size
    # fp16: half of the smallest subnormal
    bound = summed + roundings * (1.01 * ROUNDING[x.dtype] * (size + summed) + 2.0**-25)
    assert bool(((y.double() - exact).abs() <= bound).all())


# ---------------------------------------------------------------------------- in the interpreter


@interpreted
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
def test_dequantize_is_the_reference(quant_type: str, nested: bool, dtype: torch.dtype) -> None:
    """All bytes; whole programs and not, an odd number of values, short last blocks."""
    for size in BLOCK_SIZES:
        assert nf4_launch.check_dequantize(CPU, Spec4bit(quant_type, size, nested), dtype)
    spec = Spec4bit(quant_type, 64, nested)
    for shape in ((1, 1), (3, 7), (33, 161), (2, 3, 50)):
        torch.manual_seed(sum(shape))
        packed = quantize_4bit(torch.randn(shape), spec)
        expected = reference(packed.codes, dequantize_absmax(packed), spec, shape, dtype)
        assert torch.equal(dequantize(packed, spec, shape, dtype), expected)


@interpreted
@pytest.mark.parametrize("spec", SPECS, ids=str)
@pytest.mark.parametrize("dtype", nf4_launch.HALF)
def test_matmul_is_exact_where_sums_are(spec: Spec4bit, dtype: torch.dtype) -> None:
    """Every tile, with bias and adapter."""
    for shape in ((4096, 2048), (8192, 4032)):
        assert nf4_launch.check_matmul(CPU, spec, dtype, shape, adapter=shape[0] == 4096)


@interpreted
@pytest.mark.parametrize("spec", SPECS, ids=str)
@pytest.mark.parametrize(("m", "n", "k"), SHAPES)
def test_matmul_within_the_derived_bound(m: int, n: int, k: int, spec: Spec4bit) -> None:
    for dtype in nf4_launch.HALF:
        x, packed, weight, bias = case(m, n, k, spec, dtype)
        check_bound(matmul(x, packed, spec, n, bias), x, weight, bias, None)
        adapter = Adapter(torch.randn(m, 5).to(dtype), torch.randn(n, 5), -1.5)
        check_bound(matmul(x, packed, spec, n, bias, adapter), x, weight, bias, adapter)


@interpreted
def test_one_column_of_x_gives_one_column_of_the_weight() -> None:
    """All weights come out as they are: K is permuted for x and W alike."""
    spec, n, k = Spec4bit(), 5, 1088
    _, packed, weight, _ = case(1, n, k, spec, torch.bfloat16)
    y = matmul(torch.eye(k, dtype=torch.bfloat16), packed, spec, n, block=(16, 16))
    torch.testing.assert_close(y, weight.T, atol=0, rtol=0)


@interpreted
def test_views_are_read_as_what_they_are() -> None:
    spec, n, k = Spec4bit(), 20, 128
    x, packed, weight, bias = case(4, n, k, spec, torch.bfloat16)
    expected = matmul(x, packed, spec, n, bias)
    strided = torch.stack((x, x), -1)[..., 1]
    shifted = torch.cat((packed.codes[:3], packed.codes))[3:]
    assert not strided.is_contiguous()
    assert shifted.data_ptr() % 16
    packed = packed._replace(codes=shifted)
    assert torch.equal(matmul(strided, packed, spec, n, bias), expected)
    assert torch.equal(dequantize(packed, spec, (n, k), torch.bfloat16), weight)
    assert matmul(x[:0], packed, spec, n, bias).shape == (0, n)
    assert dequantize(packed, spec, (0, k), torch.bfloat16).shape == (0, k)


@pytest.fixture
def triton_everywhere(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Let the operators take the CPU for a GPU; the kernels that they launch, by name."""
    launched: list[str] = []

    def spy(name: str) -> None:
        function = getattr(nf4_launch, name)

        def call(*args: object) -> Tensor:
            launched.append(name)
            return function(*args)

        monkeypatch.setattr(nf4_launch, name, call)

    monkeypatch.setattr(nf4, "kernels_run_on", lambda device: None)
    # tested above, at length
    for name in ("check_matmul", "check_dequantize"):
        monkeypatch.setattr(nf4_launch, name, lambda *args: True)
    monkeypatch.setattr(support, "_VERIFIED", {})
    for name in ("matmul", "dequantize"):
        spy(name)
    return launched


@interpreted
def test_the_operators_choose_by_phase(triton_everywhere: list[str]) -> None:
    spec, n, k = Spec4bit(), 24, 128
    x, packed, weight, bias = case(6, n, k, spec, torch.bfloat16)
    options = (packed, spec, (n, k), torch.bfloat16)
    for shape, path in (
        ((6, 1, k), "matmul"),
        ((2, 3, 1, k), "matmul"),
        ((6, k), "dequantize"),
        ((2, 3, k), "dequantize"),
    ):
        triton_everywhere.clear()
        y = linear_4bit(x.view(shape), *options, bias)
        assert triton_everywhere == [path]
        assert y.shape == (*shape[:-1], n)
        check_bound(y.view(6, n), x, weight, bias, None)
    triton_everywhere.clear()
    assert linear_4bit(x[0], *options, bias).shape == (n,)
    assert linear_4bit(x[:0].view(0, 1, k), *options, bias).shape == (0, 1, n)
    assert triton_everywhere == ["matmul", "matmul"]
    # fp32 is always computed on the dequantized weight, and so is what one table does not serve
    triton_everywhere.clear()
    linear_4bit(x[:1].float(), packed, spec, (n, k), torch.float32)
    small = Spec4bit(block_size=32)
    _, packed_small, _, _ = case(6, n, k, small, torch.bfloat16)
    linear_4bit(x[:1], packed_small, small, (n, k), torch.bfloat16)
    assert triton_everywhere == ["dequantize", "dequantize"]


@interpreted
def test_the_adapter_joins_in_the_epilogue(triton_everywhere: list[str]) -> None:
    spec, n, k, r = Spec4bit(), 24, 128, 40
    x, packed, weight, bias = case(3, n, k, spec, torch.bfloat16)
    a, b = torch.randn(r, k) / 8, torch.randn(n, r)
    adapter = Adapter(x @ a.to(x.dtype).T, b, 0.5)
    arguments = (packed, spec, (n, k), torch.bfloat16, a, b, 0.5, bias)
    y = nf4_lora.linear_4bit_lora(x.unsqueeze(1), *arguments)
    assert triton_everywhere == ["matmul"]
    check_bound(y.squeeze(1), x, weight, bias, adapter)
    y = nf4_lora.linear_4bit_lora(x, *arguments)
    assert triton_everywhere == ["matmul", "dequantize"]
    # rounded after the base, too
    check_bound(y, x, weight, bias, adapter, roundings=2)


@interpreted
def test_gradients_go_through_the_dequantizer(triton_everywhere: list[str]) -> None:
    spec, n, k = Spec4bit(), 24, 128
    x, packed, weight, _ = case(3, n, k, spec, torch.bfloat16)
    x = x.unsqueeze(1).requires_grad_()
    grad = torch.randn(3, 1, n).to(torch.bfloat16)
    linear_4bit(x, packed, spec, (n, k), torch.bfloat16).backward(grad)
    assert triton_everywhere == ["matmul", "dequantize"]
    assert torch.equal(x.grad, grad @ weight)


@interpreted
def test_a_kernel_that_computes_wrong_values_is_not_used(
    triton_everywhere: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    spec, n, k = Spec4bit(), 24, 128
    x, packed, weight, bias = case(1, n, k, spec, torch.bfloat16)
    monkeypatch.setattr(nf4_launch, "check_matmul", lambda *args: False)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Some GPU")
    with pytest.warns(RuntimeWarning, match=r"4-bit matmul .* wrong values on Some GPU"):
        y = linear_4bit(x, packed, spec, (n, k), torch.bfloat16, bias)
    assert triton_everywhere == ["dequantize"]
    check_bound(y, x, weight, bias, None)
    monkeypatch.setattr(nf4_launch, "check_dequantize", lambda *args: False)
    monkeypatch.setattr(support, "_VERIFIED", {})
    triton_everywhere.clear()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        assert torch.equal(linear_4bit(x, packed, spec, (n, k), torch.bfloat16, bias), y)
    assert triton_everywhere == []


@interpreted
@pytest.mark.parametrize("name", ["matmul", "dequantize"])
def test_the_self_tests_see_one_wrong_value(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    right = getattr(nf4_launch, name)

    def wrong(*args: object) -> Tensor:
        value: Tensor = right(*args).clone()
        value.view(-1)[-1] += 1
        return value

    monkeypatch.setattr(nf4_launch, name, wrong)
    spec, dtype = Spec4bit(), torch.bfloat16
    if name == "matmul":
        assert not nf4_launch.check_matmul(CPU, spec, dtype, (64, 64), adapter=True)
    else:
        assert not nf4_launch.check_dequantize(CPU, spec, dtype)


@compiled
def test_kernels_in_the_interpreter() -> None:
    assert passed_in_the_interpreter(__file__) == 44


# ---------------------------------------------------------------------------- with the compiler


@compiled
def test_what_the_matmul_does_not_take() -> None:
    spec = Spec4bit()
    assert multiplies(spec, (7, 64), torch.bfloat16) is None
    for other, shape, dtype, why in (
        (replace(spec, block_size=32), (8, 64), torch.bfloat16, "at least 64, this is 32"),
        (spec, (8, 96), torch.bfloat16, "multiples of 64, this is 96"),
        (spec, (8, 0), torch.bfloat16, "multiples of 64, this is 0"),
        (spec, (8, 64), torch.float32, "takes bfloat16 and float16"),
        (spec, (2**20, 2**17), torch.bfloat16, "fewer than 2"),
    ):
        assert why in str(multiplies(other, shape, dtype))


@compiled
def test_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    assert nf4_launch.block_of(1, 4096, True, CPU) == (8, 16)
    assert nf4_launch.block_of(9, 4096, True, CPU) == (16, 16)
    assert nf4_launch.block_of(8, 8192, False, CPU) == (8, 32)
    assert nf4_launch.block_of(9, 8192, True, CPU) == (16, 32)
    assert nf4_launch.block_of(9, 8192, False, CPU) == (16, 16)
    # a consumer's GPU has 99 KiB per program
    monkeypatch.setattr(nf4_launch, "_shared", lambda device: 99 * 1024)
    assert nf4_launch.block_of(9, 8192, True, CPU) == (16, 16)


@compiled
@pytest.mark.parametrize("capability", [80, 90, 100])
def test_what_is_shipped_passes_its_gates(
    capability: int, tmp_path: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("triton")
    from qat_kernels.aot import inspect

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    shipped = list(nf4_launch.shipped())
    assert len(shipped) == 12
    # the others are compiled by `python -m qat_kernels.aot nf4_launch`
    for item in [shipped[i] for i in (0, 3, 6)]:
        binary = inspect(item, capability)
        assert binary.problems == ()
        # never wgmma, which the bundled ptxas miscompiles with register operands
        assert binary.tensor_core == ("" if "dequantize" in item.name else "HMMA")
        limit = nf4_launch._shared(CPU) if "x32" in item.name else 99 * 1024
        assert binary.shared <= limit


# ---------------------------------------------------------------------------- on a GPU


@compiled
@pytest.mark.gpu
@gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("nested", [True, False])
def test_gpu_dequantizes_to_the_same_bits(
    nested: bool, quant_type: str, dtype: torch.dtype
) -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    for size in BLOCK_SIZES:
        assert nf4_launch.check_dequantize(device, Spec4bit(quant_type, size, nested), dtype)
    spec = Spec4bit(quant_type, 64, nested)
    for shape in ((1, 1), (33, 161), (64, 4096)):
        packed = quantize_4bit(torch.randn(shape), spec)
        expected = reference(packed.codes, dequantize_absmax(packed), spec, shape, dtype)
        for start in (0, 3):
            codes = torch.cat((packed.codes[:start], packed.codes)).cuda()[start:]
            there = moved(packed, "cuda")._replace(codes=codes)
            assert torch.equal(dequantize(there, spec, shape, dtype).cpu(), expected)


@compiled
@pytest.mark.gpu
@gpu
@pytest.mark.parametrize("dtype", nf4_launch.HALF)
@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_gpu_self_tests(spec: Spec4bit, dtype: torch.dtype) -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    for n, k, with_adapter in itertools.product((4096, 8192), (2048, 4032), (False, True)):
        assert nf4_launch.check_matmul(device, spec, dtype, (n, k), with_adapter)


@compiled
@pytest.mark.gpu
@gpu
@pytest.mark.parametrize("dtype", nf4_launch.HALF)
@pytest.mark.parametrize("spec", SPECS, ids=str)
@pytest.mark.parametrize(("m", "n", "k"), [*SHAPES, (33, 8200, 2048)])
def test_gpu_matmul(m: int, n: int, k: int, spec: Spec4bit, dtype: torch.dtype) -> None:
    x, packed, weight, bias = case(m, n, k, spec, dtype)
    adapter = Adapter(torch.randn(m, 24).to(dtype), torch.randn(n, 24), 2.0)
    there, x_there, bias_there = moved(packed, "cuda"), x.cuda(), bias.cuda()

    def run(rows: slice, block: tuple[int, int] | None = None) -> Tensor:
        added = Adapter(adapter.t[rows].cuda(), adapter.b.cuda(), 2.0)
        return matmul(x_there[rows], there, spec, n, bias_there, added, block).cpu()

    y = run(slice(None))
    check_bound(y, x, weight, bias, adapter)
    # no tile and no other row changes a bit
    for block in ((8, 16), (16, 16)):
        assert torch.equal(run(slice(None), block), y)
    alone = torch.cat([run(slice(i, i + 1)) for i in range(m)])
    assert torch.equal(alone, y)


@compiled
@pytest.mark.gpu
@gpu
def test_gpu_operators_in_a_cuda_graph_and_compiled() -> None:
    spec, n, k = Spec4bit(), 256, 1024
    x, packed, weight, bias = case(2, n, k, spec, torch.bfloat16)
    there, x_there, bias_there = moved(packed, "cuda"), x.cuda().unsqueeze(1), bias.cuda()

    def function(x: Tensor) -> Tensor:
        return linear_4bit(x, there, spec, (n, k), torch.bfloat16, bias_there)

    eager = function(x_there)
    check_bound(eager.cpu().squeeze(1), x, weight, bias, None)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = function(x_there)
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(captured, eager)
    assert torch.equal(torch.compile(function, fullgraph=True)(x_there), eager)
