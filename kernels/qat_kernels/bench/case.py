"""A case of the benchmark: one piece of work, those who do it, and what no implementation avoids.

The first contestant of a case is its baseline. ``moved`` counts each byte that must be read or
written once; ``operations`` counts bf16 multiplications and additions (an int8 or FP8 one is half).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from qat_kernels.bench.timing import Call

Factory = Callable[[], "Case"]
"""Makes a case with its data."""


@dataclass(frozen=True)
class Case:
    """One piece of work and those who do it."""

    kernel: str
    name: str
    m: int
    """Rows, or cached tokens."""
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


def present(contestants: dict[str, list[Call]]) -> dict[str, list[Call]]:
    """Without those that could not be built."""
    return {name: calls for name, calls in contestants.items() if calls}
