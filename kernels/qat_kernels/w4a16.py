r"""Linear layer on packed weights: 16-bit activations times weights of 4 bits (or 2 ... 8).

Equation, for one output feature n (u is the stored code, 0 ... 2^bits - 1)::

    y[m, n] = sum_k x[m, k] * (u[n, k] - 2^(bits-1) - z[n, k // g]) * s[n, k // g]  +  bias[n]

Products and sums are fp32, the result is rounded once to the dtype of x (the int4pack path rounds
once more when there is a bias).

Shape legend: M rows of activations, N output features, K input features, P int32 words along K,
G groups along K, g = K / G. ``x_MK, packed_NP, scale_NG, zero_point_NG, bias_N, y_MN``.

Three paths. `prepare` picks one when a layer is loaded; M never does, so that the row of one
sequence is computed in the same way in every batch:

==========  ====================================================================================
int4pack    CPU (x86 with AVX2 or AVX-512), bf16: ATen ``_weight_int4pack_mm_for_cpu``. It adds
            x * w in fp32 in the order of K, and w = (q - z) * s is exact in fp32 when s and z * s
            are bf16 numbers, so each row equals a plain sequential fp32 sum, bit for bit, on
            every instruction set. Codes of 2 and 3 bits are 4-bit codes, too, and run here.
triton      CUDA, bf16 or fp16, symmetric: the kernel below, fp32 accumulation, fixed K order,
            no atomics. W is the left operand of the dot (W x X^T), since M is small.
reference   everything else, and fp32 always: dequantize per call, then a matmul in fp32. In fp32
            this is functional.linear(x, dequantize(unpack(packed))) bit for bit.
==========  ====================================================================================

Why the tile of the kernel has 32 rows and 2 warps: `wgmma` needs 64 rows and 4 warps, and the
ptxas that Triton 3.6 and 3.7 bundle (12.8) miscompiles `wgmma` with register operands, which is
what dequantized weights are. This tile compiles to `mma.sync` on every architecture.

Sources: layout, compressed-tensors ``pack-quantized``; CPU op, ATen/native/cpu/int4mm_kernel.cpp.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional

from qat_kernels.numerics import QuantSpec, dequantize, pack, unpack

try:
    import triton
    import triton.language as tl
except ImportError:  # no wheel for this platform: the CPU paths need none
    triton = None

Path = Literal["int4pack", "triton", "reference"]

INT4PACK_GROUPS = (256, 128, 64, 32)
"""Group sizes that the ATen op takes, the cheapest (fewest scales) first."""
INT4PACK_ROWS = 16
"""The ATen op takes N in multiples of this; `prepare` pads with zero rows."""
BLOCK_M, BLOCK_N, NUM_WARPS = 16, 32, 2
"""Tile of the Triton kernel, the same for every M (see the module docstring)."""
_CONVERT_ROWS = 1024
"""Rows repacked at a time: the ATen converter reads one int32 per code."""
_INT32_MAX = 2**31 - 1


def reference(
    x: Tensor,
    packed_NP: Tensor,
    scale_NG: Tensor,
    zero_point_NG: Tensor | None = None,
    bias_N: Tensor | None = None,
    *,
    bits: int = 4,
) -> Tensor:
    """The definition that every other path is tested against.

    Args:
        x: [..., K] activations, any float dtype.
        packed_NP: int32 [N, ceil(K * bits / 32)], as `numerics.pack` writes them.
        scale_NG: [N, G], or [N, 1] per channel, or [1, 1] per tensor.
        zero_point_NG: int8 of the shape of scale_NG, or None if symmetric.
        bias_N: [N], or None.
        bits: bits per code, 2 to 8.

    Returns:
        [..., N] in the dtype of x: fp32 matmul, rounded once.
    """
    weight_NK = dequantize(unpack(packed_NP, bits, x.shape[-1]), scale_NG, zero_point_NG)
    bias_N = None if bias_N is None else bias_N.to(torch.float32)
    return functional.linear(x.to(torch.float32), weight_NK, bias_N).to(x.dtype)


def _jit(function: Any) -> Any:
    return function if triton is None else triton.jit(function)


@_jit
def _w4a16_kernel(
    x_ptr: tl.tensor,
    packed_ptr: tl.tensor,
    scale_ptr: tl.tensor,
    bias_ptr: tl.tensor,
    y_ptr: tl.tensor,
    M: int,
    N: int,
    K: int,
    GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    HAS_BIAS: tl.constexpr,
) -> None:
    """One tile of y: BLOCK_N output features for BLOCK_M rows; all of K, in order.

    x [M, K], packed int32 [N, K / 8], scale [N, K / GROUP], y [M, N], all contiguous;
    BLOCK_K divides GROUP, GROUP divides K.
    """
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    # 64 bits: rows x features of a long prompt can pass 2^31 elements
    n_wide = n.to(tl.int64)
    m_wide = m.to(tl.int64)
    n_ok = n < N
    m_ok = m < M
    word = tl.arange(0, BLOCK_K // 8)
    k = tl.arange(0, BLOCK_K)
    shift = tl.arange(0, 8) * 4
    acc_NM = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for k0 in range(0, K, BLOCK_K):
        packed_offset = n_wide[:, None] * (K // 8) + (k0 // 8 + word)[None, :]
        words = tl.load(packed_ptr + packed_offset, mask=n_ok[:, None], other=0)
        u = (words[:, :, None] >> shift[None, None, :]) & 15
        q_NK = tl.reshape(u, (BLOCK_N, BLOCK_K)) - 8
        x_offset = m_wide[None, :] * K + (k0 + k)[:, None]
        x_KM = tl.load(x_ptr + x_offset, mask=m_ok[None, :], other=0.0)
        scale_offset = n_wide * (K // GROUP) + k0 // GROUP
        scale_N = tl.load(scale_ptr + scale_offset, mask=n_ok, other=0.0).to(tl.float32)
        # codes are exact in bf16 and fp16; the scale joins in fp32, once per BLOCK_K
        part_NM = tl.dot(q_NK.to(x_KM.dtype), x_KM, input_precision="ieee")
        acc_NM += part_NM * scale_N[:, None]
    if HAS_BIAS:
        bias_N = tl.load(bias_ptr + n, mask=n_ok, other=0.0).to(tl.float32)
        acc_NM += bias_N[:, None]
    y_offset = m_wide[None, :] * N + n_wide[:, None]
    y_mask = m_ok[None, :] & n_ok[:, None]
    tl.store(y_ptr + y_offset, acc_NM.to(y_ptr.dtype.element_ty), mask=y_mask)


def interpreted() -> bool:
    """Whether the kernel runs in Triton's interpreter (TRITON_INTERPRET=1 at import)."""
    return triton is not None and not isinstance(_w4a16_kernel, triton.runtime.JITFunction)


