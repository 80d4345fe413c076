"""Measuring peak memory by phase, and giving back what was freed."""

import ctypes
import gc
import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import torch
from torch import nn

MMAP_THRESHOLD = 128 << 10
"""With `give_back`, allocations from this size on go back to the system when they are freed. It is
glibc's initial value, fixed. Left alone it grows to 32 MiB, and what glibc then keeps was 15 % of
the peak of plain training and 23 % of QAT (112 M parameters, 512 tokens). Page faults are the
price: a QAT step of 105 M parameters took 1.3 times as long, one of the demo model 1.8 times."""
TRIM_THRESHOLD = 32 << 20
"""Free memory that the heap may keep at its end, so that small tensors cost no system calls."""


class MemoryMeter:
    """Peak memory by phase, as growth since the meter was made: before the model is loaded.

    Linux can start a peak anew for each phase; elsewhere a phase's peak includes those of earlier
    phases.

    Args:
        give_back: tell the allocator to give freed tensors back, see `MMAP_THRESHOLD`, so that the
            peak is that of the tensors in use. Slow: for measuring, not for training.
    """

    def __init__(self, give_back: bool = False) -> None:
        if give_back:
            _give_back_when_freed()
        self.host: dict[str, int] = {}
        """Growth of the resident process at the peak of each phase, bytes."""
        self.device: dict[str, int] = {}
        """Growth of the CUDA allocator's memory, bytes; empty without CUDA."""
        self._open: list[str] = []
        gc.collect()
        self._host_start: int = psutil.Process().memory_info().rss
        self._device_start = torch.cuda.memory_allocated() if torch.cuda.is_available() else 0

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Measure the block; a name that comes again keeps the larger peak.

        Inside another phase the block counts for itself alone, and the other one goes on after it.
        """
        self._note()
        self._open.append(name)
        _start_peak()
        try:
            yield
        finally:
            self._note()
            self._open.pop()
            _start_peak()

    def _note(self) -> None:
        """Add the peak since `_start_peak` to the innermost open phase."""
        if not self._open:
            return
        name = self._open[-1]
        self.host[name] = max(resident_peak() - self._host_start, self.host.get(name, 0))
        if torch.cuda.is_available():
            growth = torch.cuda.max_memory_allocated() - self._device_start
            self.device[name] = max(growth, self.device.get(name, 0))

    @property
    def peak(self) -> int:
        """Largest growth over the phases: the device's where there is one, else the host's."""
        return max((self.device or self.host).values(), default=0)


def release(model: nn.Module) -> None:
    """Free what building or training a model leaves behind.

    Gradients, cycles that hold the optimizer's state, and the holes of glibc's heap: small tensors
    that stay, such as 4-bit codes, are scattered among temporaries that went.
    """
    model.zero_grad()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    with suppress(OSError, AttributeError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)


def _give_back_when_freed() -> None:
    """Fix glibc's threshold; other C libraries have no such call."""
    trim_threshold, mmap_threshold = -1, -3  # M_TRIM_THRESHOLD and M_MMAP_THRESHOLD of malloc.h
    with suppress(OSError, AttributeError, TypeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(mmap_threshold, MMAP_THRESHOLD)
        mallopt(trim_threshold, TRIM_THRESHOLD)


def _start_peak() -> None:
    """Let the peak begin at what is in use now (Linux, CUDA)."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    with suppress(OSError):
        # "5" resets the peak resident set size, see proc_pid_clear_refs(5)
        Path("/proc/self/clear_refs").write_text("5", "ascii")


def resident_peak() -> int:
    """Largest resident memory of this process since `_start_peak`, bytes."""
    with suppress(OSError):
        for line in Path("/proc/self/status").read_text("ascii").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def peak_memory_bytes() -> int:
    """Measured peak: of the GPU's allocator where there is one, else of the resident process."""
    return int(torch.cuda.max_memory_allocated()) if torch.cuda.is_available() else resident_peak()
