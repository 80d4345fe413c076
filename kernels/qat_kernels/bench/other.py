"""Cases of what is no linear layer: fake-quant, activation quantization, KV caches."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional

from qat_kernels import activation_quant, kv_cache
from qat_kernels.activation_quant import Format
from qat_kernels.bench.case import Case, Factory, present, rows
from qat_kernels.bench.peers import build
from qat_kernels.bench.timing import Call, copies
from qat_kernels.fake_quant import fake_quantize_ste
from qat_kernels.numerics import QuantSpec, round_scale


def training(device: torch.device, small: bool) -> Iterator[Factory]:
    """Fake-quant of fp32 weights to bf16, forward and backward."""
    for group in (32, 128):
        size = 128 if small else 4096
        yield partial(_training, device, size, size, group)


def _training(device: torch.device, n: int, k: int, group: int) -> Case:
    spec = QuantSpec(group_size=group)
    masters = [torch.randn(n, k, device=device) for _ in range(copies(4 * n * k, device))]
    grad = torch.randn(n, k, device=device).to(torch.bfloat16)
    contestants: dict[str, list[Call]] = {
        "chain of operators": [partial(_step_by_chain, w, grad, spec) for w in masters],
        "ours": [partial(_step, w, grad, spec) for w in masters],
        "torchao fake-quant": build("torchao fake-quant", masters, grad, group),
    }
    # 4 bytes in and 2 out, then 4 + 2 in and 4 out
    return Case("fake_quant", f"int4 g{group} {n}x{k}", n, present(contestants), 16 * n * k, 0)


def _step(w: Tensor, grad: Tensor, spec: QuantSpec) -> Tensor:
    with torch.enable_grad():
        leaf = w.detach().requires_grad_()
        fake_quantize_ste(leaf, spec, torch.bfloat16).backward(grad)
    assert leaf.grad is not None
    return leaf.grad


def _step_by_chain(w: Tensor, grad: Tensor, spec: QuantSpec) -> Tensor:
    """The same values by the operators that one would write down first."""
    with torch.enable_grad():
        leaf = w.detach().requires_grad_()
        w_g = leaf.unflatten(-1, (-1, spec.group_size))
        with torch.no_grad():
            low, high = torch.aminmax(w_g, dim=-1, keepdim=True)
            scale = round_scale(torch.where(high >= -low, high, low) / spec.q_min, spec)
        t = w_g / scale
        inside = (t >= spec.q_min - 0.5) & (t <= spec.q_max + 0.5)
        q = t.round().clamp(spec.q_min, spec.q_max) * scale
        kept = torch.where(inside, w_g, w_g.detach())
        y = (kept + (q - kept).detach()).flatten(-2).to(torch.bfloat16)
        y.backward(grad)
    assert leaf.grad is not None
    return leaf.grad


def activations(device: torch.device, small: bool) -> Iterator[Factory]:
    """Quantizing activations, alone and with the RMSNorm before it."""
    formats: tuple[Format, ...] = ("int8", "e4m3")
    for to in formats:
        for norm in (False, True):
            for m in rows(device, small):
                yield partial(_activations, device, m, 128 if small else 4096, to, norm)


def _activations(device: torch.device, m: int, k: int, to: Format, norm: bool) -> Case:
    inputs = [
        torch.randn(m, k, device=device).to(torch.bfloat16)
        for _ in range(copies(2 * m * k, device))
    ]
    weight = torch.ones(k, device=device, dtype=torch.bfloat16) if norm else None
    calls = {
        "chain of operators": [
            partial(activation_quant.reference, x, None, weight, to=to) for x in inputs
        ],
        "ours": [
            partial(activation_quant.quantize_activation, x, None, weight, to=to) for x in inputs
        ],
    }
    name = f"{to}{' after RMSNorm' if norm else ''} K={k}"
    return Case("activation_quant", name, m, calls, 3 * m * k, 0)


def caches(device: torch.device, small: bool) -> Iterator[Factory]:
    """Decode attention over a long cache of int8 or int4 codes, 32 query and 8 kv heads of 128."""
    lengths = (64,) if small else (1024, 4096) if device.type == "cpu" else (4096, 32768, 131072)
    for bits in (8, 4):
        for length in lengths:
            yield partial(_caches, device, length, bits)


def _caches(device: torch.device, length: int, bits: int) -> Case:
    heads, kv_heads, size = 32, 8, 128
    q = torch.randn(1, heads, size, device=device).to(torch.bfloat16)
    pairs, buffers = [], []
    for _ in range(copies(4 * kv_heads * length * size, device)):
        k, v = (torch.randn(1, kv_heads, length, size, device=device).bfloat16() for _ in "kv")
        pairs.append((k, v))
        buffers.append(kv_cache.allocate(1, kv_heads, length, size, bits, device))
        kv_cache.write(buffers[-1], k, v, 0)
    span = torch.tensor([[0], [length]], dtype=torch.int32, device=device)
    query = q.view(1, heads, 1, size)
    attend = partial(functional.scaled_dot_product_attention, enable_gqa=True)
    contestants: dict[str, list[Call]] = {
        "bf16 sdpa": [partial(attend, query, k, v) for k, v in pairs],
        "ours": [partial(kv_cache.attention, q, buffer, span) for buffer in buffers],
    }
    moved = length * kv_cache.bytes_per_token(kv_heads, size, bits)
    operations = 4 * length * heads * size
    name = f"int{bits} {heads}/{kv_heads} heads of {size}"
    return Case("kv_cache", name, length, contestants, moved, operations)
