"""Decode attention over a KV cache: against the references that they import, and their binaries.

The kernels run in the interpreter when TRITON_INTERPRET=1 is set before triton is imported;
`test_kernels_in_the_interpreter` starts this file again in such a process.
"""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from qat_kernels import aot, kv_cache
from qat_kernels import kv_cache_triton as kernels
from tests.kernels.interpreter import INTERPRETED, compiled, interpreted, passed_in_the_interpreter

on_gpu = pytest.mark.skipif(
    INTERPRETED or not torch.cuda.is_available(), reason="needs a CUDA device"
)

ROUNDING = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
"""Largest relative error of one rounding to the dtype (8 and 11 significant bits)."""
CASES = [
    # spans (start, end) of each sequence, query heads per kv head, head size
    ([(0, 1)], 1, 64),
    ([(0, 65), (7, 7), (30, 63)], 4, 80),
    ([(0, 257), (100, 300)], 7, 96),
    ([(2, 130)], 17, 128),
    ([(0, 64)], 2, 256),
]


def filled(
    spans: list[tuple[int, int]], heads: int, d: int, bits: int, device: str = "cpu"
) -> kv_cache.Buffers:
    """Random cache, 5 slots longer than the longest sequence; unseen slots have NaN scales."""
    generator = torch.Generator().manual_seed(d + bits)
    b, capacity = len(spans), max(end for _, end in spans) + 5
    buffers = kv_cache.allocate(b, heads, capacity, d, bits, path="reference")
    x = torch.randn(2, b, heads, capacity, d, generator=generator)
    kv_cache.write(buffers, x[0], x[1], 0)
    for i, (start, end) in enumerate(spans):
        for scale in (buffers.k_scale, buffers.v_scale):
            scale[i, :, :start] = scale[i, :, end:] = torch.nan
    return kv_cache.Buffers(*(t.to(device) for t in buffers.tensors), bits, "triton")


def span_of(spans: list[tuple[int, int]], device: str = "cpu") -> Tensor:
    return torch.tensor(spans, dtype=torch.int32).t().contiguous().to(device)


