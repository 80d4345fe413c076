"""Benchmarks of the kernels beside their peers: ``python -m qat_kernels.bench [NAME ...]``."""
