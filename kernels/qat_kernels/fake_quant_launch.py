"""Launches the fake-quantization kernel: how it is cut for a group size, and what is shipped.

Shape legend as in `qat_kernels.fake_quant_triton`: T groups of g values, w_TG read from
w [..., N, K] as it lies in memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qat_kernels.aot import Shipped
from qat_kernels.fake_quant_triton import fake_quant_kernel
from qat_kernels.numerics import QuantSpec
from qat_kernels.support import interpreted, on

MAX_BLOCK = 16384
"""Longest group that one program holds in registers: 512 threads of 32 values."""
LOOP_BLOCK = 4096
"""Values per step for longer groups."""
PROGRAM_VALUES = 2048
"""Values per program for short groups: 16 for each of 128 threads."""
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
"""Dtypes of weights, gradients and results."""
INSTRUCTIONS_PER_BYTE = 8
"""Thread-instructions that an H200 can issue per byte moved at 85 % of its copy bandwidth: 132
multiprocessors * 128 lanes * 1.755 GHz / (0.85 * 4.3 TB/s) = 8.1."""
_NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}


@dataclass(frozen=True)
class Tile:
    """How a program is cut for one group size."""

    block: int
    """Lanes per group."""
    rows: int
    """Groups per program."""
    num_warps: int
    """Warps per program."""


def tile(group: int) -> Tile:
    """The tile for groups of ``group`` values."""
    block = 1 << (group - 1).bit_length()
    if block > MAX_BLOCK:
        return Tile(LOOP_BLOCK, 1, 8)
    rows = max(1, PROGRAM_VALUES // block)
    return Tile(block, rows, min(16, max(4, rows * block // 512)))


def mode_of(spec: QuantSpec) -> str | None:
    """The kernel's way to a scale for ``spec``, or None where only the reference has one."""
    if spec.grid == "mse" or spec.granularity not in ("group", "channel"):
        return None
    return spec.grid if spec.symmetric else "minmax"


def _constants(op: str, mode: str, spec: QuantSpec, group: int, zero: bool) -> dict[str, Any]:
    """Values of the kernel's constexpr arguments."""
    shape = tile(group)
    return {
        "OP": op,
        "MODE": mode,
        "BITS": spec.bits,
        "ZERO": zero,
        "PORTABLE": spec.scale_dtype == "bfloat16",
        "GROUP": group,
        "BLOCK": shape.block,
        "ROWS": shape.rows,
        "FACTOR": (group * spec.q_max) ** -0.5 if op == "learned" else 1.0,
    }


def launch(
    op: str,
    w: Tensor,
    spec: QuantSpec,
    out_dtype: torch.dtype,
    *,
    grad: Tensor | None = None,
    scale: Tensor | None = None,
    zero_point: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Run the kernel.

    Args:
        op: ``forward``, ``backward`` or ``learned`` (backward with the scale's gradient).
        w: [..., N, K], bf16, fp16 or fp32, any strides; not empty.
        spec: as `mode_of` admits.
        out_dtype: dtype of the result.
        grad: [..., N, K], any of the dtypes, for the two backward operations.
        scale: fp32 [..., N, G]; given instead of computed.
        zero_point: int8 of the shape of scale, or None.

    Returns:
        The result [..., N, K], contiguous, and the scale's gradient fp32 [..., N, G] (empty but
        for ``learned``).
    """
    mode = mode_of(spec) if scale is None else "given"
    assert mode is not None, "choose() sends this spec to the reference"
    group = spec.group_of(w.shape[-1])
    groups = w.numel() // group
    w, shape = w.detach().contiguous(), w.shape
    grad = w if grad is None else grad.contiguous()
    made = out_dtype
    if interpreted():
        # its bf16 arithmetic is wrong and its fp32 -> bf16 truncates: fp32 in and out
        w, grad, made = w.to(torch.float32), grad.to(torch.float32), torch.float32
    out = torch.empty(shape, dtype=made, device=w.device)
    # pointers that the operation does not read still have to be some tensor
    given = w if scale is None else scale.detach().to(torch.float32).contiguous()
    zero = given if zero_point is None else zero_point.contiguous()
    scale_grad = torch.empty(0, dtype=torch.float32, device=w.device)
    if op == "learned":
        scale_grad = torch.empty_like(given)
    constants = _constants(op, mode, spec, group, zero_point is not None)
    grid = (-(-groups // constants["ROWS"]),)
    with on(w):
        fake_quant_kernel[grid](
            *(w, grad, given, zero, out, scale_grad if op == "learned" else out, groups),
            **constants,
            num_warps=tile(group).num_warps,
        )
    return out.to(out_dtype), scale_grad


def configuration(
    op: str, spec: QuantSpec, k: int, w: torch.dtype, out: torch.dtype, given: bool = False
) -> Shipped:
    """The binary that `launch` would use for rows of k values, w and out of these dtypes.

    The gradient of the two backward operations is bf16, as under autocast.
    """
    group = spec.group_of(k)
    mode = "given" if given else mode_of(spec)
    assert mode is not None
    shape = tile(group)
    moved = w.itemsize + out.itemsize + (0 if op == "forward" else 2)
    w_type = f"*{_NAMES[w]}"
    grad_type = w_type if op == "forward" else f"*{_NAMES[torch.bfloat16]}"
    types = {
        "w_ptr": w_type,
        "grad_ptr": grad_type,
        "scale_ptr": "*fp32" if given else w_type,
        "zero_ptr": "*fp32" if given else w_type,
        "out_ptr": f"*{_NAMES[out]}",
        "scale_grad_ptr": "*fp32" if op == "learned" else f"*{_NAMES[out]}",
        "groups": "i32",
    }
    kind = f"int{spec.bits} {mode} {'channel' if group == k else 'g'}{group}"
    return Shipped(
        name=f"fake_quant {op} {kind} {_NAMES[w]}->{_NAMES[out]}",
        kernel=fake_quant_kernel,
        types=types,
        constants=_constants(op, mode, spec, group, zero=False),
        num_warps=shape.num_warps,
        values=shape.rows * shape.block,
        most_instructions={90: INSTRUCTIONS_PER_BYTE * moved},
    )


def shipped() -> Iterator[Shipped]:
    """Representative configurations of every kind that `launch` uses."""
    bf16, fp32 = torch.bfloat16, torch.float32
    int4 = {g: QuantSpec(group_size=g) for g in (32, 64, 128)}
    channel = QuantSpec(bits=8, granularity="channel", grid="absmax")
    minmax = QuantSpec(bits=3, symmetric=False, grid="absmax", group_size=64)
    yield configuration("forward", int4[32], 4096, bf16, bf16)
    yield configuration("forward", int4[128], 4096, fp32, bf16)
    yield configuration("forward", minmax, 4096, bf16, bf16)
    yield configuration("forward", channel, 4096, bf16, bf16)
    yield configuration("forward", channel, 32768, bf16, bf16)
    yield configuration("backward", int4[32], 4096, bf16, bf16)
    yield configuration("backward", int4[128], 4096, fp32, fp32)
    yield configuration("backward", minmax, 4096, bf16, bf16)
    yield configuration("backward", channel, 14336, bf16, bf16)
    yield configuration("forward", int4[64], 4096, bf16, bf16, given=True)
    yield configuration("learned", int4[64], 4096, bf16, bf16, given=True)
    yield configuration("learned", channel, 32768, bf16, bf16, given=True)