def queries(spans: list[tuple[int, int]], heads: int, d: int, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(heads)
    return (2 * torch.randn(len(spans), heads, d, generator=generator)).to(dtype)


def check_bound(
    out: Tensor, q: Tensor, buffers: kv_cache.Buffers, spans: list[tuple[int, int]]
) -> None:
    """|out - exact| within the bound below, exact being attention over the same codes in fp64.

    e: a logit is an fp32 sum of D products, then scaled: |error| <= (D + 6) 2^-24 scale sum|q k|.
    eta: relative error of a weight: e, exp2 (2^-22), and one exp2 and product per step of a split
    and per split. The quotient of two such sums errs by 2 eta sum p|v|; summing T terms adds
    2 T 2^-24; on the GPU each p * s_v is rounded to bf16; the result is rounded once.
    """
    h, d, g = buffers.k_codes.shape[1], buffers.head_size, q.shape[1] // buffers.k_codes.shape[1]
    out, q = out.cpu().double(), q.cpu()
    for i, (start, end) in enumerate(spans):
        seen = slice(start, end)
        k, v = (
            (kv_cache.dequantize(c[i, :, seen].cpu(), s[i, :, seen].cpu()))
            .double()
            .repeat_interleave(g, 0)
            for c, s in (buffers.tensors[:2], buffers.tensors[2:])
        )
        if start == end:
            assert torch.equal(out[i], torch.zeros(h * g, d, dtype=torch.double))
            continue
        logits = torch.einsum("hd,htd->ht", q[i].double(), k) * d**-0.5
        size = torch.einsum("hd,htd->ht", q[i].double().abs(), k.abs()) * d**-0.5
        p = logits.softmax(-1)
        exact = torch.einsum("ht,htd->hd", p, v)
        reach = torch.einsum("ht,htd->hd", p, v.abs())
        e = ((d + 6) * 2.0**-24 * size).amax(-1, keepdim=True)
        eta = e + ((end - start) / 64 + kernels.MAX_SPLITS + 4) * 2.0**-22
        second_dot = ROUNDING[torch.bfloat16] if buffers.k_codes.is_cuda else 0.0
        bound = 1.01 * reach * (2 * eta + 2 * (end - start) * 2.0**-24 + second_dot)
        bound = bound + 1.01 * ROUNDING[q.dtype] * (exact.abs() + bound) + 2.0**-25
        assert bool(((out[i] - exact).abs() <= bound).all())


# ---------------------------------------------------------------------------- attention


@interpreted
@pytest.mark.parametrize("bits", kv_cache.BITS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("spans", "group", "d"), CASES)
def test_attention_within_the_derived_bound(
    spans: list[tuple[int, int]], group: int, d: int, dtype: torch.dtype, bits: int
) -> None:
    heads = 1 if group > 7 else 2
    buffers = filled(spans, heads, d, bits)
    q = queries(spans, heads * group, d, dtype)
    check_bound(kv_cache.attention(q, buffers, span_of(spans)), q, buffers, spans)


@interpreted
@pytest.mark.parametrize("bits", kv_cache.BITS)
@pytest.mark.parametrize("d", kernels.HEAD_SIZES)
def test_uniform_and_one_hot_attention_are_exact(d: int, bits: int) -> None:
    """Sums of integers over a power of two of tokens, and a single value: no rounding at all."""
    buffers = filled([(0, 512)], 1, d, bits)
    buffers.k_scale.copy_(buffers.k_scale.sign())
    buffers.v_scale.copy_(torch.where(buffers.v_scale < 0, -2.0, 1.0))
    span = span_of([(0, 512)])
    uniform = torch.zeros(1, 3, d, dtype=torch.float16)
    ours, plain = buffers, replace(buffers, path="reference")
    expected = kv_cache.attention(uniform, plain, span)
    torch.testing.assert_close(kv_cache.attention(uniform, ours, span), expected, atol=0, rtol=0)
    # a vector's product with itself is far above that with another random one
    keys = kv_cache.read(plain, 512, torch.float16)[0][0, 0]
    one_hot = keys[[0, 100, 511]].unsqueeze(0)
    expected = kv_cache.read(plain, 512, torch.float16)[1][0, :, [0, 100, 511]]
    got = kv_cache.attention(one_hot, ours, span, scale=16.0)
    torch.testing.assert_close(got, expected, atol=0, rtol=0)


def check_invariance(device: str = "cpu") -> None:
    """A sequence alone, padded, in a batch, in larger buffers, and repeated: the same bits."""
    spans, d = [(0, 300)], 64
    alone = filled(spans, 1, d, 8, device)
    q = queries(spans, 3, d, torch.bfloat16).to(device)
    expected = kv_cache.attention(q, alone, span_of(spans, device))
    torch.testing.assert_close(
        kv_cache.attention(q, alone, span_of(spans, device)), expected, atol=0, rtol=0
    )
    tensors = []
    for tensor in alone.tensors:
        larger = tensor.new_ones(2, 1, 900, *tensor.shape[3:])
        larger[1, :, 53:353] = tensor[0, :, :300]
        tensors.append(larger)
    batch = kv_cache.Buffers(*tensors, 8, "triton")
    both = torch.cat((q + 1, q))
    got = kv_cache.attention(both, batch, span_of([(0, 900), (53, 353)], device))
    torch.testing.assert_close(got[1:], expected, atol=0, rtol=0)


@interpreted
def test_a_sequence_depends_on_itself_only() -> None:
    check_invariance()


@interpreted
def test_window_and_spans_beyond_the_buffers() -> None:
    buffers = filled([(0, 200)], 2, 64, 8)
    q = queries([(0, 200)], 4, 64, torch.bfloat16)
    cut = kv_cache.attention(q, buffers, span_of([(130, 200)]))
    windowed = kv_cache.attention(q, buffers, span_of([(0, 200)]), window=70)
    torch.testing.assert_close(windowed, cut, atol=0, rtol=0)
    check_bound(windowed, q, buffers, [(130, 200)])
    # 205 slots: what lies outside is cut off, not read
    wide = replace(
        buffers, k_scale=buffers.k_scale.nan_to_num(), v_scale=buffers.v_scale.nan_to_num()
    )
    got = kv_cache.attention(q, wide, span_of([(-4, 999)]))
    torch.testing.assert_close(
        got, kv_cache.attention(q, wide, span_of([(0, 205)])), atol=0, rtol=0
    )


@interpreted
def test_more_tokens_than_the_least_splits_hold() -> None:
    length = kernels.MIN_CHUNK * kernels.MAX_SPLITS + 100
    buffers = filled([(0, length)], 1, 64, 8)
    q = queries([(0, length)], 1, 64, torch.bfloat16)
    got = kv_cache.attention(q, buffers, span_of([(0, length)]))
    check_bound(got, q, buffers, [(0, length)])


@interpreted
@pytest.mark.filterwarnings("ignore:.*encountered in.*:RuntimeWarning")
def test_a_vector_that_was_not_finite_makes_the_answer_nan() -> None:
    buffers = filled([(0, 20), (0, 20)], 1, 64, 4)
    buffers.k_scale[1, 0, 3] = torch.nan
    got = kv_cache.attention(
        queries([(0, 20)] * 2, 2, 64, torch.bfloat16), buffers, span_of([(0, 20)] * 2)
    )
    assert bool(got[0].isfinite().all())
    assert bool(got[1].isnan().all())


@interpreted
def test_the_self_test_passes_and_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = (torch.device("cpu"), torch.bfloat16, 8, 64)
    assert kv_cache.self_test(*arguments)
    right = kernels.launch_decode
    monkeypatch.setattr(kernels, "launch_decode", lambda *a: right(*a) + 2.0**-6)
    assert not kv_cache.self_test(*arguments)


@compiled
def test_kernels_in_the_interpreter() -> None:
    assert passed_in_the_interpreter(__file__) == 35


# ---------------------------------------------------------------------------- binaries, GPU


@compiled
@pytest.mark.parametrize("capability", [80, 90, 100])
@pytest.mark.parametrize("name", ["decode int8 d128", "decode int4 d80", "combine"])
def test_kernels_compile_without_a_gpu(
    name: str, capability: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("triton")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    item = next(item for item in kernels.shipped() if item.name == f"kv_cache {name}")
    binary = aot.inspect(item, capability)
    assert binary.problems == ()
    assert binary.tensor_core == ("HMMA" if "decode" in name else "")


@compiled
def test_every_head_size_is_shipped() -> None:
    pytest.importorskip("triton")
    names = [item.name for item in kernels.shipped()]
    assert len(names) == len(set(names)) == 11
    for d in kernels.HEAD_SIZES:
        assert {f"kv_cache decode int{bits} d{d}" for bits in kv_cache.BITS} <= set(names)


@on_gpu
@pytest.mark.gpu
@pytest.mark.parametrize("bits", kv_cache.BITS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("d", kernels.HEAD_SIZES)
def test_kernels_on_the_gpu(d: int, dtype: torch.dtype, bits: int) -> None:
    assert kv_cache.self_test(torch.device("cuda"), dtype, bits, d)
    spans = [(0, 4100), (7, 7), (130, 4000), (0, 1)]
    for group in (1, 4, 7, 17):
        buffers = filled(spans, 2, d, bits, "cuda")
        q = queries(spans, 2 * group, d, dtype)
        got = kv_cache.attention(q.cuda(), buffers, span_of(spans, "cuda"))
        check_bound(got, q, buffers, spans)


@on_gpu
@pytest.mark.gpu
def test_long_and_invariant_on_the_gpu() -> None:
    check_invariance("cuda")
    spans = [(0, 40_000), (20_001, 40_000)]
    buffers = filled(spans, 2, 128, 8, "cuda")
    q = queries(spans, 8, 128, torch.bfloat16)
    check_bound(kv_cache.attention(q.cuda(), buffers, span_of(spans, "cuda")), q, buffers, spans)


@on_gpu
@pytest.mark.gpu
def test_attention_in_a_cuda_graph() -> None:
    spans = [(0, 700)]
    buffers, span = filled(spans, 2, 128, 8, "cuda"), span_of(spans, "cuda")
    q = queries(spans, 8, 128, torch.bfloat16).cuda()
    expected = kv_cache.attention(q, buffers, span)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = kv_cache.attention(q, buffers, span)
    graph.replay()
    torch.testing.assert_close(out, expected, atol=0, rtol=0)