def block_k(group: int) -> int | None:
    """Codes per step of the kernel for a group size; None where the kernel does not apply."""
    for size in (128, 64, 32, 16):
        if group % size == 0:
            return size
    return None


def _launch(x_MK: Tensor, packed_NP: Tensor, scale_NG: Tensor, bias_N: Tensor | None) -> Tensor:
    """Run the kernel: x_MK [M, K] contiguous, packed 4-bit codes [N, K / 8]; returns [M, N]."""
    (m, k), n = x_MK.shape, packed_NP.shape[0]
    group = k // scale_NG.shape[1]
    size = block_k(group)
    assert size is not None, "prepare() checked the group"
    out_dtype = x_MK.dtype
    if interpreted():
        # its bf16 arithmetic is wrong and its fp32 -> bf16 truncates: fp32 in and out
        x_MK, scale_NG = x_MK.to(torch.float32), scale_NG.to(torch.float32)
        bias_N = None if bias_N is None else bias_N.to(torch.float32)
    y_MN = torch.empty(m, n, dtype=x_MK.dtype, device=x_MK.device)
    grid = (triton.cdiv(n, BLOCK_N), triton.cdiv(m, BLOCK_M))
    arguments = (x_MK, packed_NP, scale_NG, scale_NG if bias_N is None else bias_N, y_MN, m, n, k)
    tile = {"GROUP": group, "BLOCK_M": BLOCK_M, "BLOCK_N": BLOCK_N, "BLOCK_K": size}
    with torch.cuda.device(x_MK.device) if x_MK.is_cuda else nullcontext():
        _w4a16_kernel[grid](*arguments, **tile, HAS_BIAS=bias_N is not None, num_warps=NUM_WARPS)
    return y_MN.to(out_dtype)


def _int4pack_linear(x_MK: Tensor, codes: Tensor, scale: Tensor, out_features: int) -> Tensor:
    """ATen's op: codes uint8 [N', K / 2] as its converter wrote them, scale bf16 [G, N', 2]."""
    k, n = x_MK.shape[1], codes.shape[0]
    group = k // scale.shape[0]
    # the op indexes x and y with 32-bit integers; rows are independent, so slices change nothing
    rows = _INT32_MAX // max(k, n)
    parts = [
        torch.ops.aten._weight_int4pack_mm_for_cpu(part, codes, group, scale)
        for part in torch.split(x_MK, rows)
    ]
    y_MN: Tensor = parts[0] if len(parts) == 1 else torch.cat(parts)
    return y_MN if n == out_features else y_MN[:, :out_features].contiguous()


