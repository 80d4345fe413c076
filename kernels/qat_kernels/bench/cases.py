"""What is measured: for each kernel module its cases, with the work that no implementation avoids.

The first contestant of a case is its baseline. ``moved`` counts each byte that must be read or
written once; ``operations`` counts multiplications and additions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional

from qat_kernels import activation_quant, scaled_matmul, w4a16, w8a8
from qat_kernels.activation_quant import Format
from qat_kernels.bench.peers import build
from qat_kernels.bench.timing import Call, copies
from qat_kernels.numerics import QuantSpec, compute_scale, pack, quantize

Factory = Callable[[], "Case"]
"""Makes a case with its data."""


@dataclass(frozen=True)
class Case:
    """One piece of work and those who do it."""

    kernel: str
    name: str
    m: int
    contestants: Mapping[str, Sequence[Call]]
    moved: float
    operations: float


def rows(device: torch.device, small: bool) -> tuple[int, ...]:
    """Values of M: decode batches, and two prefill lengths."""
    if small:
        return (1, 4)
    return (1, 2, 4, 8, 16, 32, 64, 128, 512, 4096) if device.type == "cuda" else (1, 4, 8, 32, 128)


def matrices(device: torch.device, small: bool) -> tuple[tuple[int, int], ...]:
    """(N, K) of the weights."""
    if small:
        return ((64, 128),)
    return ((4096, 4096), (14336, 4096)) if device.type == "cuda" else ((4096, 4096),)


def weights(n: int, k: int, count: int, device: torch.device) -> list[Tensor]:
    """Random bf16 weights [N, K]."""
    return [torch.randn(n, k, device=device).to(torch.bfloat16) for _ in range(count)]


def _of(contestants: dict[str, list[Call]]) -> dict[str, list[Call]]:
    """Without those that could not be built."""
    return {name: calls for name, calls in contestants.items() if calls}


def weight_only(device: torch.device, small: bool) -> Iterator[Factory]:
    """Weight-only linear layers of 4, 3, 2 and 8 bits against bf16."""
    for n, k in matrices(device, small):
        for bits, group in ((4, 32), (4, 128), (3, 128), (2, 64), (8, k)):
            if bits == 4 or not small:
                for m in rows(device, small):
                    yield partial(_weight_only, device, m, n, k, bits, group)


def _weight_only(device: torch.device, m: int, n: int, k: int, bits: int, group: int) -> Case:
    spec = QuantSpec(bits=bits, group_size=group)
    # one sequence of m tokens beyond the batches of decode
    shape = (1, m, k) if m > 64 else (m, 1, k)
    x = torch.randn(shape, device=device).to(torch.bfloat16)
    dense = weights(n, k, copies(2 * n * k, device), device)
    small_copies = copies(n * k * bits // 8, device)
    packed = []
    for w in weights(n, k, small_copies, device):
        scale, _ = compute_scale(w, spec)
        codes = pack(quantize(w, scale, None, spec).cpu(), bits)
        packed.append(w4a16.prepare(codes, scale.cpu(), None, spec, (n, k), device))
    contestants: dict[str, list[Call]] = {
        "bf16": [partial(functional.linear, x, w) for w in dense],
        "ours": [partial(w4a16.linear, x, w) for w in packed],
    }
    if bits == 4 and group <= 256:
        for name in ("torch tinygemm", "torchao int4"):
            contestants[name] = build(name, dense[:small_copies], x.view(m, k), group)
    moved = n * k * bits / 8 + 2 * n * k / group + 2 * m * (n + k)
    name = f"int{bits} g{'K' if group == k else group} {n}x{k}"
    return Case("w4a16", name, m, _of(contestants), moved, 2 * m * n * k)


def int8(device: torch.device, small: bool) -> Iterator[Factory]:
    """W8A8 linear layers with dynamic activations against bf16."""
    for n, k in matrices(device, small):
        for m in rows(device, small):
            yield partial(_int8, device, m, n, k)


def _int8(device: torch.device, m: int, n: int, k: int) -> Case:
    spec = QuantSpec(bits=8, granularity="channel", grid="absmax")
    x = torch.randn(m, 1, k, device=device).to(torch.bfloat16)
    dense = weights(n, k, copies(2 * n * k, device), device)
    packed = []
    for w in weights(n, k, copies(n * k, device), device):
        scale, _ = compute_scale(w, spec)
        codes = quantize(w, scale, None, spec)
        packed.append(w8a8.prepare(codes, scale))
    contestants: dict[str, list[Call]] = {
        "bf16": [partial(functional.linear, x, w) for w in dense],
        "ours": [partial(w8a8.linear, x, w) for w in packed],
        "torchao W8A8": build("torchao W8A8", dense, x.view(m, k), k),
    }
    # int8 tensor cores do twice the operations of bf16
    return Case("w8a8", f"{n}x{k}", m, _of(contestants), n * k + 2 * m * (n + k), m * n * k)


def activations(device: torch.device, small: bool) -> Iterator[Factory]:
    """Quantizing activations, alone and with the RMSNorm before it."""
    formats: tuple[Format, ...] = ("int8", "e4m3")
    for to in formats:
        for norm in (False, True):
            for m in rows(device, small):
                yield partial(_activations, device, m, 128 if small else 4096, to, norm)


def _activations(device: torch.device, m: int, k: int, to: Format, norm: bool) -> Case:
    inputs = [
        torch.randn(m, k, device=device).to(torch.bfloat16)
        for _ in range(copies(2 * m * k, device))
    ]
    weight = torch.ones(k, device=device, dtype=torch.bfloat16) if norm else None
    calls = {
        "chain of operators": [
            partial(activation_quant.reference, x, None, weight, to=to) for x in inputs
        ],
        "ours": [
            partial(activation_quant.quantize_activation, x, None, weight, to=to) for x in inputs
        ],
    }
    name = f"{to}{' after RMSNorm' if norm else ''} K={k}"
    return Case("activation_quant", name, m, calls, 3 * m * k, 0)


def codes_matmul(device: torch.device, small: bool) -> Iterator[Factory]:
    """The matmul of W8A8 and FP8 layers alone, against bf16 and torch's own."""
    for n, k in matrices(device, small):
        for dtype in (torch.int8, torch.float8_e4m3fn):
            # on the CPU the reference runs, and layers take another path
            if device.type == "cuda" or small:
                for m in rows(device, small):
                    yield partial(_codes_matmul, device, m, n, k, dtype)


