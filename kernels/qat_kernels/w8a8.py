r"""Linear layer on int8 weights and int8 activations.

Equation, for a row m of activations and an output feature n::

    s_x[m]    = absmax_k |x[m, k]| / 127.5                  (dynamic, `numerics.token_scale`)
                or the calibrated input_scale               (static)
    q[m, k]   = clamp(round(x[m, k] / s_x[m]), -128, 127)   (`numerics.quantize`)
    acc[m, n] = sum_k q[m, k] * w[n, k]                     int32, exact
    y[m, n]   = (fp32(acc[m, n]) * s_w[n]) * s_x[m]  (+ bias[n])

in fp32, in this order, rounded once to the dtype of x. Sums of integers have no order, and the rest
is per element: a row's result does not depend on the batch, and every path below that computes in
integers gives the same bits for finite inputs.

Shape legend: M rows of activations, N output features, K input features.
``x_MK, codes_NK, scale_N, bias_N, y_MN``.

==========  ====================================================================================
onednn      CPU with AVX512-VNNI, bf16 or fp16: oneDNN's int8 matmul with weights in its own layout,
            one scale per row or for all. Its activations are uint8 with zero point 128 (for int8
            ones torch 2.13 falls into a reference loop, 600 times slower); it multiplies the exact
            sum by the weight scale in fp32, the rest of the epilogue is done here. Layers that
            share an input quantize it once (`InputReuse`).
triton      CUDA, bf16 or fp16: `activation_quant` in one launch, then `scaled_matmul` on the int8
            tensor cores, with the whole epilogue.
dequantize  everything else, and fp32 always: fake-quantized activations times the dequantized
            weight. In fp32 this is the fake-quant module, bit for bit; 16-bit rows go in tiles on
            the CPU (`w4a16_cpu.linear_by_tiles`), so that they do not depend on M.
==========  ====================================================================================

Sources: compressed-tensors (dynamic per-token int8); oneDNN, "Quantization" in its developer guide.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional

from qat_kernels import scaled_matmul, w4a16_cpu
from qat_kernels.activation_quant import quantize_activation
from qat_kernels.numerics import (
    QuantSpec,
    dequantize,
    fake_quantize_with,
    quantize,
    token_scale,
)
from qat_kernels.support import Choice

Path = Literal["onednn", "triton", "dequantize"]

INPUT = QuantSpec(bits=8, granularity="token", grid="absmax", dynamic=True)
"""The codes of activations, whether their scale is dynamic or static."""
MAX_K = (2**31 - 1) // (255 * 128)
"""Most input features for which uint8 times int8 cannot pass int32."""
SINGLE_ROWS = 4
"""Rows as which oneDNN gets a single one: it takes longer for one row than for four (743 to 638 us
for cold weights of 4096 x 4096 on 2 cores), and exact sums do not change."""
_SHIFT = 12582912.0
"""1.5 * 2^23: adding it to |t| < 2^22 rounds t half to even, into the low bits of the sum."""
# as tensors: a Python number costs an operation on a few values twice its time
_LEVELS, _ROUND = torch.tensor([127.5, _SHIFT + 128], dtype=torch.float32, device="cpu").unbind()


def codes_and_scale(x: Tensor, input_scale: Tensor | None) -> tuple[Tensor, Tensor]:
    """(int8 codes, fp32 scale [..., 1]) of activations x [..., K], as `numerics` defines them."""
    if input_scale is None:
        scale = token_scale(x)
    else:
        scale = input_scale.to(torch.float32).reshape(1).expand(*x.shape[:-1], 1)
    return quantize(x, scale, None, INPUT), scale


def reference(
    x: Tensor,
    codes_NK: Tensor,
    scale: Tensor,
    bias_N: Tensor | None = None,
    input_scale: Tensor | None = None,
) -> Tensor:
    """The definition that every path in integers is tested against.

    Args:
        x: [..., K] activations, any float dtype.
        codes_NK: int8 weights.
        scale: fp32 [N, 1] or [1, 1].
        bias_N: [N], or None.
        input_scale: fp32, one element, for static activation quantization; None for dynamic.

    Returns:
        [..., N] in the dtype of x.
    """
    q, s_x = codes_and_scale(x, input_scale)
    # exact in fp64: integers below 2^53
    acc = q.to(torch.float64) @ codes_NK.to(torch.float64).T
    y = acc.to(torch.float32) * scale.to(torch.float32)[:, 0] * s_x
    return (y if bias_N is None else y + bias_N.to(torch.float32)).to(x.dtype)


def dequantized(
    x: Tensor,
    codes_NK: Tensor,
    scale: Tensor,
    zero_point: Tensor | None = None,
    bias_N: Tensor | None = None,
    input_scale: Tensor | None = None,
    *,
    multiply: Callable[[Tensor, Tensor, Tensor | None], Tensor] | None = None,
) -> Tensor:
    """Fake-quantized activations times the dequantized weight, in the dtype of x.

    Takes every granularity: scale and zero_point [N, G], [N, 1] or [1, 1]. ``multiply`` replaces
    the matmul.
    """
    s_x = token_scale(x) if input_scale is None else input_scale
    x = fake_quantize_with(x, s_x, INPUT)[0].to(x.dtype)
    weight_NK = dequantize(codes_NK, scale, zero_point).to(x.dtype)
    if multiply is None:
        exact = x.dtype == torch.float32 or x.device.type != "cpu"
        multiply = functional.linear if exact else w4a16_cpu.linear_by_tiles
    return multiply(x, weight_NK, bias_N)


# ---------------------------------------------------------------------------- choice


def choose(
    shape: tuple[int, int, int],
    device: torch.device | str,
    *,
    dtype: torch.dtype = torch.bfloat16,
    group_size: int | None = None,
    symmetric: bool = True,
) -> Choice:
    """The path of a layer, and why; M decides nothing.

    Args:
        shape: (M, N, K).
        device: where the layer runs.
        dtype: dtype of the activations.
        group_size: input features that share a weight scale; None for one per row or for all.
        symmetric: whether the weights have no zero points.

    Raises:
        ValueError: sizes that no weight has.
    """
    device, (_, n, k) = torch.device(device), shape
    if min(n, k) < 1 or (group_size is not None and k % group_size):
        raise ValueError(f"(M, N, K) = {shape} with group_size={group_size}")
    if dtype == torch.float32:
        return Choice("dequantize", "fp32 is the exact reference: the fake-quant module's matmul")
    if not symmetric or group_size not in (None, k):
        what = "zero points" if not symmetric else f"groups of {group_size}"
        return Choice("dequantize", f"integer sums cannot cross {what} of the weight")
    if device.type == "cpu":
        return _choose_cpu(k)
    found = scaled_matmul.choose(shape, device)
    return found if found.path == "triton" else Choice("dequantize", found.reason)


def _choose_cpu(k: int) -> Choice:
    if k > MAX_K:
        return Choice("dequantize", f"K = {k}: int32 sums are exact up to K = {MAX_K}")
    if not torch.cpu._is_vnni_supported():
        # before VNNI, x86 adds pairs of products in 16 bits, which saturate
        return Choice("dequantize", "exact int8 sums take a CPU with AVX512-VNNI")
    if not _onednn_is_exact():
        return Choice("dequantize", "oneDNN's int8 matmul failed its self-test on this machine")
    return Choice("onednn", "oneDNN's int8 matmul with exact int32 sums")


@functools.cache
def _onednn_is_exact() -> bool:
    """Compare oneDNN with exact sums, on the largest codes (sums above 2^24) and random ones."""
    generator = torch.Generator().manual_seed(0)
    for m, n, k in ((1, 64, 4096), (5, 40, 2048)):
        codes = torch.randint(-128, 128, (n, k), generator=generator, dtype=torch.int8)
        q = torch.randint(-128, 128, (m, k), generator=generator, dtype=torch.int8)
        codes[0], codes[1], q[0] = -128, 127, -128
        scale = torch.rand(n, generator=generator)
        u = (q.to(torch.int16) + 128).to(torch.uint8)
        found = _qlinear(u, _prepack(codes), scale, torch.zeros(n, dtype=torch.int32))
        exact = (q.to(torch.float64) @ codes.to(torch.float64).T).to(torch.float32) * scale
        if not torch.equal(found, exact):
            return False
    return True


# ---------------------------------------------------------------------------- oneDNN


def _prepack(codes_NK: Tensor) -> Tensor:
    packed: Tensor = torch.ops.onednn.qlinear_prepack(codes_NK.contiguous(), None)
    return packed


def _qlinear(u: Tensor, codes: Tensor, scale_N: Tensor, zero_N: Tensor) -> Tensor:
    """fp32 [..., N]: fp32(sum_k (u - 128) * w) * scale, from uint8 activations [..., K]."""
    y: Tensor = torch.ops.onednn.qlinear_pointwise(
        u, 1.0, 128, codes, scale_N, zero_N, None, 1.0, 0, torch.float32, "none", [], ""
    )
    return y


def quantize_shifted(x: Tensor, input_scale: Tensor | None) -> tuple[Tensor, Tensor]:
    """(uint8 codes q + 128, fp32 scale [..., 1]) of activations [..., K] in few passes, on the CPU.

    Equal to `codes_and_scale`: |x / s| stays below 2^22 for a dynamic scale, and what a static one
    lets through is clamped before its bits are read. NaN in a row makes the row's scale NaN.
    """
    x = x.to(torch.float32)
    if input_scale is None:
        s = x.abs().amax(-1, keepdim=True).div_(_LEVELS)
        s = torch.threshold_(s, 0.0, torch.finfo(torch.float32).eps)
    else:
        # 0 * NaN and 0 * infinity are NaN: codes cannot carry them
        s = x.abs().amax(-1, keepdim=True).mul_(0.0).add_(input_scale)
    shifted = x.div(s).add_(_ROUND).clamp_(_SHIFT, _SHIFT + 255)
    # an fp32 number in 2^23 ... 2^24 counts in ones: its low byte is the code
    return shifted.view(torch.int32).to(torch.uint8), s


class InputReuse:
    """The codes of the last activations, for layers that get the same ones (query, key, value).

    One for a model: it holds the codes of one input, for as long as that tensor lives. Only dynamic
    scales are shared. Copies and pickles of it are empty.
    """

    def __init__(self) -> None:
        self._last: tuple[weakref.ref[Tensor], int, tuple[Tensor, Tensor]] | None = None

    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """`quantize_shifted` of x, from memory where x is the very tensor of the last call."""
        if x.is_inference():
            # nobody counts changes of such a tensor
            return quantize_shifted(x, None)
        last = self._last
        if last is None or last[0]() is not x or last[1] != x._version:
            quantized = quantize_shifted(x, None)
            # one assignment: another thread sees all of it or nothing
            last = self._last = (weakref.ref(x, self._forget), x._version, quantized)
        return last[2]

    def _forget(self, dead: weakref.ref[Tensor]) -> None:
        last = self._last
        if last is not None and last[0] is dead:
            self._last = None

    def __reduce__(self) -> tuple[type[InputReuse], tuple[()]]:
        return InputReuse, ()


def _onednn_linear(
    x: Tensor,
    codes: Tensor,
    scale_N: Tensor,
    zero_N: Tensor,
    bias_N: Tensor | None,
    quantized: tuple[Tensor, Tensor],
) -> Tensor:
    u, s_x = quantized
    if u.numel() == u.shape[-1]:
        copies = u.reshape(1, -1).expand(SINGLE_ROWS, -1).contiguous()
        y = _qlinear(copies, codes, scale_N, zero_N)[:1].view(*x.shape[:-1], -1)
    else:
        y = _qlinear(u, codes, scale_N, zero_N)
    y = y.mul_(s_x)
    if bias_N is not None:
        y.add_(bias_N)
    return y.to(x.dtype)


# ---------------------------------------------------------------------------- operator


def _compute(
    x: Tensor,
    codes: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    bias: Tensor | None,
    input_scale: Tensor | None,
    path: str,
) -> Tensor:
    if x.numel() == 0:
        return x.new_empty((*x.shape[:-1], _features(codes, path)))
    if path == "dequantize":
        return dequantized(x, codes, scale, zero_point, bias, input_scale)
    if path == "triton":
        q, s_x = quantize_activation(x, input_scale)
        return scaled_matmul.scaled_matmul(q, s_x, codes, scale, bias, x.dtype)
    assert zero_point is not None, "prepare() made it"
    quantized = quantize_shifted(x, input_scale)
    return _onednn_linear(x, codes, scale, zero_point, bias, quantized)


def _features(codes: Tensor, path: str) -> int:
    """N: oneDNN's weights are [K, N]."""
    return codes.shape[1 if path == "onednn" else 0]


