"""Low-bit numerics and kernels. Importing needs no GPU and compiles nothing."""

from qat_kernels.dispatch import explain
from qat_kernels.numerics import (
    QuantSpec,
    check_finite,
    compute_scale,
    dequantize,
    fake_quantize,
    pack,
    quantize,
    unpack,
)

__all__ = [
    "QuantSpec",
    "check_finite",
    "compute_scale",
    "dequantize",
    "explain",
    "fake_quantize",
    "pack",
    "quantize",
    "unpack",
]
