"""Launch the Triton kernels of `w4a16`: configurations, launchers, self-test, what is shipped.

Variants. ``safe`` has a tile of 32 features and 2 warps, for which the compiler emits ``mma.sync``
everywhere. ``fast`` (sm_90) has 128 features and 4 warps and becomes ``wgmma`` with its left
operand in registers, which ptxas before 13.3 miscompiles: it is used from 13.3 on, after the
self-test on the device has passed.

Shape legend: M rows, N features, K inputs, C chunks of K, W words of a chunk.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from qat_kernels.aot import Shipped
from qat_kernels.numerics import dequantize as dequantize_reference
from qat_kernels.support import capability_of, interpreted, on, ptxas_version, triton
from qat_kernels.tuning import configuration
from qat_kernels.w4a16_planes import Layout, layout, to_groups, to_planes
from qat_kernels.w4a16_triton import dequantize_kernel, matmul_kernel, reduce_kernel

SAFE_PTXAS = (13, 3)
"""First ptxas that assembles wgmma with register operands correctly."""


@dataclass(frozen=True)
class Config:
    """How the matmul is cut up. Never depends on M but for `block_m`, which changes no value."""

    block_n: int
    """Features per program."""
    num_warps: int
    """Warps per program."""
    num_stages: int
    """Chunks in flight."""
    splits: int
    """Parts of K that run side by side."""


_TYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
REDUCE_BLOCK = 1024
DEQUANT_BLOCK_N = 16
PROGRAMS = 264
"""Programs that fill a GPU: two for each of Hopper's 132 processors. A constant, so that the order
of additions is the same on every GPU without a table."""


def fast_is_safe(capability: tuple[int, int]) -> bool:
    """Whether ptxas assembles the fast variant correctly, and the GPU has its instruction."""
    return capability == (9, 0) and ptxas_version() >= SAFE_PTXAS


def heuristic(n: int, plan: Layout, chunks: int, fast: bool) -> Config:
    """The configuration of a weight [n, chunks * plan.chunk] that no table knows."""
    block_n, num_warps = (128, 4) if fast else (32, 2)
    programs = -(-n // block_n)
    # each part of K keeps at least four trips for its pipeline
    splits = max(1, min(-(-PROGRAMS // programs), chunks // plan.repeat // 4, 8))
    return Config(block_n, num_warps, 4, splits)


@functools.cache
def config_of(n: int, k: int, plan: Layout, capability: tuple[int, int]) -> Config:
    """The configuration for a weight [n, k]: the GPU family's table, else `heuristic`.

    An entry that was measured with a newer ptxas may hold a tile that becomes ``wgmma``: where that
    is not safe, the heuristic decides.
    """
    chunks = -(-k // plan.step) * plan.repeat
    fast = fast_is_safe(capability)
    default = heuristic(n, plan, chunks, fast)
    key = f"n={n} k={k} bits={plan.bits} group={plan.group}"
    config = Config(**configuration("w4a16", key, capability, asdict(default)))
    return default if config.num_warps >= 4 and not fast else config


def _constants(plan: Layout, zero: bool, even: bool) -> dict[str, Any]:
    return {
        "BITS": plan.bits,
        "GROUP": plan.group,
        "WIDTH": plan.width,
        "FIELDS": plan.fields,
        "ZERO": zero,
        "EVEN_K": even,
    }


def matmul(
    x_MK: Tensor,
    words: Tensor,
    high: Tensor | None,
    scale: Tensor,
    zero: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    plan: Layout,
    config: Config | None = None,
) -> Tensor:
    """Launch the fused matmul; see the module docstring.

    Args:
        x_MK: [M, K] bf16 or fp16, contiguous; M at least 1.
        words: int16 [N, C * W].
        high: int8 of the same shape for 3 bits, else None.
        scale: [N, groups], bf16 or fp32, as `w4a16_planes.to_groups` makes them.
        zero: int8 zero points like scale, or None; 2 to 4 bits only.
        bias: [N], any strides, or None.
        residual: [M, N] contiguous, or None.
        plan: how the codes lie.
        config: launch with this configuration instead of the table's.

    Returns:
        [M, N] in the dtype of x.

    Raises:
        ValueError: zero points beside codes of 8 bits, whose bf16 weights have no room for them.
    """
    if zero is not None and plan.bits == 8:
        raise ValueError("bits=8: the kernel takes zero points with codes of 2 to 4 bits")
    (m, k), n = x_MK.shape, words.shape[0]
    out_dtype = x_MK.dtype
    # the kernels read it without its stride
    bias = None if bias is None else bias.contiguous()
    capability = (8, 0) if interpreted() else capability_of(x_MK.device)
    config = config or config_of(n, k, plan, capability)
    if interpreted():
        # its bf16 arithmetic is wrong and its fp32 -> bf16 truncates: fp32 in and out
        x_MK, scale = x_MK.float(), scale.float()
        bias = None if bias is None else bias.float()
        residual = None if residual is None else residual.float()
    chunks = words.shape[1] // plan.width
    block_m = _block_m(m, config)
    y = x_MK.new_empty(m, n)
    split = config.splits > 1
    out = x_MK.new_empty(config.splits, m, n, dtype=torch.float32) if split else y
    # a tensor that stands in for one that is not there is never read
    high_, zero_, bias_, residual_ = (
        words if t is None else t for t in (high, zero, bias, residual)
    )
    epilogue = {"BIAS": bias is not None, "RESIDUAL": residual is not None}
    grid = (triton.cdiv(n, config.block_n), triton.cdiv(m, block_m), config.splits)
    with on(x_MK):
        matmul_kernel[grid](
            x_MK, words, high_, scale, zero_, bias_, residual_, out, m, n, k, chunks,
            **_constants(plan, zero is not None, k % plan.step == 0),
            **(epilogue if not split else {"BIAS": False, "RESIDUAL": False}),
            TYPE=_TYPES[x_MK.dtype],
            REPEAT=plan.repeat,
            SPLITS=config.splits,
            BLOCK_M=block_m,
            BLOCK_N=config.block_n,
            num_warps=config.num_warps,
            num_stages=config.num_stages,
        )  # fmt: skip
        if split:
            reduce_kernel[(triton.cdiv(m * n, REDUCE_BLOCK),)](
                out, bias_, residual_, y, m, n,
                **epilogue, SPLITS=config.splits, BLOCK=REDUCE_BLOCK,
            )  # fmt: skip
    return y.to(out_dtype)


def dequantize(
    words: Tensor,
    high: Tensor | None,
    scale: Tensor,
    zero: Tensor | None,
    plan: Layout,
    k: int,
    dtype: torch.dtype,
) -> Tensor:
    """The weight [N, k] in ``dtype``: (q - z) * s in fp32, rounded once; see `matmul`."""
    n, chunks = words.shape[0], words.shape[1] // plan.width
    out = scale.new_empty(n, k, dtype=torch.float32 if interpreted() else dtype)
    grid = (triton.cdiv(n, DEQUANT_BLOCK_N), chunks)
    with on(words):
        dequantize_kernel[grid](
            words,
            words if high is None else high,
            scale.float() if interpreted() else scale,
            words if zero is None else zero,
            out,
            n,
            k,
            chunks,
            **_constants(plan, zero is not None, k % plan.step == 0),
            BLOCK_N=DEQUANT_BLOCK_N,
        )
    return out.to(dtype)


def _block_m(m: int, config: Config) -> int:
    """Rows per program, which change no value.

    One instruction makes each element in all cases: ``mma.sync`` in the safe tile, also for 8 rows;
    ``wgmma``, which 8 rows would not get, in the fast one.
    """
    if m <= 8 and config.num_warps < 4:
        return 8
    return 16 if m <= 16 else 32


def check(
    device: torch.device,
    bits: int,
    group: int,
    half: torch.dtype,
    zero: bool,
    config: Config | None = None,
) -> bool:
    """Whether the kernels are exact on ``device`` for integer-valued inputs, in every tile.

    With whole trips through K, enough of them for the pipeline to run full, and with a last trip
    that is not full, where the group allows it: that is other machine code. The former with bf16
    scales, the latter with fp32 ones.

    Args:
        device: a CUDA device, or the CPU in the interpreter.
        bits: width of the codes.
        group: inputs per scale.
        half: bf16 or fp16.
        zero: with zero points.
        config: the configuration that a layer will use; None tries the default one, cut and uncut.
    """
    plan = layout(bits, group)
    assert plan is not None
    whole = math.lcm(group, plan.step)
    lengths = {whole * max(1, 6 * plan.step // whole), whole + group}
    return all(_check_length(device, plan, group, half, zero, k, config) for k in sorted(lengths))


def _check_length(
    device: torch.device,
    plan: Layout,
    group: int,
    half: torch.dtype,
    zero: bool,
    k: int,
    config: Config | None,
) -> bool:
    n = 96
    generator = torch.Generator().manual_seed(0)
    low = -(1 << (plan.bits - 1))
    codes = torch.randint(low, -low, (n, k), generator=generator).to(torch.int8)
    scale = torch.randint(1, 3, (n, k // group), generator=generator).float()
    zeros = torch.randint(-2, 3, scale.shape, generator=generator).to(torch.int8) if zero else None
    # few nonzeros: every sum is an integer that fp32 holds
    keep = torch.rand(40, k, generator=generator) < 8 / k
    x = (torch.randint(-1, 2, (40, k), generator=generator) * keep).to(half)
    weight = dequantize_reference(codes, scale, zeros)
    expected = (x.float() @ weight.T).to(half)
    words, high = to_planes(codes, plan)
    grouped = [None if t is None else to_groups(t, plan, group, k) for t in (scale, zeros)]
    high, scale_G, zeros_G = (None if t is None else t.to(device) for t in (high, *grouped))
    words = words.to(device)
    assert scale_G is not None
    scale_G = scale_G.to(torch.bfloat16 if k % plan.step == 0 else torch.float32)
    dense = dequantize(words, high, scale_G, zeros_G, plan, k, half)
    if not torch.equal(dense.cpu(), weight.to(half)):
        return False
    default = config_of(n, k, plan, (8, 0) if interpreted() else capability_of(device))
    uncut, cut = (replace(default, splits=splits) for splits in (1, 2))
    trials = ((1, uncut), (16, uncut), (40, uncut), (40, cut))
    for m, trial in trials if config is None else ((1, config), (16, config), (40, config)):
        y = matmul(x[:m].to(device), words, high, scale_G, zeros_G, None, None, plan, trial)
        if not torch.equal(y.cpu(), expected[:m]):
            return False
    return True


def shipped() -> Iterator[Shipped]:
    """What `matmul` and `dequantize` launch, for the ahead-of-time gates."""
    for bits, group, half, zero, m in _SHIPPED:
        # the fast tile has no form for fewer than 16 rows
        for fast in (False, True)[: 1 if m == 1 else 2]:
            yield _shipped_matmul(bits, group, half, zero, m, fast)
    for bits, zero in ((4, False), (3, True), (8, False)):
        yield _shipped_dequantize(bits, zero)
    yield Shipped(
        name="w4a16 sum of 4 parts",
        kernel=reduce_kernel,
        types={"part_ptr": "*fp32", "bias_ptr": "*bf16", "residual_ptr": "*bf16", "y_ptr": "*bf16"}
        | {"N": "i32"},
        constants={"BIAS": True, "RESIDUAL": True, "SPLITS": 4, "BLOCK": REDUCE_BLOCK, "M": 1},
        num_warps=4,
        divisible=("N",),
        # rows times features is only known to be a multiple of 16 through N, 64 bits wide
        wide_loads=False,
    )


def _pointers(bits: int, zero: bool) -> dict[str, str]:
    return {
        "words_ptr": "*i16",
        "high_ptr": "*i8" if bits == 3 else "*i16",
        "scale_ptr": "*bf16",
        "zero_ptr": "*i8" if zero else "*i16",
    }


def _shipped_matmul(bits: int, group: int, half: str, zero: bool, m: int, fast: bool) -> Shipped:
    plan = layout(bits, group)
    assert plan is not None
    # one program for each 32 features of 16,384: nothing to split
    config = heuristic(16384, plan, 64, fast)
    block_m = _block_m(m, config)
    name = f"int{bits} g{group} {half} M{block_m}" + (" zero" if zero else "")
    dense = dict.fromkeys(("x_ptr", "bias_ptr", "residual_ptr", "y_ptr"), f"*{half}")
    return Shipped(
        name=f"w4a16 {name} {'fast' if fast else 'safe'}",
        kernel=matmul_kernel,
        types=_pointers(bits, zero)
        | dense
        | dict.fromkeys(("M", "N", "K", "CHUNKS")[m == 1 :], "i32"),
        # Triton compiles an argument of one into the kernel
        constants=dict.fromkeys(("M",)[: m == 1], 1)
        | _constants(plan, zero, even=True)
        | {"BIAS": False, "RESIDUAL": False, "TYPE": half, "SPLITS": config.splits}
        | {"BLOCK_M": block_m, "BLOCK_N": config.block_n, "REPEAT": plan.repeat},
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        divisible=("N", "K"),
        values=config.block_n * plan.step,
        most_instructions={90: 3.0 if fast else 5.0} if bits == 4 else {},
        capabilities=(90,) if fast else (80, 90, 100),
        forbidden=() if fast else ("HGMMA", "UTCHMMA"),
    )


def _shipped_dequantize(bits: int, zero: bool) -> Shipped:
    plan = layout(bits, 128)
    assert plan is not None
    return Shipped(
        name=f"w4a16 dequantize int{bits}" + (" zero" if zero else ""),
        kernel=dequantize_kernel,
        types=_pointers(bits, zero) | {"out_ptr": "*bf16", "N": "i32", "K": "i32", "CHUNKS": "i32"},
        constants=_constants(plan, zero, even=True) | {"BLOCK_N": DEQUANT_BLOCK_N},
        num_warps=4,
        divisible=("N", "K"),
        values=DEQUANT_BLOCK_N * plan.chunk,
    )


_SHIPPED = (
    (4, 32, "bf16", False, 1),
    (4, 32, "bf16", False, 16),
    (4, 128, "bf16", False, 1),
    (4, 128, "bf16", False, 16),
    (4, 128, "bf16", False, 32),
    (4, 4096, "bf16", False, 16),
    (4, 128, "fp16", False, 16),
    (4, 128, "bf16", True, 16),
    (2, 64, "bf16", False, 16),
    (3, 128, "bf16", False, 16),
    (3, 128, "bf16", True, 16),
    (8, 4096, "bf16", False, 16),
    (8, 128, "fp16", False, 16),
)
"""(bits, group, type, zero points, rows M) of the configurations that the gates compile."""
