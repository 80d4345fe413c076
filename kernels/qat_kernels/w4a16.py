r"""Linear layer on packed weights: 16-bit activations times weights of 4 bits (or 2 ... 8).

Equation, for one output feature n (u is the stored code, 0 ... 2^bits - 1)::

    y[m, n] = sum_k x[m, k] * (u[n, k] - 2^(bits-1) - z[n, k // g]) * s[n, k // g]
              + bias[n] + residual[m, n]

Products and sums are fp32, the result is rounded once to the dtype of x (int4pack and int8pack
round once more for a bias or a residual; prefill rounds the weights to 16 bits).

Shape legend: M rows of activations, N output features, K input features, P int32 words along K,
G groups along K, g = K / G. ``x_MK, packed_NP, scale_NG, zero_point_NG, bias_N, y_MN``.

`choose` decides the path from the layer's shape and the phase, never from M: the row of one
sequence is decoded in the same way in every batch. `prepare` asks it when a layer is loaded.

==========  ====================================================================================
int4pack    CPU (x86 with AVX2 or AVX-512), bf16: ATen ``_weight_int4pack_mm_for_cpu``. It adds
            x * w in fp32 in the order of K, and w = (q - z) * s is exact in fp32 when s and z * s
            are bf16 numbers, so each row equals a plain sequential fp32 sum, bit for bit, on
            every instruction set. Codes of 2 and 3 bits are 4-bit codes, too, and run here.
int8pack    the same CPUs, bf16, symmetric, one scale per row or for all: ATen
            ``_weight_int8pack_mm``, for 5 to 8 bits.
dequantize  prefill of the layers of the other three: weights rounded to 16 bits, then the device's
            own matmul; on the CPU for each sequence by itself, see `qat_kernels.w4a16_cpu`.
triton      CUDA, bf16 or fp16, 2 to 4 bits, or 8 bits without zero points: a fused kernel, fp32
            sums in a fixed order of K, no atomics; see `qat_kernels.w4a16_triton`.
reference   everything else, and fp32 always: dequantize per call, then a matmul in fp32. In fp32
            this is functional.linear(x, dequantize(unpack(packed))) bit for bit; 16-bit rows go in
            tiles on the CPU (`w4a16_cpu.linear_by_tiles`), so that they do not depend on M.
==========  ====================================================================================

Sources: layout, compressed-tensors ``pack-quantized``; CPU op, ATen/native/cpu/int4mm_kernel.cpp.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional

from qat_kernels import w4a16_cpu, w4a16_launch
from qat_kernels.numerics import QuantSpec, dequantize, unpack
from qat_kernels.support import Choice, capability_of, interpreted, kernels_run_on, verified
from qat_kernels.w4a16_planes import layout, to_groups, to_planes

Path = Literal["int4pack", "int8pack", "triton", "reference"]

CUDA_PREFILL_TOKENS = 64
"""Tokens of a sequence from which on a GPU dequantizes the weight and multiplies with cuBLAS."""
UNPACK_ELEMENTS = 1 << 20
"""Codes that `prepare` unpacks at a time."""


def reference(
    x: Tensor,
    packed_NP: Tensor,
    scale_NG: Tensor,
    zero_point_NG: Tensor | None = None,
    bias_N: Tensor | None = None,
    residual: Tensor | None = None,
    *,
    bits: int = 4,
    multiply: Callable[[Tensor, Tensor, Tensor | None], Tensor] = functional.linear,
) -> Tensor:
    """The definition that every other path is tested against.

    Args:
        x: [..., K] activations, any float dtype.
        packed_NP: int32 [N, ceil(K * bits / 32)], as `numerics.pack` writes them.
        scale_NG: [N, G], or [N, 1] per channel, or [1, 1] per tensor.
        zero_point_NG: int8 of the shape of scale_NG, or None if symmetric.
        bias_N: [N], or None.
        residual: [..., N], added last, or None.
        bits: bits per code, 2 to 8.
        multiply: the fp32 matmul.

    Returns:
        [..., N] in the dtype of x: fp32 matmul, rounded once.
    """
    weight_NK = dequantize(unpack(packed_NP, bits, x.shape[-1]), scale_NG, zero_point_NG)
    bias_N = None if bias_N is None else bias_N.to(torch.float32)
    y = multiply(x.to(torch.float32), weight_NK, bias_N)
    return (y if residual is None else y + residual.to(torch.float32)).to(x.dtype)


def choose(
    shape: tuple[int, int, int],
    device: torch.device | str,
    *,
    bits: int = 4,
    group_size: int | None = 32,
    symmetric: bool = True,
    dtype: torch.dtype = torch.bfloat16,
    tokens: int = 1,
) -> Choice:
    """The path of one call, and why; M decides nothing within a phase.

    `prepare` can still fall back to ``reference``: int4pack and int8pack need scales that bf16
    holds exactly.

    Args:
        shape: (M, N, K).
        device: where the layer runs.
        bits: bits per code, 2 to 8.
        group_size: input features that share a scale; None for one scale per row or for all.
        symmetric: whether there are no zero points.
        dtype: dtype of the activations.
        tokens: tokens of one sequence in this call; 1 is decode, more is prefill.

    Raises:
        ValueError: bits or sizes that no weight has.
    """
    device, k = torch.device(device), shape[2]
    if not 2 <= bits <= 8:
        raise ValueError(f"bits={bits}: from 2 to 8")
    if min(shape[1:]) < 1 or tokens < 1 or (group_size is not None and k % group_size):
        raise ValueError(f"(M, N, K) = {shape} with group_size={group_size}, tokens={tokens}")
    if dtype == torch.float32:
        return Choice("reference", "fp32 is the exact reference: dequantize, then an fp32 matmul")
    if device.type == "cpu":
        return w4a16_cpu.choose(shape, bits, group_size, symmetric, dtype, tokens)
    return _choose_cuda(device, bits, group_size or k, symmetric, dtype, tokens)


def _choose_cuda(
    device: torch.device, bits: int, group: int, symmetric: bool, dtype: torch.dtype, tokens: int
) -> Choice:
    slow = kernels_run_on(device)
    if slow is not None:
        return slow
    if dtype not in (torch.bfloat16, torch.float16):
        return Choice("reference", f"the kernel takes bf16 and fp16, not {dtype}")
    if bits > 4 and not symmetric:
        return Choice("reference", "the kernel takes no zero points beside 5 to 8 bits")
    if layout(bits, group) is None:
        return Choice("reference", f"groups of {group} are no multiple of 16")
    if tokens >= CUDA_PREFILL_TOKENS:
        return Choice("dequantize", f"prefill of {tokens} tokens: 16-bit weights, then cuBLAS")
    return Choice("triton", "a fused kernel, weights stay packed in memory")


def _compute(
    x: Tensor,
    codes: Tensor,
    high: Tensor | None,
    scale: Tensor,
    zero_point: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    bits: int,
    group: int,
    out_features: int,
    path: str,
) -> Tensor:
    """What `w4a16_linear` computes. ``path`` may be ``dequantize`` in the place of any but one."""
    k = x.shape[-1]
    shape = (*x.shape[:-1], out_features)
    if x.numel() == 0:
        return x.new_empty(shape)
    x_MK = x.reshape(-1, k).contiguous()
    if path == "reference":
        exact = x.dtype == torch.float32 or x.device.type != "cpu"
        multiply = functional.linear if exact else w4a16_cpu.linear_by_tiles
        stored = (codes, scale, zero_point)
        return reference(x, *stored, bias, residual, bits=bits, multiply=multiply).view(shape)
    if codes.dtype == torch.int16:
        plan = layout(bits, group)
        assert plan is not None, "prepare() checked the group"
        if path == "triton":
            flat = None if residual is None else residual.reshape(-1, out_features).contiguous()
            packed = (codes, high, scale, zero_point)
            return w4a16_launch.matmul(x_MK, *packed, bias, flat, plan).view(shape)
        weight_NK = w4a16_launch.dequantize(codes, high, scale, zero_point, plan, k, x.dtype)
        y = functional.linear(x, weight_NK, bias)
        return y if residual is None else y.add_(residual)
    if path == "dequantize":
        x_BTK = x.reshape(-1, x.shape[-2], k)
        if codes.dtype == torch.uint8:
            y = w4a16_cpu.int4pack_prefill(x_BTK, codes, scale, out_features)
        else:
            y = w4a16_cpu.int8pack_prefill(x_BTK, codes, scale)
    elif path == "int4pack":
        y = w4a16_cpu.int4pack_linear(x_MK, codes, scale, out_features)
    else:
        y = w4a16_cpu.int8pack_linear(x_MK, codes, scale)
    y = (y if bias is None else y.add_(bias)).view(shape)
    return y if residual is None else y.add_(residual)


@torch.library.custom_op("qat_kernels::w4a16_linear", mutates_args=())
def w4a16_linear(
    x: Tensor,
    codes: Tensor,
    high: Tensor | None,
    scale: Tensor,
    zero_point: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    bits: int,
    group: int,
    out_features: int,
    path: str,
) -> Tensor:
    """The operator behind `linear`, for torch.compile and export; see `PackedWeight`."""
    packed = (codes, high, scale, zero_point)
    return _compute(x, *packed, bias, residual, bits, group, out_features, path)


@w4a16_linear.register_fake
def _(
    x: Tensor,
    codes: Tensor,
    high: Tensor | None,
    scale: Tensor,
    zero_point: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    bits: int,
    group: int,
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
    holding (s, -z*s), zero_point None; ``int8pack`` codes int8 [N, K], scale bf16 [N]; ``triton``
    planes of codes, int16 and for 3 bits int8 in ``high``, with scale and zero point for each of
    the kernel's groups (`qat_kernels.w4a16_planes`); ``reference`` codes int32 [N, P], scale [N, G]
    or broadcastable, zero_point int8 like scale or None.
    """

    path: Path
    """Which implementation decodes."""
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
    high: Tensor | None = None
    """The high bits of 3-bit codes in planes, else None."""
    group: int = 0
    """Input features that share a scale; read by ``triton`` only."""


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