def _codes_matmul(device: torch.device, m: int, n: int, k: int, dtype: torch.dtype) -> Case:
    dense = weights(n, k, copies(2 * n * k, device), device)
    x = torch.randn(m, k, device=device).to(torch.bfloat16)
    x_codes, x_scale = x.clamp(-3, 3).to(dtype), torch.ones(m, 1, device=device)
    w_scale = torch.ones(n, 1, device=device)
    codes = [w.clamp(-3, 3).to(dtype) for w in dense]
    contestants: dict[str, list[Call]] = {
        "bf16": [partial(functional.linear, x, w) for w in dense],
        "ours": [partial(scaled_matmul.scaled_matmul, x_codes, x_scale, w, w_scale) for w in codes],
    }
    # cuBLAS takes int8 from 17 rows on
    if dtype == torch.int8 and m > 16:
        contestants["torch._int_mm"] = [partial(torch._int_mm, x_codes, w.t()) for w in codes]
    name = f"{'int8' if dtype == torch.int8 else 'e4m3'} {n}x{k}"
    moved = n * k + m * k + 2 * m * n
    return Case("scaled_matmul", name, m, contestants, moved, m * n * k)


BENCHMARKS: dict[str, Callable[[torch.device, bool], Iterator[Factory]]] = {
    "w4a16": weight_only,
    "w8a8": int8,
    "activation_quant": activations,
    "scaled_matmul": codes_matmul,
}
"""Kernel module to its cases; every kernel module has an entry."""
