"""Which cases each kernel module has."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from qat_kernels.bench import linear, other
from qat_kernels.bench.case import Factory

BENCHMARKS: dict[str, Callable[[torch.device, bool], Iterator[Factory]]] = {
    "fake_quant": other.training,
    "w4a16": linear.weight_only,
    "w8a8": linear.int8,
    "fp8": linear.float8,
    "nf4": linear.normal_float,
    "activation_quant": other.activations,
    "scaled_matmul": linear.codes_matmul,
    "kv_cache": other.caches,
}
"""Kernel module to its cases on a device; the bool asks for tiny shapes."""
