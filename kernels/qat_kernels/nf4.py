"""NF4 / FP4 weights: quantize, dequantize, and a frozen linear layer that dequantizes as it runs.

Equation, with W_hat the weight that `nf4_numerics` defines, rounded to ``weight_dtype`` and then
cast to the dtype of x::

    y = x @ W_hat^T + bias                grad_x = grad_y @ W_hat

Shape legend: M rows of activations, N output features, K input features, B blocks of g values.
``x_MK, weight_NK, bias_N, y_MN``; packed tensors as in `Packed4bit`.

The reference is `nf4_numerics.reference`. Paths, as `choose` says:

==========  ====================================================================================
fused       CUDA, bf16 or fp16, one token per sequence: the Triton matmul of `nf4_triton`, which
            dequantizes in registers. Its rows do not depend on each other, nor on their number.
dequantize  CUDA otherwise (prefill, training, backward): the Triton dequantizer, then cuBLAS.
reference   elsewhere: bitsandbytes' compiled operator where it is importable, applies, and equals
            the reference in a self-test on the device (`_compiled`), else the reference; then a
            matmul.
==========  ====================================================================================

What decides between the first two is the phase, not the number of rows: x of shape [..., 1, K] (or
[K]) is decoding, one token for each of any number of sequences, and always runs fused; longer
pieces of sequences never do. So a sequence is decoded to the same bits in every batch. The two
differ by the order of fp32 sums. A kernel is used after it was exact on the device at hand; where
it was not, the next path runs.

bitsandbytes is optional, and imported at the first use. On the CPU its operator is called with one
row per block where the block size does not divide K: bitsandbytes 0.50 takes the scales of such
rows wrongly with AVX-512.

Sources: Dettmers et al., QLoRA (arXiv:2305.14314); bitsandbytes 0.50.2.
"""

import importlib
import logging
import math
from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any, get_args

import torch
from torch import Tensor
from torch.nn import functional

from qat_kernels import nf4_launch
from qat_kernels.nf4_numerics import (
    BLOCK_SIZES,
    DTYPES,
    NESTED_BLOCK,
    Packed4bit,
    QuantType,
    Spec4bit,
    check_packed,
    codebook,
    dequantize_absmax,
    dynamic_map,
    quantize_4bit,
    reference,
    unpack,
)
from qat_kernels.support import Choice, kernels_run_on, verified

__all__ = [
    "BLOCK_SIZES",
    "DTYPES",
    "NESTED_BLOCK",
    "Packed4bit",
    "Spec4bit",
    "check_packed",
    "choose",
    "codebook",
    "dequantize_4bit",
    "dequantize_absmax",
    "dynamic_map",
    "linear_4bit",
    "quantize_4bit",
    "reference",
]

_TINY = 2.0**-110
"""Below this absmax a product with a code can be subnormal in bf16."""


def _self_test(op: Callable[..., Tensor], device: torch.device) -> bool:
    """Whether ``op`` equals `reference` on ``device`` for every byte, type and dtype."""
    codes = torch.arange(256, dtype=torch.uint8).repeat(8).to(device)
    absmax = torch.logspace(-8, 4, 64).to(torch.float32).to(device)
    for quant_type in get_args(QuantType):
        spec = Spec4bit(quant_type, 64)
        for dtype in DTYPES:
            got = op(codes.view(-1, 1), absmax, 64, quant_type, (64, 64), dtype)
            if not torch.equal(got, reference(codes, absmax, spec, (64, 64), dtype)):
                return False
    return True


@cache
def _compiled(device: torch.device) -> Callable[..., Tensor] | None:
    """The operator of bitsandbytes for ``device``; None if not installed, not built, not equal."""
    log = logging.getLogger("bitsandbytes")
    level = log.level
    # it warns at import that an optional faster kernel package is missing, which is not used here
    log.setLevel(logging.ERROR)
    try:
        importlib.import_module("bitsandbytes")
        op: Callable[..., Tensor] = torch.ops.bitsandbytes.dequantize_4bit.default
        with torch.no_grad():
            return op if _self_test(op, device) else None
    except Exception:  # a broken installation fails in many ways, and the reference always works
        return None
    finally:
        log.setLevel(level)


def _applies(absmax: Tensor, spec: Spec4bit, numel: int, dtype: torch.dtype) -> bool:
    """Whether the compiled operator is exact and fast for this weight."""
    if absmax.device.type == "cuda":
        return True
    if absmax.device.type != "cpu" or numel % spec.block_size or spec.block_size >= 2048:
        # short last blocks, and the sizes that it hands to torch.compile
        return False
    if dtype == torch.bfloat16:
        magnitude = absmax.abs()
        # subnormal results would be flushed to zero
        return not bool(((magnitude < _TINY) & (magnitude > 0)).any())
    return True


