"""Cases of the linear layers: weight-only, W8A8, FP8 and NF4."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch.nn import functional

from qat_kernels import activation_quant, fp8, nf4, scaled_matmul, w4a16, w8a8
from qat_kernels.activation_quant import Format
from qat_kernels.bench.case import Case, Factory, matrices, present, rows, weights
from qat_kernels.bench.peers import build
from qat_kernels.bench.timing import Call, copies
from qat_kernels.numerics import QuantSpec, compute_scale, pack, quantize

FORMATS: tuple[Format, ...] = ("int8", "e4m3")
"""Formats of codes whose matmul is measured alone."""


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
        for name in ("torch tinygemm", "torchao int4", "gemlite int4", "Marlin int4 (vLLM)"):
            contestants[name] = build(name, dense[:small_copies], x.view(m, k), group)
    moved = n * k * bits / 8 + 2 * n * k / group + 2 * m * (n + k)
    name = f"int{bits} g{'K' if group == k else group} {n}x{k}"
    return Case("w4a16", name, m, present(contestants), moved, 2 * m * n * k)


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
        "torchao W8A8 eager": build("torchao W8A8 eager", dense, x.view(m, k), k),
    }
    # int8 tensor cores do twice the operations of bf16
    return Case("w8a8", f"{n}x{k}", m, present(contestants), n * k + 2 * m * (n + k), m * n * k)


def codes_matmul(device: torch.device, small: bool) -> Iterator[Factory]:
    """The matmul of W8A8 and FP8 layers alone, against bf16 and torch's own."""
    for n, k in matrices(device, small):
        for to in FORMATS:
            # on the CPU the reference runs, and layers take another path
            if device.type == "cuda" or small:
                for m in rows(device, small):
                    yield partial(_codes_matmul, device, m, n, k, to)


def _codes_matmul(device: torch.device, m: int, n: int, k: int, to: Format) -> Case:
    dense = weights(n, k, copies(2 * n * k, device), device)
    x = torch.randn(m, k, device=device).to(torch.bfloat16)
    # codes over the whole range: a GPU multiplies small integers with less power, and so faster
    x_codes, x_scale = activation_quant.reference(x, to=to)
    made = [activation_quant.reference(w, to=to) for w in dense]
    codes, w_scale = [w for w, _ in made], made[0][1]
    contestants: dict[str, list[Call]] = {
        "bf16": [partial(functional.linear, x, w) for w in dense],
        "ours": [partial(scaled_matmul.scaled_matmul, x_codes, x_scale, w, w_scale) for w in codes],
    }
    if to == "e4m3":
        contestants["torch._scaled_mm"] = build("torch._scaled_mm", dense, x, k)
    elif m > 16:
        # cuBLAS takes int8 from 17 rows on; it leaves int32 sums, without scales
        calls: list[Call] = [partial(torch._int_mm, x_codes, w.t()) for w in codes]
        contestants["torch._int_mm, unscaled"] = calls
    moved = n * k + m * k + 2 * m * n
    return Case("scaled_matmul", f"{to} {n}x{k}", m, present(contestants), moved, m * n * k)


def float8(device: torch.device, small: bool) -> Iterator[Factory]:
    """FP8 linear layers with a scale per token, against bf16."""
    for n, k in matrices(device, small):
        # elsewhere the reference runs: there is no FP8 on CPUs
        if device.type == "cuda" or small:
            for m in rows(device, small):
                yield partial(_float8, device, m, n, k)


def _float8(device: torch.device, m: int, n: int, k: int) -> Case:
    x = torch.randn(m, 1, k, device=device).to(torch.bfloat16)
    dense = weights(n, k, copies(2 * n * k, device), device)
    packed = [fp8.prepare(w) for w in dense]
    contestants: dict[str, list[Call]] = {
        "bf16": [partial(functional.linear, x, w) for w in dense],
        "ours": [partial(fp8.linear, x, w) for w in packed],
    }
    return Case("fp8", f"{n}x{k}", m, contestants, n * k + 2 * m * (n + k), m * n * k)


def normal_float(device: torch.device, small: bool) -> Iterator[Factory]:
    """NF4 with double quantization: dequantizing alone, and the linear layer."""
    for n, k in matrices(device, small):
        yield partial(_dequantize_nf4, device, n, k)
        for m in rows(device, small):
            yield partial(_linear_nf4, device, m, n, k)


def _dequantize_nf4(device: torch.device, n: int, k: int) -> Case:
    spec = nf4.Spec4bit("nf4", 64, True)
    dense = weights(n, k, copies(n * k // 2, device), device)
    packed = [nf4.quantize_4bit(w, spec) for w in dense]
    out = torch.empty(n, k, dtype=torch.bfloat16, device=device)
    contestants: dict[str, list[Call]] = {
        # what copying as many bf16 weights costs
        "copy of bf16": [partial(out.copy_, w) for w in dense],
        "ours": [partial(nf4.dequantize_4bit, p, spec, (n, k), torch.bfloat16) for p in packed],
        "bitsandbytes dequantize": build("bitsandbytes dequantize", dense, out, 64),
    }
    # codes, a byte for each block of 64 with its share of the nested scales, and 2 bytes written
    moved = n * k * (0.5 + (1 + 4 / 256) / 64 + 2)
    return Case("nf4", f"dequantize {n}x{k}", 1, present(contestants), moved, 0)


def _linear_nf4(device: torch.device, m: int, n: int, k: int) -> Case:
    spec = nf4.Spec4bit("nf4", 64, True)
    x = torch.randn((1, m, k) if m > 64 else (m, 1, k), device=device).to(torch.bfloat16)
    dense = weights(n, k, copies(2 * n * k, device), device)
    packed = [nf4.quantize_4bit(w, spec) for w in dense]
    contestants: dict[str, list[Call]] = {
        "bf16": [partial(functional.linear, x, w) for w in dense],
        "ours": [partial(nf4.linear_4bit, x, p, spec, (n, k), torch.bfloat16) for p in packed],
        "bitsandbytes NF4": build("bitsandbytes NF4", dense, x.view(m, k), 64),
    }
    moved = n * k * (0.5 + (1 + 4 / 256) / 64) + 2 * m * (n + k)
    return Case("nf4", f"linear {n}x{k}", m, present(contestants), moved, 2 * m * n * k)
