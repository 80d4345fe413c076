r"""Quantize activations to int8 or FP8 (e4m3), per token or with a given scale, fused with RMSNorm.

Equation, for each row x of K values::

    y = x                                   or    y = rms_norm(x) * weight
    s = absmax(y) / q                       or    s given
    code = clamp(round(y / s), low, high)

int8: q = 127.5, codes -128 ... 127, round half to even (the arithmetic of `numerics.token_scale`).
e4m3: q = 448, codes -448 ... 448 rounded to the nearest e4m3 value, ties to even. A row of zeros
gets the fp32 epsilon as its scale in both. RMSNorm computes as transformers' Llama does: fp32
mean of squares, the normalized row rounded to the dtype of x, then times the weight in that dtype.

One launch and one pass: a program holds its row in registers. Rows do not depend on each other. A
NaN in a row makes its scale NaN, so that it is not lost among the codes; a given scale cannot say
so, and the code of a NaN beside one is undefined.

Shape legend: M tokens, K features. ``x_MK, codes_MK, scale_M1``.
Sources: compressed-tensors (int8); Micikevicius et al., FP8 Formats (arXiv:2209.05433).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

import torch
from torch import Tensor

from qat_kernels.aot import Shipped
from qat_kernels.numerics import token_scale
from qat_kernels.support import (
    Choice,
    capability_of,
    interpreted,
    jit,
    kernels_run_on,
    on,
    triton,
    verified,
)

if triton is not None:
    import triton.language as tl

Format = Literal["int8", "e4m3"]
DTYPES: dict[str, torch.dtype] = {"int8": torch.int8, "e4m3": torch.float8_e4m3fn}
"""Dtype of the codes of each format."""
LEVELS: dict[str, float] = {"int8": 127.5, "e4m3": 448.0}
"""absmax / scale."""
RANGES: dict[str, tuple[float, float]] = {"int8": (-128.0, 127.0), "e4m3": (-448.0, 448.0)}
"""Least and largest code."""
MAX_FEATURES = 1 << 15
"""Longest row that a program holds in registers."""
FP8_CAPABILITY = (8, 9)
"""First compute capability with FP8."""


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMSNorm [..., K] as transformers' Llama computes it, in the dtype of x."""
    value = x.to(torch.float32)
    value = value * torch.rsqrt(value.square().mean(-1, keepdim=True) + eps)
    return weight.to(x.dtype) * value.to(x.dtype)


def reference(
    x: Tensor,
    scale: Tensor | None = None,
    weight: Tensor | None = None,
    eps: float = 1e-6,
    *,
    to: Format = "int8",
) -> tuple[Tensor, Tensor]:
    """Codes [..., K] and fp32 scale: [..., 1] per token, or the given one.

    Args:
        x: [..., K], any float dtype.
        scale: fp32 scale of one value, or None to compute one per token.
        weight: [K] of the RMSNorm before, or None for no norm.
        eps: of the RMSNorm.
        to: format of the codes.
    """
    y = (x if weight is None else rms_norm(x, weight, eps)).to(torch.float32)
    if scale is None and to == "int8":
        scale = token_scale(y)
    elif scale is None:
        scale = y.abs().amax(-1, keepdim=True) / LEVELS[to]
        scale = torch.where(scale == 0, torch.finfo(torch.float32).eps, scale)
    low, high = RANGES[to]
    codes = y / scale
    if to == "int8":
        codes = codes.round()
    return codes.clamp(low, high).to(DTYPES[to]), scale