def choose(
    shape: tuple[int, ...],
    device: torch.device,
    dtype: torch.dtype = torch.bfloat16,
    weight_dtype: torch.dtype | None = None,
    quant_type: QuantType = "nf4",
    block_size: int = 64,
    double_quant: bool = True,
    decode: bool | None = None,
) -> Choice:
    """The path of `linear_4bit`; see the module docstring.

    Args:
        shape: (M, N, K).
        device: of x and the weight.
        dtype: of x.
        weight_dtype: dtype that W is rounded to; by default that of x.
        quant_type: nf4 or fp4.
        block_size: values per absmax.
        double_quant: whether the absmax values are stored in 8 bits.
        decode: whether x holds one token per sequence; by default whether M is 1.

    Raises:
        ValueError: no such sizes, quant_type or block_size.
    """
    if len(shape) != 3:
        raise ValueError(f"shape={shape}: (M, N, K)")
    spec = Spec4bit(quant_type, block_size, double_quant)
    slow = kernels_run_on(device)
    if slow is not None:
        return slow
    weight_dtype = weight_dtype or dtype
    if dtype != weight_dtype:
        return Choice("dequantize", f"W is rounded to {weight_dtype}, then cast to {dtype}")
    why_not = nf4_launch.multiplies(spec, shape[1:], weight_dtype)
    if why_not is not None:
        return Choice("dequantize", why_not)
    if decode if decode is not None else shape[0] == 1:
        return Choice("fused", "one token per sequence: the codes are read once, W is not written")
    return Choice("dequantize", "many tokens per sequence: cuBLAS is faster on a 16-bit W")


def decodes(x: Tensor) -> bool:
    """Whether x [..., T, K] holds one token per sequence, T = 1."""
    return x.ndim < 2 or x.shape[-2] == 1


