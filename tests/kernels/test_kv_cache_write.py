"""Quantize-on-write of the KV cache: codes and scales equal to the imported reference's.

The kernel runs in the interpreter when TRITON_INTERPRET=1 is set before triton is imported;
`test_kernel_in_the_interpreter` starts this file again in such a process.
"""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from qat_kernels import aot, kv_cache, kv_cache_triton, kv_cache_write
from tests.kernels.interpreter import INTERPRETED, compiled, interpreted, passed_in_the_interpreter

on_gpu = pytest.mark.skipif(
    INTERPRETED or not torch.cuda.is_available(), reason="needs a CUDA device"
)


def special(dtype: torch.dtype) -> Tensor:
    """Vectors [8, 64]: zeros, NaN, infinity, halves between codes, huge, tiny, and two random."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(8, 64, generator=generator)
    x[0] = 0.0
    x[1, 5], x[2, 9] = torch.nan, -torch.inf
    # the largest value is 127.5 (or -8) and the scale 1: everything else lies between two codes
    x[3] = torch.arange(64) - 31.5
    x[3, 0] = 127.5
    x[4] = (torch.arange(64) % 16 - 7.5).clamp(min=-7.5)
    x[4, 1] = -8.0
    x[5] *= torch.finfo(dtype).max / x[5].abs().max()
    x[6] *= torch.finfo(dtype).tiny
    return x.to(dtype)


def check_write(bits: int, dtype: torch.dtype, d: int, device: str = "cpu") -> None:
    """Same codes and scales as the reference, from strided input; other slots untouched."""
    generator = torch.Generator().manual_seed(d)
    # [B, T, H, D] transposed, as models pass them
    k, v = torch.randn(2, 2, 3, 2, d, generator=generator).to(device, dtype).transpose(2, 3)
    ours, plain = (
        kv_cache.allocate(2, 2, 7, d, bits, device, path=path) for path in ("triton", "reference")
    )
    for buffers in (ours, plain):
        for tensor in buffers.tensors:
            tensor.fill_(3)
        kv_cache.write(buffers, k, v, 2)
        kv_cache.write(buffers, k[:, :, :1], v[:, :, :1], 6)
    for one, other in zip(ours.tensors, plain.tensors):
        torch.testing.assert_close(one, other, atol=0, rtol=0)
        assert bool((one[:, :, :2] == 3).all())


@interpreted
@pytest.mark.parametrize("bits", kv_cache.BITS)
@pytest.mark.parametrize(
    ("dtype", "d"),
    [
        (torch.bfloat16, 64),
        (torch.float16, 80),
        (torch.float32, 96),
        (torch.bfloat16, 128),
        (torch.bfloat16, 256),
        (torch.float64, 64),
    ],
)
def test_written_codes_are_those_of_the_reference(bits: int, dtype: torch.dtype, d: int) -> None:
    check_write(bits, dtype, d)


def check_special(bits: int, dtype: torch.dtype, device: str = "cpu") -> None:
    x = special(dtype).view(1, 1, 8, 64).to(device)
    ours = kv_cache.allocate(1, 1, 8, 64, bits, device, path="triton")
    kv_cache.write(ours, x, -x, 0)
    for sign, codes, scale in ((1, *ours.tensors[:2]), (-1, *ours.tensors[2:])):
        expected = kv_cache.quantize(sign * x, bits)
        torch.testing.assert_close((codes, scale), expected, atol=0, rtol=0, equal_nan=True)


@interpreted
@pytest.mark.filterwarnings("ignore:.*encountered in.*:RuntimeWarning")
@pytest.mark.parametrize("bits", kv_cache.BITS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_special_vectors(bits: int, dtype: torch.dtype) -> None:
    check_special(bits, dtype)


@compiled
def test_kernel_in_the_interpreter() -> None:
    assert passed_in_the_interpreter(__file__) == 18


@compiled
@pytest.mark.parametrize("capability", [80, 90, 100])
def test_kernel_compiles_without_a_gpu(
    capability: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("triton")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    for item in kv_cache_write.shipped():
        assert aot.inspect(item, capability).problems == ()


@on_gpu
@pytest.mark.gpu
@pytest.mark.parametrize("bits", kv_cache.BITS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_kernel_on_the_gpu(dtype: torch.dtype, bits: int) -> None:
    check_special(bits, dtype, "cuda")
    for d in kv_cache_triton.HEAD_SIZES:
        check_write(bits, dtype, d, "cuda")
