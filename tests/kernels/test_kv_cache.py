"""Operators of the KV cache on the reference path: choice, buffers, registration, wrong input."""

import pytest
import torch
from torch import Tensor

from qat_kernels import kv_cache, support
from qat_kernels.kv_cache import (
    BITS,
    Buffers,
    allocate,
    attention,
    bytes_per_token,
    choose,
    dequantize,
    quantize,
    read,
    reference,
    write,
)

CPU = torch.device("cpu")


def some(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def filled(bits: int, d: int = 80) -> tuple[Buffers, Tensor, Tensor]:
    """Two sequences, two kv heads, 9 slots; all written."""
    buffers = allocate(2, 2, 9, d, bits)
    k, v = some(2, 2, 2, 9, d)
    write(buffers, k, v, 0)
    return buffers, k, v


@pytest.mark.parametrize("bits", BITS)
def test_written_in_pieces_or_at_once_is_the_same(bits: int) -> None:
    whole, k, v = filled(bits)
    pieces = allocate(2, 2, 9, 80, bits)
    for start, end in ((0, 4), (4, 5), (5, 9)):
        write(pieces, k[:, :, start:end], v[:, :, start:end], start)
    torch.testing.assert_close(pieces.tensors, whole.tensors, atol=0, rtol=0)
    for got, x in zip(read(whole, 7, torch.bfloat16), (k, v)):
        expected = dequantize(*quantize(x[:, :, :7], bits), torch.bfloat16)
        torch.testing.assert_close(got, expected, atol=0, rtol=0)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_is_the_reference(dtype: torch.dtype, bits: int) -> None:
    buffers, _, _ = filled(bits)
    q, span = some(2, 14, 80).to(dtype), torch.tensor([[0, 2], [9, 8]], dtype=torch.int32)
    expected = reference(q, *buffers.tensors, span, 80**-0.5)
    torch.testing.assert_close(attention(q, buffers, span), expected, atol=0, rtol=0)
    windowed = reference(q, *buffers.tensors, span, 0.5, 3)
    torch.testing.assert_close(attention(q, buffers, span, 0.5, 3), windowed, atol=0, rtol=0)


@pytest.mark.parametrize("bits", BITS)
def test_bytes_held_are_those_of_codes_and_scales(bits: int) -> None:
    buffers = allocate(3, 4, 100, 128, bits)
    assert buffers.nbytes == 3 * 100 * bytes_per_token(4, 128, bits)
    assert (buffers.capacity, buffers.head_size) == (100, 128)


def test_empty_batch_and_no_new_tokens() -> None:
    buffers = allocate(0, 2, 4, 64)
    write(buffers, torch.zeros(0, 2, 1, 64), torch.zeros(0, 2, 1, 64), 0)
    span = torch.zeros(2, 0, dtype=torch.int32)
    assert tuple(attention(torch.zeros(0, 4, 64), buffers, span).shape) == (0, 4, 64)
    buffers, _, _ = filled(8)
    before = [tensor.clone() for tensor in buffers.tensors]
    write(buffers, torch.zeros(2, 2, 0, 80), torch.zeros(2, 2, 0, 80), 9)
    torch.testing.assert_close(list(buffers.tensors), before, atol=0, rtol=0)


def test_strided_input() -> None:
    buffers, k, v = filled(8)
    strided = allocate(2, 2, 9, 80)
    k2, v2 = (torch.stack((x, x), -1)[..., 0].transpose(1, 2).contiguous() for x in (k, v))
    write(strided, k2.transpose(1, 2), v2.transpose(1, 2), 0)
    torch.testing.assert_close(strided.tensors, buffers.tensors, atol=0, rtol=0)
    q = some(2, 80, 4).transpose(1, 2)
    span = torch.tensor([[0, 0], [9, 9]], dtype=torch.int32)
    expected = attention(q.contiguous(), buffers, span)
    torch.testing.assert_close(attention(q, buffers, span), expected, atol=0, rtol=0)


def test_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    shape = (1, 8, 2, 1000, 128)
    assert choose(shape, CPU).path == "reference"
    # as on a GPU whose self-test passes
    monkeypatch.setattr(kv_cache, "kernels_run_on", lambda device: None)
    monkeypatch.setattr(kv_cache, "verified", lambda name, device, check: True)
    assert choose(shape, CPU, dtype=torch.float16, bits=4).path == "triton"
    assert "float32" in choose(shape, CPU, dtype=torch.float32).reason
    assert "head size 72" in choose((1, 8, 2, 1000, 72), CPU).reason
    assert "32-bit" in choose((1, 8, 2, 2**25, 128), CPU).reason
    monkeypatch.setattr(kv_cache, "verified", lambda name, device, check: False)
    assert "self-test" in choose(shape, CPU).reason
    for wrong in ((1, 8, 3, 1000, 128), (1, 8, 2, 1000), (1, 8, 0, 1000, 128)):
        with pytest.raises(ValueError, match="query heads"):
            choose(wrong, CPU)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="bits=5"):
        choose(shape, CPU, bits=5)


def test_wrong_sizes() -> None:
    for name, sizes in {
        "kv_heads=0": (1, 0, 4, 64),
        "capacity=0": (1, 1, 0, 64),
        "head_size=0": (1, 1, 4, 0),
        "batch=-1": (-1, 1, 4, 64),
    }.items():
        with pytest.raises(ValueError, match=name):
            allocate(*sizes)
    with pytest.raises(ValueError, match="even"):
        allocate(1, 1, 4, 65, bits=4)
    with pytest.raises(ValueError, match="bits=3"):
        allocate(1, 1, 4, 64, bits=3)
    if not support.interpreted():
        with pytest.raises(ValueError, match="path=triton"):
            allocate(1, 1, 4, 64, path="triton")