@torch.library.custom_op("qat_kernels::w8a8_linear", mutates_args=())
def w8a8_linear(
    x: Tensor,
    codes: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    bias: Tensor | None,
    input_scale: Tensor | None,
    path: str,
) -> Tensor:
    """The operator behind `linear`, for torch.compile and export; see `PackedInt8`."""
    return _compute(x, codes, scale, zero_point, bias, input_scale, path)


@w8a8_linear.register_fake
def _(
    x: Tensor,
    codes: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    bias: Tensor | None,
    input_scale: Tensor | None,
    path: str,
) -> Tensor:
    return x.new_empty((*x.shape[:-1], _features(codes, path)))


def _no_backward(ctx: Any, grad: Tensor) -> None:
    raise RuntimeError(
        "qat_kernels::w8a8_linear serves int8 weights and has no backward; "
        "train with the fake-quant module, or call it under torch.no_grad()"
    )


w8a8_linear.register_autograd(_no_backward)


@dataclass(frozen=True)
class PackedInt8:
    """A weight [N, K] in the form that one path reads; made by `prepare`.

    The tensors by path: ``onednn`` codes in oneDNN's layout (an opaque int8 tensor [K, N]), scale
    fp32 [N], zero_point int32 zeros [N], which the op asks for; ``triton`` codes int8 [N, K], scale
    fp32 [N, 1]; ``dequantize`` codes int8 [N, K],
    scale fp32 [N, G], [N, 1] or [1, 1], zero_point int8 like scale or None.
    """

    path: Path
    """Which implementation runs."""
    codes: Tensor
    """Codes."""
    scale: Tensor
    """Scales."""
    zero_point: Tensor | None
    """Zero points, or None."""
    input_scale: Tensor | None
    """fp32 [1] for static activation quantization."""
    out_features: int
    """N."""
    in_features: int
    """K."""
    dtype: torch.dtype
    """Dtype of the activations."""

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        """For copy and pickle, which oneDNN's layout refuses: the codes, to be prepared again."""
        codes, scale, zero_point = self.codes, self.scale, self.zero_point
        if self.path == "onednn":
            codes, scale, zero_point = codes.to_dense().T.contiguous(), scale[:, None], None
        path: Path | None = "dequantize" if self.path == "dequantize" else None
        again = functools.partial(prepare, dtype=self.dtype, path=path)
        return again, (codes, scale, zero_point, self.input_scale)


