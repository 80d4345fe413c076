r"""Operators of the quantized KV cache: write new tokens, and attend to the codes.

Equations and layout: `qat_kernels.kv_cache_numerics`. `allocate` chooses the path of a cache:

=========  =====================================================================================
triton     CUDA, bf16 or fp16 queries, the head sizes of `kv_cache_triton`: write is one launch
           for keys and values, attention reads the codes directly, splits long sequences and
           adds the splits up in a fixed order. A sequence's result does not depend on its batch.
reference  everything else: dequantize, then softmax attention, all in fp32.
=========  =====================================================================================

Shape legend: B sequences, H kv heads, G query heads per kv head, T new tokens, C capacity in
tokens, D head size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from qat_kernels import kv_cache_triton as kernels
from qat_kernels.kv_cache_numerics import (
    BITS,
    NO_WINDOW,
    bytes_per_token,
    check_bits,
    dequantize,
    quantize,
    reference,
)
from qat_kernels.kv_cache_write import launch_write
from qat_kernels.support import Choice, interpreted, kernels_run_on, verified

__all__ = [
    "BITS",
    "Buffers",
    "allocate",
    "attention",
    "bytes_per_token",
    "choose",
    "dequantize",
    "quantize",
    "read",
    "reference",
    "self_test",
    "write",
]

Path = Literal["triton", "reference"]


def choose(
    shape: tuple[int, int, int, int, int],
    device: torch.device,
    *,
    dtype: torch.dtype = torch.bfloat16,
    bits: int = 8,
) -> Choice:
    """The path of a cache of ``shape`` = (B, query heads, kv heads, capacity, head size).

    Raises:
        ValueError: sizes that do not fit each other, or other bits.
    """
    check_bits(bits)
    if len(shape) != 5 or shape[2] < 1 or shape[1] % shape[2]:
        raise ValueError(
            f"shape={shape}: (B, query heads, kv heads, capacity, head size), query heads a "
            "multiple of kv heads"
        )
    slow = kernels_run_on(device)
    if slow is not None:
        return slow
    if dtype not in (torch.bfloat16, torch.float16):
        return Choice("reference", f"{dtype} queries are computed exactly, in fp32")
    if shape[4] not in kernels.HEAD_SIZES:
        sizes = ", ".join(str(size) for size in kernels.HEAD_SIZES)
        return Choice("reference", f"head size {shape[4]} is none of {sizes}")
    if shape[3] * shape[4] >= 2**31:
        return Choice("reference", "one head of one sequence passes 32-bit offsets")
    name = f"kv_cache int{bits} d{shape[4]} {str(dtype).removeprefix('torch.')}"
    if not verified(name, device, lambda: self_test(device, dtype, bits, shape[4])):
        return Choice("reference", "the compiled kernel failed its self-test on this device")
    return Choice("triton", "fused: codes go to the tensor cores, scales join in fp32")


@torch.library.custom_op(
    "qat_kernels::kv_cache_write", mutates_args=("k_codes", "k_scale", "v_codes", "v_scale")
)
def kv_cache_write(
    k: Tensor,
    v: Tensor,
    k_codes: Tensor,
    k_scale: Tensor,
    v_codes: Tensor,
    v_scale: Tensor,
    position: int,
    path: str,
) -> None:
    """The operator behind `write`: quantizes k and v [B, H, T, D] into slots position ...."""
    if k.numel() == 0:
        return
    if path == "triton":
        k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (k, v))
        launch_write(k, v, (k_codes, k_scale, v_codes, v_scale), position)
        return
    bits = 8 * k_codes.shape[-1] // k.shape[-1]
    new = slice(position, position + k.shape[2])
    for x, codes, scale in ((k, k_codes, k_scale), (v, v_codes, v_scale)):
        codes[:, :, new], scale[:, :, new] = quantize(x, bits)


@kv_cache_write.register_fake
def _(
    k: Tensor,
    v: Tensor,
    k_codes: Tensor,
    k_scale: Tensor,
    v_codes: Tensor,
    v_scale: Tensor,
    position: int,
    path: str,
) -> None:
    return None


@torch.library.custom_op("qat_kernels::kv_cache_attention", mutates_args=())
def kv_cache_attention(
    q: Tensor,
    k_codes: Tensor,
    k_scale: Tensor,
    v_codes: Tensor,
    v_scale: Tensor,
    span: Tensor,
    scale: float,
    window: int,
    path: str,
) -> Tensor:
    """The operator behind `attention`; arguments as for `reference`."""
    if q.numel() == 0:
        return torch.empty_like(q)
    if path == "triton":
        q = q.contiguous()
        # the kernel reads 16 bytes at a time
        q = q if q.data_ptr() % 16 == 0 else q.clone()
        buffers = (k_codes, k_scale, v_codes, v_scale)
        return kernels.launch_decode(q, buffers, span, scale, window)
    return reference(q, k_codes, k_scale, v_codes, v_scale, span, scale, window)


@kv_cache_attention.register_fake
def _(
    q: Tensor,
    k_codes: Tensor,
    k_scale: Tensor,
    v_codes: Tensor,
    v_scale: Tensor,
    span: Tensor,
    scale: float,
    window: int,
    path: str,
) -> Tensor:
    return q.new_empty(q.shape)


def _no_backward(ctx: Any, grad: Tensor) -> None:
    raise RuntimeError(
        "qat_kernels::kv_cache_attention decodes and has no backward; train without a cache, or "
        "call it under torch.no_grad()"
    )


kv_cache_attention.register_autograd(_no_backward)


@dataclass(frozen=True)
class Buffers:
    """The cache of one layer: preallocated codes and scales; made by `allocate`.

    Raises ValueError for tensors of other shapes, dtypes or strides than the fields say.
    """

    k_codes: Tensor
    """int8 [B, H, C, D], or uint8 [B, H, C, D / 2]."""
    k_scale: Tensor
    """bf16 [B, H, C]."""
    v_codes: Tensor
    """Like k_codes."""
    v_scale: Tensor
    """Like k_scale."""
    bits: int
    """Bits per code."""
    path: Path
    """Which implementation writes and attends."""

    def __post_init__(self) -> None:
        codes = torch.int8 if self.bits == 8 else torch.uint8
        dtypes = (codes, torch.bfloat16, codes, torch.bfloat16)
        shapes = (self.k_codes.shape, self.k_codes.shape[:3]) * 2
        for i, (tensor, dtype, shape) in enumerate(zip(self.tensors, dtypes, shapes)):
            if tensor.dtype != dtype or tensor.shape != shape or not tensor.is_contiguous():
                name = ("k_codes", "k_scale", "v_codes", "v_scale")[i]
                raise ValueError(
                    f"{name}: expected contiguous {dtype} {tuple(shape)} for {self.bits} bits, got "
                    f"{tensor.dtype} {tuple(tensor.shape)} of strides {tensor.stride()}"
                )
        if self.path == "triton" and self.capacity * self.head_size >= 2**31:
            raise ValueError(f"capacity={self.capacity}: the kernel's 32-bit offsets end before it")

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Codes and scales of the keys, then of the values."""
        return self.k_codes, self.k_scale, self.v_codes, self.v_scale

    @property
    def capacity(self) -> int:
        """Slots per sequence."""
        return self.k_codes.shape[2]

    @property
    def head_size(self) -> int:
        """D."""
        return self.k_codes.shape[3] * 8 // self.bits

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return sum(tensor.nbytes for tensor in self.tensors)