@torch.library.custom_op("qat_kernels::w4a16_linear", mutates_args=())
def w4a16_linear(
    x: Tensor,
    codes: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    bias: Tensor | None,
    bits: int,
    out_features: int,
    path: str,
) -> Tensor:
    """The operator behind `linear`, for eager, torch.compile and export; see `PackedWeight`."""
    x_MK = x.reshape(-1, x.shape[-1]).contiguous()
    shape = (*x.shape[:-1], out_features)
    if x_MK.shape[0] == 0:
        return x.new_empty(shape)
    if path == "reference":
        return reference(x_MK, codes, scale, zero_point, bias, bits=bits).view(shape)
    if path == "triton":
        return _launch(x_MK, codes, scale, bias).view(shape)
    y_MN = _int4pack_linear(x_MK, codes, scale, out_features)
    return (y_MN if bias is None else y_MN + bias).view(shape)


@w4a16_linear.register_fake
def _(
    x: Tensor,
    codes: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    bias: Tensor | None,
    bits: int,
    out_features: int,
    path: str,
) -> Tensor:
    return x.new_empty((*x.shape[:-1], out_features))


def _no_backward(ctx: Any, grad: Tensor) -> None:
    raise RuntimeError(
        "qat_kernels::w4a16_linear serves packed weights and has no backward; "
        "train with the fake-quant module, or call it under torch.no_grad()"
    )


w4a16_linear.register_autograd(_no_backward)


@dataclass(frozen=True)
class PackedWeight:
    """A weight [N, K] in the form that one path reads; made by `prepare`.

    The tensors by path: ``int4pack`` codes uint8 [N', K/2] in ATen's tiling, scale bf16 [G', N', 2]
    holding (s, -z*s), zero_point None; ``triton`` and ``reference`` codes int32 [N, P], scale
    [N, G] (broadcastable for ``reference``), zero_point int8 like scale or None.
    """

    path: Path
    """Which implementation runs."""
    codes: Tensor
    """Packed codes."""
    scale: Tensor
    """Scales."""
    zero_point: Tensor | None
    """Zero points, or None."""
    bits: int
    """Bits per code as stored in ``codes``."""
    out_features: int
    """N."""
    in_features: int
    """K."""
    dtype: torch.dtype
    """Dtype of the activations."""


def _expand_scale(scale: Tensor, n: int) -> Tensor:
    return scale.expand(n, scale.shape[1])


def _exact_in_bf16(value: Tensor) -> bool:
    return torch.equal(value.to(torch.bfloat16).to(torch.float32), value)