def prepare(
    codes_NK: Tensor,
    scale: Tensor,
    zero_point: Tensor | None = None,
    input_scale: Tensor | None = None,
    *,
    dtype: torch.dtype = torch.bfloat16,
    path: Path | None = None,
) -> PackedInt8:
    """Choose a path for one weight and bring its tensors into that path's form.

    Args:
        codes_NK: int8 [N, K], on the device where the layer will run.
        scale: [N, G], [N, 1] or [1, 1]; any float dtype.
        zero_point: int8 of the shape of scale; None if symmetric.
        input_scale: one positive number for static activation quantization; None for dynamic.
        dtype: dtype of the activations: float32 (exact reference), bfloat16 or float16.
        path: take this path instead of choosing; for tests and comparisons.

    Raises:
        ValueError: shapes or dtypes do not fit each other, or ``path`` cannot run this weight.
    """
    n, k = _check(codes_NK, scale, zero_point, input_scale, dtype)
    device = codes_NK.device
    group = None if scale.shape[1] == 1 else k // scale.shape[1]
    choice = choose(
        (1, n, k),
        device,
        # a path that is asked for is judged without its dtype
        dtype=dtype if path is None else torch.bfloat16,
        group_size=group,
        symmetric=zero_point is None,
    )
    if path in ("onednn", "triton") and choice.path != path:
        raise ValueError(f"path={path}: {choice.reason}")
    scale = scale.to(device, torch.float32)
    static = None if input_scale is None else input_scale.to(device, torch.float32).reshape(1)
    if (path or choice.path) == "onednn":
        row = scale[:, 0].expand(n).contiguous()
        zero = torch.zeros(n, dtype=torch.int32, device=device)
        return PackedInt8("onednn", _prepack(codes_NK), row, zero, static, n, k, dtype)
    if (path or choice.path) == "triton":
        row = scale.expand(n, 1).contiguous()
        return PackedInt8("triton", codes_NK.contiguous(), row, None, static, n, k, dtype)
    return PackedInt8("dequantize", codes_NK, scale, zero_point, static, n, k, dtype)


