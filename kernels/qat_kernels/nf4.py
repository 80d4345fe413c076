"""NF4 / FP4 weights: quantize, dequantize, and a frozen linear layer that dequantizes as it runs.

Equation, with W_hat the weight that `nf4_numerics` defines, rounded to ``weight_dtype`` and then
cast to the dtype of x::

    y = x @ W_hat^T + bias                grad_x = grad_y @ W_hat

Shape legend: M rows of activations, N output features, K input features, B blocks of g values.
``x_MK, weight_NK, bias_N, y_MN``; packed tensors as in `Packed4bit`.

The reference is `nf4_numerics.reference`. Dequantizing runs bitsandbytes' compiled operator where
it is importable, applies, and equals the reference in a self-test on the device (`_compiled`);
else the reference. bitsandbytes is optional, and imported at the first use. On the CPU the
operator is called with one row per block where the block size does not divide K: bitsandbytes 0.50
takes the scales of such rows wrongly with AVX-512.

Sources: Dettmers et al., QLoRA (arXiv:2305.14314); bitsandbytes 0.50.2.
"""

import importlib
import logging
import math
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, cast, get_args

import torch
from torch import Tensor
from torch.nn import functional

from qat_kernels.nf4_numerics import (
    BLOCK_SIZES,
    DTYPES,
    NESTED_BLOCK,
    Packed4bit,
    QuantType,
    Spec4bit,
    codebook,
    dequantize_absmax,
    dynamic_map,
    quantize_4bit,
    reference,
)

__all__ = [
    "BLOCK_SIZES",
    "DTYPES",
    "NESTED_BLOCK",
    "Packed4bit",
    "Spec4bit",
    "check_packed",
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


def _dequantize(
    packed: Packed4bit, spec: Spec4bit, shape: Sequence[int], dtype: torch.dtype
) -> Tensor:
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


def check_packed(packed: Packed4bit, spec: Spec4bit, shape: Sequence[int]) -> list[Tensor]:
    """The tensors that are not None, checked against spec and shape.

    Raises:
        ValueError: dtypes or sizes are not those of a weight of this shape and spec.
    """
    numel = math.prod(shape)
    blocks = spec.blocks(numel)
    expected = [(torch.uint8, (numel + 1) // 2), (torch.float32, blocks)]
    if spec.double_quant:
        nested = (torch.float32, -(-blocks // NESTED_BLOCK))
        expected = [expected[0], (torch.uint8, blocks), nested, (torch.float32, 1)]
    tensors = [tensor for tensor in packed if tensor is not None]
    found = [(tensor.dtype, tensor.numel()) for tensor in tensors]
    if found != expected:
        raise ValueError(
            f"a weight {tuple(shape)} as {spec} consists of (dtype, values) {expected}, not {found}"
        )
    return tensors


def _unpack(
    tensors: Sequence[Tensor], quant_type: str, block_size: int
) -> tuple[Packed4bit, Spec4bit]:
    """The inverse of `check_packed`."""
    nested, offset = tensors[2:] if len(tensors) == 4 else (None, None)
    spec = Spec4bit(cast(QuantType, quant_type), block_size, nested is not None)
    return Packed4bit(tensors[0], tensors[1], nested, offset), spec


@torch.library.custom_op("qat_kernels::dequantize_4bit", mutates_args=())
def dequantize_4bit_op(
    packed: Sequence[Tensor],
    quant_type: str,
    block_size: int,
    shape: Sequence[int],
    dtype: torch.dtype,
) -> Tensor:
    """The operator behind `dequantize_4bit`; ``packed`` holds the tensors that are not None."""
    return _dequantize(*_unpack(packed, quant_type, block_size), shape, dtype)


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
    weight_NK = _dequantize(*_unpack(packed, quant_type, block_size), shape, weight_dtype)
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
    weight_NK = _dequantize(*_unpack(packed, quant_type, block_size), shape, weight_dtype)
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
        ValueError: shapes do not fit.
    """
    tensors = check_packed(packed, spec, shape)
    n, k = shape
    if x.shape[-1] != k or (bias is not None and tuple(bias.shape) != (n,)):
        given = None if bias is None else tuple(bias.shape)
        raise ValueError(f"x {tuple(x.shape)} and bias {given} do not fit a weight {(n, k)}")
    y: Tensor = linear_4bit_op(x, tensors, bias, spec.quant_type, spec.block_size, n, weight_dtype)
    return y
