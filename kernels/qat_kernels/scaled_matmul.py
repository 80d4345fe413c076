r"""Matmul of int8 or FP8 (e4m3) codes with scales: what W8A8 and FP8 layers run on a GPU.

Equation, for row m and feature n::

    y[m, n] = ((sum_k x[m, k] * w[n, k]) * w_scale[n]) * x_scale[m] + bias[n]

int8: the sum is an exact int32 (K < 2^17, for K * 2^7 * 2^7 < 2^31), converted to fp32 once; so the
result depends on nothing but its row and column, whatever the tile. e4m3: products are exact, sums
fp32 in the fixed order of K; Hopper's tensor cores keep fewer bits within an instruction chain, so
their sums are added to an fp32 register every 128 products. The tile of FP8 is chosen by phase
(decode or prefill), never by the number of sequences.

The epilogue is fp32, in the order written and without fused multiply-adds, so that int8 gives the
reference's bits; it rounds once to the output's dtype.

W is the left operand (W x X^T). Both operands come through shared memory, so `wgmma` has no
register operand and is safe with every ptxas.

Shape legend: M tokens, N features, K inputs. ``x_MK, w_NK, x_scale_M1 or one, w_scale_N1 or one``.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from qat_kernels.activation_quant import DTYPES, FP8_CAPABILITY
from qat_kernels.aot import Shipped
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

MAX_INT8_FEATURES = (1 << 17) - 1
"""Longest K whose int8 products add up without overflow in int32."""
PROMOTE = 128
"""Products after which Hopper's FP8 sums move to an fp32 register."""


def reference(
    x_MK: Tensor,
    x_scale: Tensor,
    w_NK: Tensor,
    w_scale: Tensor,
    bias_N: Tensor | None = None,
    *,
    dtype: torch.dtype = torch.bfloat16,
) -> Tensor:
    """The definition: [M, N] in ``dtype``.

    Args:
        x_MK: int8 or float8_e4m3fn codes [M, K].
        x_scale: fp32 [M, 1], or one value.
        w_NK: codes [N, K] of the same dtype.
        w_scale: fp32 [N, 1], or one value.
        bias_N: [N], or None.
        dtype: of the result.
    """
    if x_MK.dtype == torch.int8:
        # fp64 holds every partial sum exactly
        total = (x_MK.double() @ w_NK.double().T).to(torch.float32)
    else:
        total = x_MK.to(torch.float32) @ w_NK.to(torch.float32).T
    y = total * w_scale.reshape(1, -1) * x_scale.reshape(-1, 1)
    if bias_N is not None:
        y = y + bias_N.to(torch.float32)
    return y.to(dtype)


@jit
def _kernel(
    x_ptr: tl.tensor,
    w_ptr: tl.tensor,
    x_scale_ptr: tl.tensor,
    w_scale_ptr: tl.tensor,
    bias_ptr: tl.tensor,
    y_ptr: tl.tensor,
    M: int,
    N: int,
    K: int,
    INT8: tl.constexpr,
    BIAS: tl.constexpr,
    X_ROWS: tl.constexpr,
    W_ROWS: tl.constexpr,
    EVEN_K: tl.constexpr,
    PROMOTE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
) -> None:
    """One tile of y [M, N]; x [M, K] and w [N, K] contiguous codes.

    X_ROWS, W_ROWS: whether there is a scale per row, or one.
    """
    m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    # rows past the end repeat the last one, so that loads need no mask; they are never stored
    m_row = tl.minimum(m, M - 1).to(tl.int64)
    n_row = tl.minimum(n, N - 1).to(tl.int64)
    w_at = w_ptr + n_row[:, None] * K + k[None, :]
    x_at = x_ptr + m_row[None, :] * K + k[:, None]
    acc_NM = tl.zeros((BLOCK_N, BLOCK_M), tl.int32 if INT8 else tl.float32)
    for k0 in range(0, K, BLOCK_K):
        if EVEN_K:
            w_NK, x_KM = tl.load(w_at + k0), tl.load(x_at + k0)
        else:
            ok = k0 + k < K
            w_NK = tl.load(w_at + k0, mask=ok[None, :], other=0.0)
            x_KM = tl.load(x_at + k0, mask=ok[:, None], other=0.0)
        if INT8:
            acc_NM = tl.dot(w_NK, x_KM, acc_NM, out_dtype=tl.int32)
        else:
            acc_NM = tl.dot(
                w_NK, x_KM, acc_NM, max_num_imprecise_acc=PROMOTE, input_precision="ieee"
            )
    x_scale = tl.load(x_scale_ptr + (m_row if X_ROWS else m_row * 0))
    w_scale = tl.load(w_scale_ptr + (n_row if W_ROWS else n_row * 0))
    y_NM = acc_NM.to(tl.float32) * w_scale[:, None] * x_scale[None, :]
    if BIAS:
        y_NM += tl.load(bias_ptr + n_row).to(tl.float32)[:, None]
    y_MN = tl.trans(y_NM.to(y_ptr.dtype.element_ty))
    mask = (m < M)[:, None] & (n < N)[None, :]
    tl.store(y_ptr + m_row[:, None] * N + n_row[None, :], y_MN, mask=mask)


