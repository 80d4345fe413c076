"""Time contestants fairly: interleaved, on data that no cache holds, with the machine's own floor.

A machine's speed drifts, so contestants take turns call by call, and figures are quantiles of one
run. A model's weights do not stay in a cache between two tokens: each contestant owns enough copies
of its data, used in turn, to fill the last-level cache twice (CPU, at most 64 copies: a few small
rows stay in the cache, as they do behind another layer), or the cache is overwritten before each
call (GPU).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Call = Callable[[], object]
"""One call of a contestant; what it returns is dropped."""
COLD_BYTES = 256 << 20
"""Memory to go through between two uses of the same data."""
WARM_UP = 3
"""Calls of each contestant that are not timed."""


@dataclass(frozen=True)
class Times:
    """Quantiles of the seconds that one call takes."""

    p20: float
    p50: float
    p80: float


def measure(
    contestants: Mapping[str, Sequence[Call]], device: torch.device, seconds: float
) -> dict[str, Times]:
    """Time contestants in turns.

    Args:
        contestants: name to calls that do the same work on different copies of the data.
        device: where they run.
        seconds: time to spend, all contestants together; each runs at least five times.
    """
    for calls in contestants.values():
        for i in range(WARM_UP):
            calls[i % len(calls)]()
    spent: dict[str, list[float]] = {name: [] for name in contestants}
    one = _time_cuda if device.type == "cuda" else _time_cpu
    start, turn = time.perf_counter(), 0
    while turn < 5 or time.perf_counter() - start < seconds:
        for name, calls in contestants.items():
            spent[name].append(one(calls[turn % len(calls)], device))
        turn += 1
    return {name: _quantiles(values) for name, values in spent.items()}


def _quantiles(values: Sequence[float]) -> Times:
    found = torch.tensor(values, dtype=torch.float64).quantile(
        torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64)
    )
    return Times(*found.tolist())


def _time_cpu(call: Call, device: torch.device) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def _time_cuda(call: Call, device: torch.device) -> float:
    # overwriting the cache also keeps the device busy while the host queues the call: eight times
    # is half a millisecond at 4 TB/s, and the gap before a late launch would count as its time
    buffer = torch.empty(COLD_BYTES, dtype=torch.uint8, device=device)
    for _ in range(8):
        buffer.zero_()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    call()
    end.record()
    torch.cuda.synchronize(device)
    milliseconds: float = start.elapsed_time(end)
    return milliseconds / 1000


def copies(data_bytes: int, device: torch.device) -> int:
    """How many copies of data of this size keep each use of it cold."""
    return 1 if device.type == "cuda" else max(1, min(64, -(-COLD_BYTES // max(data_bytes, 1))))


@dataclass(frozen=True)
class Floor:
    """What this machine can do at most, measured: the best of several calls."""

    bandwidth: float
    """Bytes per second read plus written by a copy that no cache holds."""
    operations: float
    """bf16 multiply and add operations per second of a large square matmul."""

    def seconds(self, moved: float, operations: float) -> float:
        """Least time to move so many bytes and do so many operations, side by side."""
        return max(moved / self.bandwidth, operations / self.operations)


def floor(device: torch.device) -> Floor:
    """Measure the floor of a device; takes a second."""
    source = torch.zeros(COLD_BYTES, dtype=torch.uint8, device=device)
    target = torch.zeros_like(source)
    size = 8192 if device.type == "cuda" else 1024
    square = torch.randn(size, size, device=device).to(torch.bfloat16)

    def copy() -> Tensor:
        return target.copy_(source)

    def multiply() -> Tensor:
        return square @ square

    one = _time_cuda if device.type == "cuda" else _time_cpu
    best = []
    for call in (copy, multiply):
        call()
        best.append(min(one(call, device) for _ in range(10)))
    return Floor(2 * COLD_BYTES / best[0], 2 * size**3 / best[1])
