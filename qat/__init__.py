"""Quantization-aware training whose shipped low-bit model is the trained one, bit for bit."""

__version__ = "0.1.0"
