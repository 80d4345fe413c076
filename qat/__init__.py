"""Quantization-aware training whose shipped low-bit model is the trained one, bit for bit."""

from typing import Any

__version__ = "0.1.0"

__all__ = ["__version__", "packed_config"]


def __getattr__(name: str) -> Any:
    """`qat.packed_config`, imported when it is asked for: it brings transformers with it."""
    if name == "packed_config":
        from qat.transformers_quantizer import packed_config

        return packed_config
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
