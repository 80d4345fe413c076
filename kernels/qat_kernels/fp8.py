r"""Linear layer on FP8 weights and FP8 activations (e4m3).

Equation, for a row m of activations and an output feature n::

    s_x[m]  = absmax_k |x[m, k]| / 448 per token, or a given scale
    s_w[n]  = absmax_k |w[n, k]| / 448 per channel, or absmax |w| / 448 per tensor
    y[m, n] = ((sum_k e4m3(x[m, k] / s_x[m]) * e4m3(w[n, k] / s_w[n])) * s_w[n]) * s_x[m] + bias[n]

Both steps are operators of their own: `activation_quant` (one launch) and `scaled_matmul` (FP8
tensor cores from compute capability 8.9 on; elsewhere the reference, in fp32, on the same codes).

Shape legend: M tokens, N features, K inputs. ``x_MK, codes_NK, scale_N1``.
Source: Micikevicius et al., FP8 Formats for Deep Learning (arXiv:2209.05433).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from qat_kernels import activation_quant, scaled_matmul
from qat_kernels.numerics import check_finite
from qat_kernels.support import Choice

E4M3 = torch.float8_e4m3fn


@dataclass(frozen=True)
class PackedFp8:
    """A weight [N, K] as e4m3 codes; made by `prepare`."""

    codes: Tensor
    """float8_e4m3fn [N, K]."""
    scale: Tensor
    """fp32 [N, 1], or [1, 1] per tensor."""
    input_scale: Tensor | None
    """fp32, one value, for static activations; None for a scale per token."""
    dtype: torch.dtype
    """Dtype of activations and results."""


def prepare(
    w_NK: Tensor,
    granularity: Literal["channel", "tensor"] = "channel",
    input_scale: Tensor | None = None,
    dtype: torch.dtype = torch.bfloat16,
) -> PackedFp8:
    """Quantize a weight.

    Args:
        w_NK: [N, K], any float dtype, on the device where the layer runs.
        granularity: one scale per row, or one for all.
        input_scale: one positive number for static activation quantization; None for dynamic.
        dtype: of the activations: float32, bfloat16 or float16.

    Raises:
        ValueError: w is no finite float matrix, or an option is none of those above.
    """
    if w_NK.ndim != 2 or not w_NK.numel() or not w_NK.is_floating_point():
        raise ValueError(f"w {w_NK.dtype} {tuple(w_NK.shape)}: a float matrix [N, K]")
    if granularity not in ("channel", "tensor"):
        raise ValueError(f"granularity={granularity}: channel or tensor")
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(f"dtype={dtype}: float32, bfloat16 or float16")
    if input_scale is not None and (input_scale.numel() != 1 or not float(input_scale) > 0):
        raise ValueError(f"input_scale: one positive number, got {input_scale.tolist()}")
    check_finite(w_NK, "w")
    # one row for all where one scale serves them
    rows = w_NK if granularity == "channel" else w_NK.reshape(1, -1)
    codes, scale = activation_quant.reference(rows, to="e4m3")
    if input_scale is not None:
        input_scale = input_scale.to(w_NK.device, torch.float32).reshape(1)
    return PackedFp8(codes.view(w_NK.shape).contiguous(), scale, input_scale, dtype)


def reference(x: Tensor, weight: PackedFp8, bias: Tensor | None = None) -> Tensor:
    """The definition: [..., N] in the dtype of x, in fp32 and rounded once."""
    codes, s_x = activation_quant.reference(x, weight.input_scale, to="e4m3")
    flat = (codes.reshape(-1, x.shape[-1]), s_x, weight.codes, weight.scale)
    y = scaled_matmul.reference(*flat, bias, dtype=x.dtype)
    return y.view(*x.shape[:-1], weight.codes.shape[0])


def choose(shape: tuple[int, ...], device: torch.device) -> Choice:
    """Path of a layer (M, N, K): ``triton`` or ``reference``; see `scaled_matmul.choose`."""
    return scaled_matmul.choose(shape, device, dtype=E4M3)


def linear(x: Tensor, weight: PackedFp8, bias: Tensor | None = None) -> Tensor:
    """Quantize x [..., K], multiply by the weight, add the bias [N]: [..., N], dtype of x.

    Inference only: the codes carry no gradient.

    Raises:
        ValueError: x has another dtype than the weight was prepared for, or shapes do not fit.
    """
    if x.dtype != weight.dtype:
        raise ValueError(f"x is {x.dtype}, but this layer was prepared for {weight.dtype}")
    codes, s_x = activation_quant.quantize_activation(x, weight.input_scale, to="e4m3")
    return scaled_matmul.scaled_matmul(codes, s_x, weight.codes, weight.scale, bias, x.dtype)