def fuses(
    x: Tensor, spec: Spec4bit, out_features: int, weight_dtype: torch.dtype, adapter: bool = False
) -> bool:
    """Whether the fused matmul runs for x [..., K]; the first time, test it on the device."""
    device, k = x.device, x.shape[-1]
    shape = (x.numel() // max(k, 1), out_features, k)
    kind = (spec.quant_type, spec.block_size, spec.double_quant)
    if choose(shape, device, x.dtype, weight_dtype, *kind, decodes(x)).path != "fused":
        return False
    even, wide = k % nf4_launch.TRIP == 0, out_features >= nf4_launch.WIDE_N
    name = f"4-bit matmul {spec} {x.dtype} even={even} wide={wide} adapter={adapter}"
    weight = (out_features, k)
    check = partial(nf4_launch.check_matmul, device, spec, x.dtype, weight, adapter)
    return verified(name, device, check)


def _dequantize(
    packed: Packed4bit, spec: Spec4bit, shape: Sequence[int], dtype: torch.dtype
) -> Tensor:
    device = packed.codes.device
    if kernels_run_on(device) is None and dtype in DTYPES:
        name = f"4-bit dequantize {spec} {dtype}"
        if verified(name, device, partial(nf4_launch.check_dequantize, device, spec, dtype)):
            return nf4_launch.dequantize(packed, spec, shape, dtype)
    absmax = dequantize_absmax(packed)
    numel = math.prod(shape)
    if _applies(absmax, spec, numel, dtype):
        op = _compiled(packed.codes.device)
        if op is not None:
            size, codes = spec.block_size, packed.codes.view(-1, 1)
            # its threads share out rows; see above for rows that end within a block
            rows = [numel // size, size] if shape[-1] % size and not numel % size else list(shape)
            return op(codes, absmax, size, spec.quant_type, rows, dtype).view(tuple(shape))
    return reference(packed.codes, absmax, spec, shape, dtype)


def check_linear(
    x: Tensor, packed: Packed4bit, spec: Spec4bit, shape: Sequence[int], bias: Tensor | None
) -> list[Tensor]:
    """`check_packed`, and that x [..., K] and the bias fit a weight of ``shape`` (N, K).

    Raises:
        ValueError: they do not, x holds no floats, or it is on another device.
    """
    tensors = check_packed(packed, spec, shape)
    n, k = shape
    if x.shape[-1:] != (k,) or (bias is not None and tuple(bias.shape) != (n,)):
        given = None if bias is None else tuple(bias.shape)
        raise ValueError(f"x {tuple(x.shape)} and bias {given} do not fit a weight {(n, k)}")
    if not x.is_floating_point() or x.device != packed.codes.device:
        raise ValueError(
            f"x is {x.dtype} on {x.device}: expected floats on {packed.codes.device}, where the "
            "weight is"
        )
    return tensors


@torch.library.custom_op("qat_kernels::dequantize_4bit", mutates_args=())
def dequantize_4bit_op(
    packed: Sequence[Tensor],
    quant_type: str,
    block_size: int,
    shape: Sequence[int],
    dtype: torch.dtype,
) -> Tensor:
    """The operator behind `dequantize_4bit`; ``packed`` holds the tensors that are not None."""
    return _dequantize(*unpack(packed, quant_type, block_size), shape, dtype)


@dequantize_4bit_op.register_fake
def _(
    packed: Sequence[Tensor],
    quant_type: str,
    block_size: int,
    shape: Sequence[int],
    dtype: torch.dtype,
) -> Tensor:
    return packed[0].new_empty(shape, dtype=dtype)


def dequantize_4bit(
    packed: Packed4bit, spec: Spec4bit, shape: Sequence[int], dtype: torch.dtype
) -> Tensor:
    """The weight of ``shape`` in ``dtype`` (fp32, bf16, fp16), bit-equal to bitsandbytes'.

    Raises:
        ValueError: the tensors do not belong to a weight of this shape and spec.
    """
    tensors = check_packed(packed, spec, shape)
    weight: Tensor = dequantize_4bit_op(
        tensors, spec.quant_type, spec.block_size, list(shape), dtype
    )
    return weight


@torch.library.custom_op("qat_kernels::linear_4bit", mutates_args=())
def linear_4bit_op(
    x: Tensor,
    packed: Sequence[Tensor],
    bias: Tensor | None,
    quant_type: str,
    block_size: int,
    out_features: int,
    weight_dtype: torch.dtype,
) -> Tensor:
    """The operator behind `linear_4bit`: x [..., K] -> [..., N] in x's dtype."""
    shape = (out_features, x.shape[-1])
    tensors, spec = unpack(packed, quant_type, block_size)
    if fuses(x, spec, out_features, weight_dtype):
        bias_N = None if bias is None else bias.to(x.dtype)
        y_MN = nf4_launch.matmul(x.reshape(-1, shape[1]), tensors, spec, out_features, bias_N)
        return y_MN.view(*x.shape[:-1], out_features)
    weight_NK = _dequantize(tensors, spec, shape, weight_dtype)
    # the dtype of x decides; autocast was for the caller to apply
    with torch.autocast(x.device.type, enabled=False):
        bias_N = None if bias is None else bias.to(x.dtype)
        return functional.linear(x, weight_NK.to(x.dtype), bias_N)


@linear_4bit_op.register_fake
def _(
    x: Tensor,
    packed: Sequence[Tensor],
    bias: Tensor | None,
    quant_type: str,
    block_size: int,
    out_features: int,
    weight_dtype: torch.dtype,
) -> Tensor:
    return x.new_empty((*x.shape[:-1], out_features))


@torch.library.custom_op("qat_kernels::linear_4bit_backward", mutates_args=())
def linear_4bit_backward_op(
    grad: Tensor,
    packed: Sequence[Tensor],
    quant_type: str,
    block_size: int,
    in_features: int,
    weight_dtype: torch.dtype,
) -> Tensor:
    """Gradient of x: grad [..., N] -> [..., K] in grad's dtype.

    One operator, so that no compiler can move the dequantizing into the forward pass and keep W.
    """
    shape = (grad.shape[-1], in_features)
    weight_NK = _dequantize(*unpack(packed, quant_type, block_size), shape, weight_dtype)
    with torch.autocast(grad.device.type, enabled=False):
        return torch.matmul(grad, weight_NK.to(grad.dtype))


@linear_4bit_backward_op.register_fake
def _(
    grad: Tensor,
    packed: Sequence[Tensor],
    quant_type: str,
    block_size: int,
    in_features: int,
    weight_dtype: torch.dtype,
) -> Tensor:
    return grad.new_empty((*grad.shape[:-1], in_features))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, packed, bias, quant_type, block_size, _, weight_dtype = inputs
    ctx.save_for_backward(*packed)
    ctx.bias_dtype = None if bias is None else bias.dtype
    ctx.options = (quant_type, block_size, x.shape[-1], weight_dtype)


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    packed = list(ctx.saved_tensors)
    grad_x = grad_bias = None
    if ctx.needs_input_grad[0]:
        grad_x = linear_4bit_backward_op(grad, packed, *ctx.options)
    if ctx.bias_dtype is not None and ctx.needs_input_grad[2]:
        grad_bias = grad.reshape(-1, grad.shape[-1]).sum(0, dtype=ctx.bias_dtype)
    return grad_x, [None] * len(packed), grad_bias, None, None, None, None


linear_4bit_op.register_autograd(_backward, setup_context=_setup_context)


def linear_4bit(
    x: Tensor,
    packed: Packed4bit,
    spec: Spec4bit,
    shape: Sequence[int],
    weight_dtype: torch.dtype,
    bias: Tensor | None = None,
) -> Tensor:
    """Return x @ W^T + bias, W dequantized in each forward and again in each backward pass.

    Differentiable in x, and in the bias if it requires a gradient; W is frozen. Nothing is saved
    for the backward pass but the packed tensors themselves.

    Args:
        x: [..., K], any float dtype.
        packed: the weight.
        spec: how it was quantized.
        shape: (N, K).
        weight_dtype: W is rounded to this dtype (fp32, bf16 or fp16), then cast to that of x.
        bias: [N], cast to the dtype of x, or None.

    Returns:
        [..., N] in the dtype of x, also under autocast.

    Raises:
        ValueError: shapes do not fit, x holds no floats, or it is on another device.
    """
    tensors = check_linear(x, packed, spec, shape, bias)
    n = shape[0]
    y: Tensor = linear_4bit_op(x, tensors, bias, spec.quant_type, spec.block_size, n, weight_dtype)
    return y