@jit
def _kernel(
    x_ptr: tl.tensor,
    weight_ptr: tl.tensor,
    scale_ptr: tl.tensor,
    codes_ptr: tl.tensor,
    K: int,
    eps: float,
    INT8: tl.constexpr,
    STATIC: tl.constexpr,
    NORM: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK_K: tl.constexpr,
) -> None:
    """One row: x [M, K] to codes [M, K]; scale [M] is written, or scale [1] read if STATIC.

    HALF: type to which the norm rounds, 0 none (fp32), 1 bf16, 2 fp16.
    """
    row = tl.program_id(0).to(tl.int64)
    k = tl.arange(0, BLOCK_K)
    ok = k < K
    y = tl.load(x_ptr + row * K + k, mask=ok, other=0.0).to(tl.float32)
    if NORM:
        mean = tl.sum(y * y, 0) / K
        y = y * tl.rsqrt(mean + eps)
        weight = tl.load(weight_ptr + k, mask=ok, other=0.0).to(tl.float32)
        # a product of two 16-bit numbers is exact in fp32, so it is rounded once, as in 16 bit
        y = _round_to(_round_to(y, HALF) * _round_to(weight, HALF), HALF)
    if STATIC:
        scale = tl.load(scale_ptr)
    else:
        level: tl.constexpr = 127.5 if INT8 else 448.0
        # without signs, numbers are in the order of their bits, and NaN is the largest
        bits = y.to(tl.int32, bitcast=True) & 0x7FFFFFFF
        scale = tl.div_rn(tl.max(bits, 0).to(tl.float32, bitcast=True), level)
        # fp32's epsilon
        scale = tl.where(scale == 0.0, 1.1920928955078125e-07, scale)
        tl.store(scale_ptr + row, scale)
    t = tl.div_rn(y, scale)
    if INT8:
        # beyond the clamp the sum below would not round
        t = tl.clamp(t, -256.0, 256.0, propagate_nan=tl.PropagateNan.ALL)
        # 1.5 * 2^23: the sum has no fraction bits left, so it rounds half to even
        t = (t + 12582912.0) - 12582912.0
        t = tl.clamp(t, -128.0, 127.0, propagate_nan=tl.PropagateNan.ALL)
        codes = t.to(tl.int8)
    else:
        t = tl.clamp(t, -448.0, 448.0, propagate_nan=tl.PropagateNan.ALL)
        codes = t.to(codes_ptr.dtype.element_ty)
    tl.store(codes_ptr + row * K + k, codes, mask=ok)


@jit
def _round_to(y: tl.tensor, HALF: tl.constexpr) -> tl.tensor:
    """fp32 rounded to bf16 (HALF = 1) or fp16 (2), ties to even, and back; 0 leaves it."""
    if HALF == 1:
        bits = y.to(tl.int32, bitcast=True)
        # integers, because the interpreter's cast truncates
        bits += 0x7FFF + ((bits >> 16) & 1)
        # a NaN of many ones would overflow into -0.0
        y = tl.where(y == y, (bits & -65536).to(tl.float32, bitcast=True), y)
    elif HALF == 2:
        y = y.to(tl.float16).to(tl.float32)
    return y


def choose(shape: tuple[int, ...], device: torch.device, *, to: Format = "int8") -> Choice:
    """Path for activations of ``shape`` (..., K): ``triton`` or ``reference``.

    Raises:
        ValueError: ``to`` is no format.
    """
    if to not in DTYPES:
        raise ValueError(f"to={to}: one of {', '.join(DTYPES)}")
    slow = kernels_run_on(device)
    if slow is not None:
        return slow
    if shape[-1] > MAX_FEATURES:
        return Choice("reference", f"rows of {shape[-1]} do not fit the registers of a program")
    if to == "e4m3" and capability_of(device) < FP8_CAPABILITY:
        return Choice("reference", "this GPU has no FP8")
    return Choice("triton", "one launch, one pass, a program per token")


def launch(
    x: Tensor, scale: Tensor | None, weight: Tensor | None, eps: float, to: Format
) -> tuple[Tensor, Tensor]:
    """Run the kernel on x [..., K], contiguous; see `reference`."""
    k = x.shape[-1]
    rows = x.numel() // k
    codes = torch.empty(x.shape, dtype=DTYPES[to], device=x.device)
    dynamic = torch.empty((*x.shape[:-1], 1), dtype=torch.float32, device=x.device)
    half = {torch.bfloat16: 1, torch.float16: 2}.get(x.dtype, 0)
    block = triton.next_power_of_2(k)
    emulated = interpreted()
    # bf16 tensors are widened, because the interpreter's bf16 loads are all right but slow
    source = x.float() if emulated else x
    # e4m3 codes are rounded by torch there: the interpreter has no such cast
    target = torch.empty(x.shape, dtype=torch.float32) if emulated and to == "e4m3" else codes
    with on(x):
        _kernel[(rows,)](
            source,
            source if weight is None else weight.contiguous(),
            dynamic if scale is None else scale,
            target,
            k,
            eps,
            INT8=to == "int8",
            STATIC=scale is not None,
            NORM=weight is not None,
            HALF=half,
            BLOCK_K=block,
            num_warps=_warps(block),
        )
    if target is not codes:
        codes = target.to(DTYPES[to])
    return codes, dynamic if scale is None else scale


def _warps(block: int) -> int:
    return 1 if block <= 512 else 4 if block <= 4096 else 8 if block <= 8192 else 16