@dataclass(frozen=True)
class Tile:
    """How the matmul is cut up."""

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int


DECODE = Tile(16, 64, 128, 4, 4)
"""A few rows: as many programs as possible, all of them streaming W."""
PREFILL = Tile(128, 128, 128, 8, 3)
"""Many rows: the largest tile that keeps its sums in registers."""


def tile(m: int, decode: bool, int8: bool) -> Tile:
    """The tile for M rows. Exact int8 may choose by M, FP8 by phase only."""
    return DECODE if (m <= 64 if int8 else decode) else PREFILL


def choose(
    shape: tuple[int, ...], device: torch.device, *, dtype: torch.dtype = torch.int8
) -> Choice:
    """Path for codes of ``dtype`` and a shape (M, N, K): ``triton`` or ``reference``.

    Raises:
        ValueError: the dtype is neither int8 nor float8_e4m3fn, or the shape is none.
    """
    if dtype not in DTYPES.values():
        raise ValueError(f"dtype={dtype}: int8 or float8_e4m3fn")
    if len(shape) != 3:
        raise ValueError(f"shape={shape}: (M, N, K)")
    slow = kernels_run_on(device)
    if slow is not None:
        return slow
    if dtype == torch.int8:
        if shape[2] > MAX_INT8_FEATURES:
            return Choice("reference", f"K = {shape[2]}: sums could overflow int32")
        return Choice("triton", "int8 tensor cores, exact int32 sums")
    if capability_of(device) < FP8_CAPABILITY:
        return Choice("reference", "this GPU has no FP8")
    return Choice("triton", "FP8 tensor cores, fp32 sums")


def launch(
    x_MK: Tensor,
    x_scale: Tensor,
    w_NK: Tensor,
    w_scale: Tensor,
    bias_N: Tensor | None,
    dtype: torch.dtype,
    cut: Tile,
) -> Tensor:
    """Run the kernel on contiguous codes, M and N at least 1; see `reference`."""
    (m, k), n = x_MK.shape, w_NK.shape[0]
    int8 = x_MK.dtype == torch.int8
    # the kernel steps by one value: expanded or strided ones would be read beside their place
    x_scale, w_scale = x_scale.contiguous(), w_scale.contiguous()
    bias_N = None if bias_N is None else bias_N.contiguous()
    emulated = interpreted()
    if emulated:
        # the interpreter multiplies neither 8-bit integers nor FP8 rightly; fp32 is exact for both
        # as long as sums stay below 2^24
        x_MK, w_NK = x_MK.float(), w_NK.float()
        bias_N = None if bias_N is None else bias_N.float()
    y_MN = x_MK.new_empty(m, n, dtype=torch.float32 if emulated else dtype)
    with on(x_MK):
        _kernel[(triton.cdiv(n, cut.block_n), triton.cdiv(m, cut.block_m))](
            x_MK,
            w_NK,
            x_scale,
            w_scale,
            x_scale if bias_N is None else bias_N,
            y_MN,
            m,
            n,
            k,
            INT8=int8 and not emulated,
            BIAS=bias_N is not None,
            X_ROWS=x_scale.numel() > 1,
            W_ROWS=w_scale.numel() > 1,
            EVEN_K=k % cut.block_k == 0,
            PROMOTE=PROMOTE,
            BLOCK_M=cut.block_m,
            BLOCK_N=cut.block_n,
            BLOCK_K=cut.block_k,
            num_warps=cut.num_warps,
            num_stages=cut.num_stages,
            enable_fp_fusion=False,
        )
    return y_MN.to(dtype)


