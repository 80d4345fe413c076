"""What the kernel modules share: a Triton that may be missing, path choices, and a self-test.

Every operation has one function that chooses its path from shapes, dtypes and device, and returns
a `Choice`; the operator runs what it says and `qat_kernels.explain` prints it.

A compiled kernel is trusted only after it has computed an exact integer-valued case on the device
at hand (`verified`): ptxas 12.8, which Triton 3.6 and 3.7 bundle, miscompiles some `wgmma`
instructions without a word. A kernel that fails is not used again in the process; its slow path is.
"""

from __future__ import annotations

import functools
import os
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

try:
    # under its own name, because kernel modules import it from here
    import triton as triton
except ImportError:  # no wheel for this platform: the CPU paths need none
    triton = None

MIN_CAPABILITY = (8, 0)
"""Least compute capability of the Triton kernels: bf16 tensor cores start there."""


@dataclass(frozen=True)
class Choice:
    """Which implementation runs, and why.

    >>> print(Choice("reference", "fp32 is always computed exactly"))
    reference: fp32 is always computed exactly
    """

    path: str
    """Name of the implementation."""
    reason: str
    """Why this one, in a few words."""

    def __str__(self) -> str:
        return f"{self.path}: {self.reason}"


def jit(function: Any) -> Any:
    """`triton.jit` where Triton is installed; else the function, which nothing will launch."""
    return function if triton is None else triton.jit(function)


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter (TRITON_INTERPRET=1 since before the import)."""
    return triton is not None and bool(triton.knobs.runtime.interpret)


def kernels_run_on(device: torch.device) -> Choice | None:
    """None if Triton kernels can run on ``device``, else the reason why they cannot, as a Choice.

    In the interpreter they run on the CPU, which is for tests: the operators do not choose it.
    """
    if triton is None:
        return Choice("reference", "Triton is not installed")
    if device.type != "cuda":
        return Choice("reference", f"Triton kernels are for CUDA, this is {device.type}")
    if not torch.cuda.is_available():
        return Choice("reference", "no CUDA device here")
    if torch.version.hip is not None:
        return Choice("reference", "Triton kernels are written for NVIDIA GPUs")
    capability = capability_of(device)
    if capability < MIN_CAPABILITY:
        return Choice(
            "reference", f"compute capability {capability[0]}.{capability[1]} is below 8.0"
        )
    return None


@functools.cache
def capability_of(device: torch.device) -> tuple[int, int]:
    """Compute capability of a CUDA device, such as (9, 0) for Hopper."""
    return torch.cuda.get_device_capability(device)


def on(tensor: Tensor) -> AbstractContextManager[Any]:
    """Make the tensor's GPU current while a kernel is launched; nothing on the CPU."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


_VERIFIED: dict[tuple[str, torch.device], bool] = {}


def verified(name: str, device: torch.device, check: Callable[[], bool]) -> bool:
    """Whether the kernel ``name`` computes right on ``device``: ``check`` runs once per process.

    Args:
        name: the kernel and its configuration.
        device: a CUDA device.
        check: runs the kernel on a case whose result is exact, and compares with equality.

    Raises:
        RuntimeError: called for the first time while a CUDA graph is captured, where results
            cannot be read.
    """
    key = (name, device)
    if key not in _VERIFIED:
        if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                f"{name}: run the model once before capturing a CUDA graph, so that the kernel "
                "can be tested on this device"
            )
        with torch.no_grad():
            _VERIFIED[key] = check()
        if not _VERIFIED[key]:
            warnings.warn(
                f"{name} computes wrong values on {torch.cuda.get_device_name(device)}: the "
                f"compiler ({ptxas()}) miscompiles it. The slow reference runs instead; another "
                "ptxas can be named by TRITON_PTXAS_PATH",
                RuntimeWarning,
                stacklevel=2,
            )
    return _VERIFIED[key]


@functools.cache
def ptxas_version() -> tuple[int, int]:
    """(major, minor) of the ptxas that Triton calls for sm_90 and before."""
    found = triton.knobs.nvidia.ptxas.version.split(".")
    return int(found[0]), int(found[1])


def ptxas() -> str:
    """The assembler's name, version and place, for messages."""
    path = os.environ.get("TRITON_PTXAS_PATH", "bundled with Triton")
    return f"ptxas {'.'.join(str(part) for part in ptxas_version())}, {path}"