def check(device: torch.device, to: Format) -> bool:
    """Whether the kernel is exact on ``device`` for values that all paths must agree on."""
    # every quotient is a multiple of 1/4 with ties: the absmax makes the scale a power of two
    quarters = torch.arange(-400, 400, dtype=torch.float32, device=device) / 4
    x = torch.cat((quarters, quarters.new_tensor([LEVELS[to], 0.0]))).repeat(3, 1)
    x = x * torch.tensor([[1.0], [0.5], [0.0]], device=device)
    codes, scale = launch(x, None, None, 0.0, to)
    expected = reference(x, to=to)
    return torch.equal(codes.float(), expected[0].float()) and torch.equal(scale, expected[1])


@torch.library.custom_op("qat_kernels::quantize_activation", mutates_args=())
def quantize_activation_op(
    x: Tensor, scale: Tensor | None, weight: Tensor | None, eps: float, to: str
) -> tuple[Tensor, Tensor]:
    """The operator behind `quantize_activation`."""
    format_: Any = to
    fast = choose(tuple(x.shape), x.device, to=format_).path == "triton" and x.numel() > 0
    if fast and verified(f"activation_quant {to}", x.device, lambda: check(x.device, format_)):
        codes, found = launch(x.contiguous(), scale, weight, eps, format_)
    else:
        codes, found = reference(x, scale, weight, eps, to=format_)
    # contiguous, as the shapes below say; and an operator must not return its input
    return codes.contiguous(), found.contiguous() if scale is None else found.clone()


@quantize_activation_op.register_fake
def _(
    x: Tensor, scale: Tensor | None, weight: Tensor | None, eps: float, to: str
) -> tuple[Tensor, Tensor]:
    found = x.new_empty((*x.shape[:-1], 1), dtype=torch.float32) if scale is None else scale
    return torch.empty_like(x, dtype=DTYPES[to]).contiguous(), torch.empty_like(found)


def quantize_activation(
    x: Tensor,
    scale: Tensor | None = None,
    weight: Tensor | None = None,
    eps: float = 1e-6,
    *,
    to: Format = "int8",
) -> tuple[Tensor, Tensor]:
    """Codes and fp32 scale of activations, in eager, compiled and captured code; see `reference`.

    Fused with the RMSNorm before it where ``weight`` is given: the mean of squares is then summed
    in another order than torch's and its root is approximate (2 units in the last place), which can
    move a value across a rounding border.

    Raises:
        ValueError: x is no float tensor, the scale is not one fp32 value, the weight is not [K],
            or ``to`` is no format.
    """
    if not x.is_floating_point() or x.ndim == 0 or x.shape[-1] == 0:
        raise ValueError(f"x {x.dtype} {tuple(x.shape)}: float activations [..., K]")
    if scale is not None and (scale.dtype != torch.float32 or scale.numel() != 1):
        raise ValueError(f"scale {scale.dtype} {tuple(scale.shape)}: one fp32 value")
    if weight is not None and tuple(weight.shape) != (x.shape[-1],):
        raise ValueError(f"weight {tuple(weight.shape)}: the RMSNorm has K = {x.shape[-1]} weights")
    if to not in DTYPES:
        raise ValueError(f"to={to}: one of {', '.join(DTYPES)}")
    codes, found = quantize_activation_op(x, scale, weight, eps, to)
    return codes, found


def shipped() -> Iterator[Shipped]:
    """What `launch` launches, for the ahead-of-time gates."""
    for to in ("int8", "e4m3"):
        for static, norm, k in (
            (False, False, 4096),
            (True, False, 4096),
            (False, True, 4096),
            (False, True, MAX_FEATURES),
        ):
            name = f"{to} {'static' if static else 'token'}{' norm' if norm else ''} K{k}"
            yield Shipped(
                name=f"activation_quant {name}",
                kernel=_kernel,
                types={"x_ptr": "*bf16", "weight_ptr": "*bf16", "scale_ptr": "*fp32"}
                | {"codes_ptr": "*i8" if to == "int8" else "*fp8e4nv", "K": "i32", "eps": "fp32"},
                constants={"INT8": to == "int8", "STATIC": static, "NORM": norm, "HALF": 1}
                | {"BLOCK_K": k},
                num_warps=_warps(k),
                divisible=("K",),
                values=k,
                capabilities=(80, 90, 100) if to == "int8" else (90, 100),
            )