def test_wrong_buffers() -> None:
    k, s, v, t = filled(8)[0].tensors
    strided = torch.stack((k, k), -1)[..., 0]
    for name, tensors in {
        "k_codes": (strided, s, v, t),
        "k_scale": (k, s.float(), v, t),
        "v_codes": (k, s, v[:, :, :8].contiguous(), t),
        "v_scale": (k, s, v, t[:1]),
    }.items():
        with pytest.raises(ValueError, match=f"{name}: expected contiguous"):
            Buffers(*tensors, 8, "reference")
    with pytest.raises(ValueError, match="for 4 bits"):
        Buffers(k, s, v, t, 4, "reference")
    huge = torch.empty(1, 1, 2**25, 128, dtype=torch.int8, device="meta")
    scale = torch.empty(1, 1, 2**25, dtype=torch.bfloat16, device="meta")
    with pytest.raises(ValueError, match="32-bit offsets"):
        Buffers(huge, scale, huge, scale, 8, "triton")


def test_wrong_writes() -> None:
    buffers, k, v = filled(8)
    one = k[:, :, :1]
    for wrong in (k[:1], k[:, :1], k[..., :64], k[0], one.to(torch.int32)):
        with pytest.raises(ValueError, match=r"k: expected a float tensor"):
            write(buffers, wrong, one, 0)
    with pytest.raises(ValueError, match=r"v: expected a float tensor"):
        write(buffers, one, v[:, :, :2], 0)
    with pytest.raises(ValueError, match="do not fit the capacity of 9"):
        write(buffers, one, one, 9)
    with pytest.raises(ValueError, match="position=-1"):
        write(buffers, one, one, -1)
    with pytest.raises(ValueError, match="k is on meta"):
        write(buffers, one.to("meta"), one, 0)


def test_wrong_queries() -> None:
    buffers, _, _ = filled(8)
    q, span = some(2, 4, 80), torch.tensor([[0, 0], [9, 9]], dtype=torch.int32)
    for wrong in (q[:1], q[:, :3], q[..., :64], q[:, None], q[:, :0]):
        with pytest.raises(ValueError, match="q: expected"):
            attention(wrong, buffers, span)
    for wrong in (span.long(), span[:, :1], span.t().contiguous().t()):
        with pytest.raises(ValueError, match="span: expected"):
            attention(q, buffers, wrong)
    with pytest.raises(ValueError, match="span is on meta"):
        attention(q, buffers, span.to("meta"))
    with pytest.raises(ValueError, match="window=0"):
        attention(q, buffers, span, window=0)
    with pytest.raises(ValueError, match=r"q is torch\.int64"):
        attention(q.long(), buffers, span)
    fused = Buffers(*buffers.tensors, 8, "triton")
    with pytest.raises(ValueError, match=r"q is torch\.float32: the kernel"):
        attention(q, fused, span)


def test_operator_registration() -> None:
    buffers, k, v = filled(4)
    span = torch.tensor([[0, 0], [9, 9]], dtype=torch.int32)
    utils = ("test_schema", "test_faketensor", "test_aot_dispatch_static")
    arguments = (some(2, 4, 80), *buffers.tensors, span, 0.1, 100, "reference")
    torch.library.opcheck(kv_cache.kv_cache_attention, arguments, test_utils=utils)
    new = (k[:, :, :2], v[:, :, :2], *buffers.tensors, 3, "reference")
    torch.library.opcheck(kv_cache.kv_cache_write, new, test_utils=utils)


def test_compiles_without_breaks() -> None:
    buffers, k, v = filled(8)
    span = torch.tensor([[0, 0], [9, 9]], dtype=torch.int32)

    def step(k: Tensor, v: Tensor, q: Tensor) -> Tensor:
        write(buffers, k, v, 8)
        return attention(q, buffers, span)

    new, q = (k[:, :, :1] + 1, v[:, :, :1] - 1), some(2, 4, 80)
    expected = step(*new, q)
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*new, q), expected, atol=0, rtol=0)


def test_backward_says_what_to_do() -> None:
    buffers, _, _ = filled(8)
    span = torch.tensor([[0, 0], [9, 9]], dtype=torch.int32)
    out = attention(some(2, 4, 80).requires_grad_(), buffers, span)
    with pytest.raises(RuntimeError, match="no backward"):
        out.sum().backward()


def test_self_test_compares_with_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter's run of the kernels is in test_kv_cache_triton; here they are replaced."""
    monkeypatch.setattr(kv_cache, "interpreted", lambda: True)

    def launch_write(k: Tensor, v: Tensor, buffers: tuple[Tensor, ...], position: int) -> None:
        kv_cache.kv_cache_write(k, v, *buffers, position, "reference")

    monkeypatch.setattr(kv_cache, "launch_write", launch_write)
    monkeypatch.setattr(
        kv_cache.kernels, "launch_decode", lambda q, buffers, *rest: reference(q, *buffers, *rest)
    )
    for bits in BITS:
        assert kv_cache.self_test(CPU, torch.bfloat16, bits, 80)
    monkeypatch.setattr(
        kv_cache.kernels,
        "launch_decode",
        lambda q, buffers, *rest: reference(q, *buffers, *rest).roll(1, -1),
    )
    assert not kv_cache.self_test(CPU, torch.bfloat16, 8, 80)