def allocate(
    batch: int,
    kv_heads: int,
    capacity: int,
    head_size: int,
    bits: int = 8,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.bfloat16,
    path: Path | None = None,
) -> Buffers:
    """Empty buffers for ``capacity`` tokens of ``batch`` sequences; ``dtype`` is that of queries.

    ``path`` takes an implementation instead of choosing one, for tests and comparisons.

    Raises:
        ValueError: a size below 1 (batch: below 0), other bits, an odd head size with 4 bits, or a
            ``path`` that cannot run this cache.
    """
    check_bits(bits)
    sizes = {"kv_heads": kv_heads, "capacity": capacity, "head_size": head_size}
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"{name}={size}: at least 1")
    if batch < 0:
        raise ValueError(f"batch={batch}: at least 0")
    if bits == 4 and head_size % 2:
        raise ValueError(f"head_size={head_size}: two 4-bit codes per byte need an even one")
    device = torch.device(device)
    if path is None:
        shape = (batch, kv_heads, kv_heads, capacity, head_size)
        chosen = choose(shape, device, dtype=dtype, bits=bits).path
        path = "triton" if chosen == "triton" else "reference"
    elif path == "triton":
        slow = None if interpreted() else kernels_run_on(device)
        if slow is not None or head_size not in kernels.HEAD_SIZES:
            raise ValueError(f"path=triton: {slow.reason if slow else f'head size {head_size}'}")
    code_dtype = torch.int8 if bits == 8 else torch.uint8
    codes, scales = (batch, kv_heads, capacity, head_size * bits // 8), (batch, kv_heads, capacity)
    k_codes, v_codes = (torch.empty(codes, dtype=code_dtype, device=device) for _ in "kv")
    k_scale, v_scale = (torch.empty(scales, dtype=torch.bfloat16, device=device) for _ in "kv")
    return Buffers(k_codes, k_scale, v_codes, v_scale, bits, path)


def write(buffers: Buffers, k: Tensor, v: Tensor, position: int) -> None:
    """Quantize k and v [B, H, T, D], any float dtype, into slots position ... position + T - 1.

    Raises:
        ValueError: shapes, dtypes or devices do not fit, or the slots pass the capacity.
    """
    b, h, capacity, _ = buffers.k_codes.shape
    expected = (b, h, k.shape[2] if k.dim() == 4 else -1, buffers.head_size)
    for name, x in (("k", k), ("v", v)):
        if tuple(x.shape) != expected or not x.is_floating_point():
            raise ValueError(
                f"{name}: expected a float tensor [B, H, T, D] = [{b}, {h}, T, "
                f"{buffers.head_size}], got {x.dtype} {tuple(x.shape)}"
            )
        if x.device != buffers.k_codes.device:
            raise ValueError(f"{name} is on {x.device}, the cache on {buffers.k_codes.device}")
    if not 0 <= position <= capacity - k.shape[2]:
        raise ValueError(
            f"position={position}: {k.shape[2]} new tokens do not fit the capacity of {capacity}"
        )
    if buffers.path == "triton" and k.dtype == torch.float64:
        k, v = k.to(torch.float32), v.to(torch.float32)
    kv_cache_write(k.detach(), v.detach(), *buffers.tensors, position, buffers.path)


def read(buffers: Buffers, length: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Keys and values [B, H, length, D] of the first ``length`` slots, dequantized to ``dtype``."""
    k_codes, k_scale, v_codes, v_scale = (x[:, :, :length] for x in buffers.tensors)
    return dequantize(k_codes, k_scale, dtype), dequantize(v_codes, v_scale, dtype)


def attention(
    q: Tensor,
    buffers: Buffers,
    span: Tensor,
    scale: float | None = None,
    window: int | None = None,
) -> Tensor:
    """Attention of one query token per sequence: [B, H * G, D] to [B, H * G, D], q's dtype.

    Args:
        q: [B, H * G, D].
        buffers: the cache; the token itself must have been written.
        span: int32 [2, B]: first slot of each sequence (above 0 with left padding), and the slot
            behind its last; cut to the capacity.
        scale: factor of the logits; None takes 1 / sqrt(D).
        window: most slots that are seen, counted from the end; None sees all.

    Raises:
        ValueError: shapes, dtypes or devices do not fit each other, or a window below 1.
    """
    b, h = buffers.k_codes.shape[:2]
    d = buffers.head_size
    if q.dim() != 3 or q.shape[0] != b or q.shape[2] != d or q.shape[1] % h or not q.shape[1]:
        raise ValueError(f"q: expected [{b}, G * {h}, {d}], got {tuple(q.shape)}")
    if span.dtype != torch.int32 or tuple(span.shape) != (2, b) or not span.is_contiguous():
        raise ValueError(
            f"span: expected contiguous int32 (2, {b}), got {span.dtype} {tuple(span.shape)}"
        )
    for name, x in (("q", q), ("span", span)):
        if x.device != buffers.k_codes.device:
            raise ValueError(f"{name} is on {x.device}, the cache on {buffers.k_codes.device}")
    if window is not None and window < 1:
        raise ValueError(f"window={window}: at least 1")
    half = (torch.bfloat16, torch.float16)
    if not q.is_floating_point() or (buffers.path == "triton" and q.dtype not in half):
        raise ValueError(f"q is {q.dtype}: the kernel takes bfloat16 or float16")
    scale = d**-0.5 if scale is None else scale
    window = NO_WINDOW if window is None else min(window, NO_WINDOW)
    out: Tensor = kv_cache_attention(q, *buffers.tensors, span, scale, window, buffers.path)
    return out


def self_test(device: torch.device, dtype: torch.dtype, bits: int, head_size: int) -> bool:
    """Whether the kernels compute exact cases right: codes, uniform and one-hot attention."""
    gen = torch.Generator().manual_seed(bits + head_size)
    b, h, g, length, d = 2, 2, 5, 512, head_size
    x = torch.randn(2, b, h, length + 8, d, generator=gen).to(device, dtype)
    ours, plain = (
        allocate(b, h, length + 8, d, bits, device, dtype, path) for path in ("triton", "reference")
    )
    for buffers in (ours, plain):
        write(buffers, x[0, :, :, :16], x[1, :, :, :16], 0)
        write(buffers, x[0, :, :, 16:37], x[1, :, :, 16:37], 16)
    pairs = zip(ours.tensors, plain.tensors)
    same = all(torch.equal(one[:, :, :37], other[:, :, :37]) for one, other in pairs)
    # codes of magnitude 4 with scale 1, so that logits and sums are integers
    signs = torch.randint(0, 2, x.shape, generator=gen).mul_(8).sub_(4).to(device, dtype)
    for codes, scale, sign in zip(ours.tensors[::2], ours.tensors[1::2], signs):
        codes.copy_(_codes_for(sign, bits))
        scale.fill_(1.0)
    span = torch.tensor([[0, 3], [length, length + 3]], dtype=torch.int32, device=device)
    picked = torch.arange(h * g, device=device) * 97 % length + 3
    for q in (
        # one logit is 16 D above 0, and no other comes near: the answer is one value
        signs[0].repeat_interleave(g, 1)[:, torch.arange(h * g), picked] * 16,
        # all logits are equal: the answer is a mean over a power of two of small integers
        torch.zeros(b, h * g, d, dtype=dtype, device=device),
    ):
        expected = reference(q, *ours.tensors, span, 1.0)
        same = same and torch.equal(attention(q, ours, span, 1.0), expected)
    return same


def _codes_for(values: Tensor, bits: int) -> Tensor:
    """Stored codes of small integers."""
    codes = values.to(torch.int8)
    if bits == 8:
        return codes
    low, high = (codes + 8).to(torch.uint8).chunk(2, -1)
    return low | (high << 4)