def _check(
    codes_NK: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    input_scale: Tensor | None,
    dtype: torch.dtype,
) -> tuple[int, int]:
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(f"dtype={dtype}: int8 layers take float32, bfloat16 or float16")
    if codes_NK.dtype != torch.int8 or codes_NK.ndim != 2 or not codes_NK.numel():
        raise ValueError(f"codes: int8 [N, K], got {codes_NK.dtype} {tuple(codes_NK.shape)}")
    n, k = codes_NK.shape
    fits = scale.ndim == 2 and scale.shape[0] in (1, n) and k % max(scale.shape[1], 1) == 0
    if not fits or not scale.numel() or not scale.is_floating_point():
        raise ValueError(
            f"scale: a float tensor [N, G], [N, 1] or [1, 1] for codes {(n, k)}, "
            f"got {scale.dtype} {tuple(scale.shape)}"
        )
    if zero_point is not None and (zero_point.dtype, zero_point.shape) != (torch.int8, scale.shape):
        raise ValueError(
            f"zero point: int8 {tuple(scale.shape)}, "
            f"got {zero_point.dtype} {tuple(zero_point.shape)}"
        )
    if input_scale is not None and (input_scale.numel() != 1 or not float(input_scale) > 0):
        raise ValueError(f"input_scale: one positive number, got {input_scale.tolist()}")
    return n, k


def linear(
    x: Tensor, weight: PackedInt8, bias: Tensor | None = None, reuse: InputReuse | None = None
) -> Tensor:
    """Multiply x [..., K] by the int8 weight and add the bias [N]: [..., N], dtype of x.

    Layers that are given the same ``reuse`` quantize an input that they share once.

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
    arguments = (
        x,
        weight.codes,
        weight.scale,
        weight.zero_point,
        bias,
        weight.input_scale,
        weight.path,
    )
    if torch.compiler.is_compiling() or (torch.is_grad_enabled() and x.requires_grad):
        output: Tensor = w8a8_linear(*arguments)
        return output
    # around the operator, whose wrapper takes 10 us of a call: a tenth of a small layer's time
    if reuse is None or weight.path != "onednn" or weight.input_scale is not None or not x.numel():
        return _compute(*arguments)
    assert weight.zero_point is not None, "prepare() made it"
    return _onednn_linear(x, weight.codes, weight.scale, weight.zero_point, bias, reuse(x))