def check(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the kernel is exact on ``device`` for integer-valued inputs, in both tiles.

    With K off the tile, and with K on it and long enough for the pipeline: other machine code.
    """
    generator = torch.Generator().manual_seed(0)
    for n, k in ((70, 160), (64, 640)):
        x = torch.randint(-4, 5, (20, k), generator=generator).float()
        w = torch.randint(-4, 5, (n, k), generator=generator).float()
        bias = torch.randint(-4, 5, (n,), generator=generator).float()
        expected = x @ w.T + bias
        scales = (torch.full((20, 1), 0.5), torch.full((n, 1), 2.0))
        tensors = (x.to(dtype), scales[0], w.to(dtype), scales[1], bias)
        x_, x_scale, w_, w_scale, bias_ = (tensor.to(device) for tensor in tensors)
        for cut in (DECODE, PREFILL):
            y = launch(x_, x_scale, w_, w_scale, bias_, torch.float32, cut)
            if not torch.equal(y.cpu(), expected):
                return False
    return True


@torch.library.custom_op("qat_kernels::scaled_matmul", mutates_args=())
def scaled_matmul_op(
    x: Tensor,
    x_scale: Tensor,
    w_NK: Tensor,
    w_scale: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
    decode: bool,
) -> Tensor:
    """The operator behind `scaled_matmul`."""
    shape = (*x.shape[:-1], w_NK.shape[0])
    x_MK, w_NK = x.reshape(-1, x.shape[-1]).contiguous(), w_NK.contiguous()
    m, n, k = x_MK.shape[0], *w_NK.shape
    if m == 0 or n == 0:
        return x.new_empty(shape, dtype=dtype)
    x_scale = x_scale.reshape(-1, 1)
    fast = choose((m, n, k), x.device, dtype=x.dtype).path == "triton"
    name = f"scaled_matmul {x.dtype}"
    if fast and verified(name, x.device, lambda: check(x.device, x.dtype)):
        cut = tile(m, decode, x.dtype == torch.int8)
        return launch(x_MK, x_scale, w_NK, w_scale, bias, dtype, cut).view(shape)
    return reference(x_MK, x_scale, w_NK, w_scale, bias, dtype=dtype).view(shape)


@scaled_matmul_op.register_fake
def _(
    x: Tensor,
    x_scale: Tensor,
    w_NK: Tensor,
    w_scale: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
    decode: bool,
) -> Tensor:
    return x.new_empty((*x.shape[:-1], w_NK.shape[0]), dtype=dtype)


def scaled_matmul(
    x: Tensor,
    x_scale: Tensor,
    w_NK: Tensor,
    w_scale: Tensor,
    bias: Tensor | None = None,
    dtype: torch.dtype = torch.bfloat16,
) -> Tensor:
    """Multiply codes x [..., K] by codes w [N, K] and apply both scales and the bias: [..., N].

    Decode is told from prefill by the shape of x: [batch, 1, K] and [batch, K] are decode.

    Args:
        x: int8 or float8_e4m3fn.
        x_scale: fp32 [..., 1] or one value.
        w_NK: of the dtype of x.
        w_scale: fp32 [N, 1], [N] or one value.
        bias: [N], or None.
        dtype: of the result.

    Raises:
        ValueError: dtypes or shapes do not fit each other.
    """
    if x.dtype not in DTYPES.values() or w_NK.dtype != x.dtype:
        raise ValueError(f"x {x.dtype}, w {w_NK.dtype}: both int8, or both float8_e4m3fn")
    if w_NK.ndim != 2 or x.ndim == 0 or not x.shape[-1] == w_NK.shape[1] > 0:
        raise ValueError(f"x {tuple(x.shape)} does not fit w {tuple(w_NK.shape)}: [..., K], [N, K]")
    rows = x.numel() // x.shape[-1]
    for name, scale, size in (("x", x_scale, rows), ("w", w_scale, w_NK.shape[0])):
        if scale.dtype != torch.float32 or scale.numel() not in (1, size):
            raise ValueError(
                f"{name}_scale {scale.dtype} {tuple(scale.shape)}: fp32, one value or {size}"
            )
    if bias is not None and tuple(bias.shape) != (w_NK.shape[0],):
        raise ValueError(f"bias {tuple(bias.shape)}: expected ({w_NK.shape[0]},)")
    decode = x.ndim < 3 or x.shape[-2] == 1
    y: Tensor = scaled_matmul_op(x, x_scale, w_NK, w_scale, bias, dtype, decode)
    return y


def shipped() -> Iterator[Shipped]:
    """What `launch` launches, for the ahead-of-time gates."""
    for name, kind in (("int8", "*i8"), ("e4m3", "*fp8e4nv")):
        for phase, cut in (("decode", DECODE), ("prefill", PREFILL)):
            yield Shipped(
                name=f"scaled_matmul {name} {phase}",
                kernel=_kernel,
                types={"x_ptr": kind, "w_ptr": kind, "x_scale_ptr": "*fp32", "w_scale_ptr": "*fp32"}
                | {"bias_ptr": "*bf16", "y_ptr": "*bf16", "M": "i32", "N": "i32", "K": "i32"},
                constants={"INT8": name == "int8", "BIAS": True, "X_ROWS": True, "W_ROWS": True}
                | {"EVEN_K": True, "PROMOTE": PROMOTE, "BLOCK_M": cut.block_m}
                | {"BLOCK_N": cut.block_n, "BLOCK_K": cut.block_k},
                num_warps=cut.num_warps,
                num_stages=cut.num_stages,
                fp_fusion=False,
                divisible=("N", "K"),
                values=cut.block_n * cut.block_k,
                capabilities=(80, 90, 100) if name == "int8" else (90, 100),
            )