def _int4pack_operands(
    codes_NK: Tensor, scale: Tensor, zero_point: Tensor | None
) -> tuple[Tensor, Tensor] | None:
    """(codes, scale) for ATen's op, or None where it would not be exact or does not apply.

    codes_NK int8 in -8 ... 7, scale fp32 and zero_point int8 [N or 1, G].
    """
    n, k = codes_NK.shape
    n_pad = -(-n // INT4PACK_ROWS) * INT4PACK_ROWS
    groups = [g for g in INT4PACK_GROUPS if (k // scale.shape[1]) % g == 0]
    if not groups or n_pad * k > _INT32_MAX:
        return None
    zero = torch.zeros_like(scale) if zero_point is None else zero_point.to(torch.float32)
    offset = -(zero * scale)
    if not (_exact_in_bf16(scale) and _exact_in_bf16(offset)):
        return None
    pair = torch.stack((scale, offset), -1).to(torch.bfloat16).expand(n, -1, 2)
    pair = pair.repeat_interleave(k // groups[0] // scale.shape[1], dim=1)
    pair = functional.pad(pair, (0, 0, 0, 0, 0, n_pad - n)).transpose(0, 1).contiguous()
    out = torch.empty(n_pad, k // 2, dtype=torch.uint8)
    for start in range(0, n, _CONVERT_ROWS):
        part = codes_NK[start : start + _CONVERT_ROWS].to(torch.int32) + 8
        part = functional.pad(part, (0, 0, 0, -part.shape[0] % INT4PACK_ROWS), value=8)
        tiled = torch.ops.aten._convert_weight_to_int4pack_for_cpu(part, 1)
        out[start : start + part.shape[0]] = tiled
    return out, pair


def _check(packed: Tensor, scale: Tensor, shape: tuple[int, int], spec: QuantSpec) -> None:
    n, k = shape
    words = -(-k * spec.bits // 32)
    if packed.dtype != torch.int32 or tuple(packed.shape) != (n, words):
        raise ValueError(
            f"packed codes: expected int32 {(n, words)} for a weight {shape} of {spec.bits} bits, "
            f"got {packed.dtype} {tuple(packed.shape)}"
        )
    groups = k // spec.group_of(k)
    rows = 1 if spec.granularity == "tensor" else n
    if tuple(scale.shape) != (rows, groups) or not scale.is_floating_point():
        raise ValueError(
            f"scale: expected a float tensor {(rows, groups)} for a weight {shape} with "
            f"granularity={spec.granularity}, got {scale.dtype} {tuple(scale.shape)}"
        )


def _choose(
    spec: QuantSpec, shape: tuple[int, int], device: torch.device, dtype: torch.dtype
) -> Path:
    if spec.bits > 4 or spec.family != "int":
        return "reference"
    if device.type == "cpu" and dtype == torch.bfloat16:
        # elsewhere the op is a scalar loop, and on ARM it truncates the result to bf16
        fast = torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512")
        return "int4pack" if fast else "reference"
    half = dtype in (torch.bfloat16, torch.float16)
    if device.type == "cuda" and half and triton is not None and spec.symmetric:
        return "triton" if block_k(spec.group_of(shape[1])) else "reference"
    return "reference"


def prepare(
    packed: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    spec: QuantSpec,
    shape: tuple[int, int],
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.bfloat16,
    path: Path | None = None,
) -> PackedWeight:
    """Choose a path for one weight and bring its tensors into that path's form.

    Args:
        packed: int32 [N, ceil(K * bits / 32)], as `numerics.pack` writes them.
        scale: [N, G], [N, 1] or [1, 1], as ``spec.granularity`` says; any float dtype.
        zero_point: int8 of the shape of scale; None if symmetric.
        spec: bits, granularity and group size of the weight.
        shape: (N, K).
        device: where the layer will run.
        dtype: dtype of the activations: float32 (exact reference), bfloat16 or float16.
        path: take this path instead of choosing; for tests and comparisons.

    Raises:
        ValueError: shapes or dtypes do not fit each other, or ``path`` cannot run this weight.
    """
    device = torch.device(device)
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(f"dtype={dtype}: packed layers take float32, bfloat16 or float16")
    _check(packed, scale, shape, spec)
    if zero_point is not None and (zero_point.dtype, zero_point.shape) != (torch.int8, scale.shape):
        raise ValueError(
            f"zero point: expected int8 {tuple(scale.shape)}, "
            f"got {zero_point.dtype} {tuple(zero_point.shape)}"
        )
    chosen = path or _choose(spec, shape, device, dtype)
    scale = scale.to(torch.float32)
    n, k = shape
    if chosen == "int4pack":
        operands = _int4pack_operands(unpack(packed, spec.bits, shape[1]), scale, zero_point)
        if operands is not None:
            return PackedWeight("int4pack", operands[0], operands[1], None, 4, n, k, dtype)
        if path:
            raise ValueError(f"path=int4pack cannot represent this weight {shape} exactly")
    if chosen == "triton":
        if zero_point is not None or spec.bits > 4 or block_k(spec.group_of(shape[1])) is None:
            raise ValueError(
                "path=triton takes symmetric codes of 2 to 4 bits in groups of a multiple of 16"
            )
        words = packed if spec.bits == 4 else pack(unpack(packed, spec.bits, shape[1]), 4)
        scale_NG = _expand_scale(scale, shape[0]).contiguous()
        if _exact_in_bf16(scale_NG):
            scale_NG = scale_NG.to(torch.bfloat16)
        codes = words.contiguous().to(device)
        return PackedWeight("triton", codes, scale_NG.to(device), None, 4, n, k, dtype)
    zero = None if zero_point is None else zero_point.to(device)
    codes = packed.contiguous().to(device)
    return PackedWeight("reference", codes, scale.to(device), zero, spec.bits, n, k, dtype)


def linear(x: Tensor, weight: PackedWeight, bias: Tensor | None = None) -> Tensor:
    """Multiply x [..., K] by the packed weight and add the bias [N]: [..., N], dtype of x.

    Inference only: a backward pass through it raises RuntimeError.

    Raises:
        ValueError: x has another dtype than the weight was prepared for, or another K; the bias
            has another shape.
    """
    if x.dtype != weight.dtype:
        raise ValueError(f"x is {x.dtype}, but this layer was prepared for {weight.dtype}")
    if x.shape[-1] != weight.in_features:
        raise ValueError(f"x {tuple(x.shape)} ends in K = {x.shape[-1]}, not {weight.in_features}")
    if bias is not None and tuple(bias.shape) != (weight.out_features,):
        raise ValueError(f"bias {tuple(bias.shape)}: expected ({weight.out_features},)")
    output: Tensor = w4a16_linear(
        x,
        weight.codes,
        weight.scale,
        weight.zero_point,
        bias,
        weight.bits,
        weight.out_features,
        weight.path,
    )
    return output