def _codes(packed_NP: Tensor, bits: int, k: int) -> Tensor:
    """int8 codes [N, K], some rows at a time: unpacking takes several bytes for each code."""
    codes_NK = torch.empty(packed_NP.shape[0], k, dtype=torch.int8, device=packed_NP.device)
    rows = max(1, UNPACK_ELEMENTS // k)
    for part, words in zip(codes_NK.split(rows), packed_NP.split(rows)):
        part.copy_(unpack(words, bits, k))
    return codes_NK


def _prepare_cpu(
    path: str,
    packed: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    spec: QuantSpec,
    shape: tuple[int, int],
    dtype: torch.dtype,
) -> PackedWeight | None:
    """The weight for an ATen operation, or None where that would not be exact."""
    n, k = shape
    if dtype != torch.bfloat16:
        raise ValueError(f"path={path} takes bfloat16 activations, not {dtype}")
    codes = _codes(packed, spec.bits, k)
    if path == "int4pack":
        if spec.bits > 4:
            raise ValueError(f"path=int4pack takes codes of 2 to 4 bits, not {spec.bits}")
        operands = w4a16_cpu.int4pack_operands(codes, scale, zero_point)
        return operands and PackedWeight("int4pack", *operands, None, 4, n, k, dtype)
    operands = None if zero_point is not None else w4a16_cpu.int8pack_operands(codes, scale)
    return operands and PackedWeight("int8pack", *operands, None, 8, n, k, dtype)


def _prepare_planes(
    packed: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    spec: QuantSpec,
    shape: tuple[int, int],
    device: torch.device,
    dtype: torch.dtype,
) -> PackedWeight | None:
    """The weight for the Triton kernels, or None where they fail their self-test on the device."""
    n, k = shape
    group = spec.group_of(k)
    plan = layout(spec.bits, group)
    slow = None if interpreted() else kernels_run_on(device)
    zero = zero_point is not None
    if plan is None or slow is not None or (zero and spec.bits > 4) or dtype == torch.float32:
        why = slow.reason if slow else "bf16 or fp16, groups of a multiple of 16, zero points to 4"
        raise ValueError(f"path=triton cannot run this weight {shape}: {why}")
    if not interpreted():
        config = w4a16_launch.config_of(n, k, plan, capability_of(device))
        name = f"w4a16 int{plan.bits} g{plan.group} {dtype} zero={zero} {config}"
        # the machine code of a long group is that of a group of one trip
        short = min(plan.group, plan.step)

        def check() -> bool:
            return w4a16_launch.check(device, plan.bits, short, dtype, zero, config)

        if not verified(name, device, check):
            return None
    words, high = to_planes(_codes(packed, spec.bits, k), plan)
    scale_NG = to_groups(scale.expand(n, -1), plan, group, k)
    if w4a16_cpu.exact_in_bf16(scale_NG):
        scale_NG = scale_NG.to(torch.bfloat16)
    zero_NG = None
    if zero_point is not None:
        zero_NG = to_groups(zero_point.expand(n, -1), plan, group, k).to(device)
    high = None if high is None else high.to(device)
    tensors = (words.to(device), scale_NG.to(device), zero_NG)
    return PackedWeight("triton", *tensors, plan.bits, n, k, dtype, high, group)


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
    n, k = shape
    group = spec.group_size if spec.granularity == "group" else None
    options: dict[str, Any] = {"bits": spec.bits, "group_size": group, "symmetric": spec.symmetric}
    chosen = path or choose((1, n, k), device, dtype=dtype, **options).path
    scale = scale.to(torch.float32)
    if chosen in ("int4pack", "int8pack"):
        made = _prepare_cpu(chosen, packed, scale, zero_point, spec, shape, dtype)
        if made is not None:
            return made
        if path:
            raise ValueError(f"path={path} cannot represent this weight {shape} exactly")
    if chosen == "triton":
        planes = _prepare_planes(packed, scale, zero_point, spec, shape, device, dtype)
        if planes is not None:
            return planes
    zero = None if zero_point is None else zero_point.to(device)
    codes = packed.contiguous().to(device)
    return PackedWeight("reference", codes, scale.to(device), zero, spec.bits, n, k, dtype)


def linear(
    x: Tensor,
    weight: PackedWeight,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """Multiply x [..., K] by the packed weight, add the bias [N] and the residual [..., N].

    Returns [..., N] in the dtype of x. Inference only: a backward pass raises RuntimeError.

    Raises:
        ValueError: x has another dtype than the weight was prepared for, or another K; bias or
            residual have another shape.
    """
    if x.dtype != weight.dtype:
        raise ValueError(f"x is {x.dtype}, but this layer was prepared for {weight.dtype}")
    if x.shape[-1] != weight.in_features:
        raise ValueError(f"x {tuple(x.shape)} ends in K = {x.shape[-1]}, not {weight.in_features}")
    if bias is not None and tuple(bias.shape) != (weight.out_features,):
        raise ValueError(f"bias {tuple(bias.shape)}: expected ({weight.out_features},)")
    shape = (*x.shape[:-1], weight.out_features)
    if residual is not None and tuple(residual.shape) != shape:
        raise ValueError(f"residual {tuple(residual.shape)}: expected {shape}")
    arguments = (
        x,
        weight.codes,
        weight.high,
        weight.scale,
        weight.zero_point,
        bias,
        residual,
        weight.bits,
        weight.group,
        weight.out_features,
        _phase(x, weight),
    )
    if torch.compiler.is_compiling() or (torch.is_grad_enabled() and x.requires_grad):
        output: Tensor = w4a16_linear(*arguments)
        return output
    # around the operator, whose wrapper takes 10 us of a call: a third of a small layer's time
    return _compute(*arguments)


def _phase(x: Tensor, weight: PackedWeight) -> str:
    """The path of this call: prefill is computed from dequantized weights.

    Inputs [M, K] have no token axis and count as decode.
    """
    if x.ndim < 3 or weight.path == "reference":
        return weight.path
    tokens = CUDA_PREFILL_TOKENS if weight.path == "triton" else w4a16_cpu.PREFILL_TOKENS
    return "dequantize" if x.shape[-2] >= tokens else weight.path
