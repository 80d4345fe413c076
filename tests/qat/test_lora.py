"""The two forms of an adapter layer: plain against PEFT's own, merged against its definition."""

import copy

import pytest
import torch
from peft import LoraConfig
from peft.tuners.lora.layer import Linear as PeftLinear
from torch import nn
from torch.nn import functional

from qat.errors import UserError
from qat.fake_quant import FakeQuantLinear, set_enabled
from qat.linear_4bit import Linear4bit
from qat.lora import FrozenLinear, LoraLinear
from qat.scheme import InputSpec, ObserverConfig
from qat_kernels import QuantSpec, fake_quantize
from qat_kernels.fake_quant import fake_quantize_ste
from qat_kernels.nf4 import Spec4bit

N, K, R = 48, 64, 4
SPEC = QuantSpec(bits=4, group_size=32)
OBSERVER = ObserverConfig()
DYNAMIC = InputSpec()
STATIC = InputSpec(granularity="tensor", dynamic=False, scale_dtype="bfloat16")
KINDS = {"lora": {}, "rslora": {"use_rslora": True}, "dora": {"use_dora": True}}
kinds = pytest.mark.parametrize("kind", KINDS)


def layer_of(kind="lora", dropout=0.0, bias=True, dtype=torch.float32, weight=SPEC, inputs=None):
    """An adapter with random parameters on an NF4 base, and the 16-bit weight that it is for."""
    torch.manual_seed(0)
    w = torch.randn(N, K) * 0.05
    dense = nn.Linear(K, N, bias=False)
    dense.weight = nn.Parameter(w.clone(), requires_grad=False)
    config = LoraConfig(r=R, lora_alpha=6, lora_dropout=dropout, **KINDS[kind])
    layer = LoraLinear(dense, config)
    layer.base_layer = Linear4bit.from_weight(
        w, Spec4bit(block_size=32), torch.float32, torch.randn(N) if bias else None
    )
    with torch.no_grad():
        for factor in layer.factors:
            factor.normal_(std=0.1)
        if layer.magnitude is not None:
            layer.magnitude.mul_(1 + 0.2 * torch.rand(N))
    for parameter in layer.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(dtype)
    layer.merge_with(lambda: w, weight, inputs, OBSERVER, torch.bfloat16)
    return layer, w


def trained(layer):
    return {n: p for n, p in layer.named_parameters() if p.requires_grad}


def independent(kind, w, a, b, m, alpha=6.0):
    """W' by the papers' formulas, with autograd."""
    scale = alpha / R**0.5 if kind == "rslora" else alpha / R
    value = w + (b @ a) * scale
    if kind == "dora":
        norm = torch.linalg.vector_norm(value.detach(), dim=1, keepdim=True)
        value = (m.unsqueeze(1) / norm) * value
    return value


def leaves(layer):
    """Copies of A, B and m in fp32 that ask for a gradient."""
    a, b = layer.factors
    values = [a, b] if layer.magnitude is None else [a, b, layer.magnitude]
    copies = [v.detach().float().requires_grad_() for v in values]
    return copies if len(copies) == 3 else [*copies, None]


# --- plain ----------------------------------------------------------------------------------------


@kinds
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_plain_form_is_pefts_own(kind, autocast, dropout):
    layer, _ = layer_of(kind, dropout)
    dense = nn.Linear(K, N)
    dense.weight = nn.Parameter(layer.base_layer.weight, requires_grad=False)
    dense.bias = nn.Parameter(layer.base_layer.bias.detach().clone(), requires_grad=False)
    config = LoraConfig(r=R, lora_alpha=6, lora_dropout=dropout, **KINDS[kind])
    peft = PeftLinear(dense, "default", config=config, r=R, lora_alpha=6)
    state = layer.state_dict()
    peft.load_state_dict({n: v for n, v in state.items() if "lora_" in n}, strict=False)
    assert trained(layer).keys() == trained(peft).keys()
    x = torch.randn(2, 5, K)
    for training in (True, False):
        results = []
        for module in (layer.train(training), peft.train(training)):
            x_leaf = x.clone().requires_grad_()
            module.zero_grad()
            torch.manual_seed(1)
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                # no leaf, as in a model: autocast shares its copy of a leaf between the branches
                y = module(x_leaf * 1)
            y.float().square().sum().backward()
            results.append([y.detach(), x_leaf.grad, *(p.grad for p in trained(module).values())])
        for ours, theirs in zip(*results, strict=True):
            assert torch.equal(ours, theirs)
            assert ours.abs().max() > 0


def test_the_base_answers_alone_while_b_is_zero():
    layer, _ = layer_of()
    nn.init.zeros_(layer.factors[1])
    x = torch.randn(3, K)
    assert torch.equal(layer(x), layer.base_layer(x))


# --- merged ---------------------------------------------------------------------------------------


@kinds
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("inputs", [None, DYNAMIC, STATIC], ids=["16-bit x", "dynamic", "static"])
def test_merged_form_is_a_fake_quantized_layer_on_the_merged_weight(kind, bias, inputs):
    layer, w = layer_of(kind, bias=bias, inputs=inputs)
    a, b, m = leaves(layer)
    with torch.no_grad():
        plain = nn.Linear(K, N, bias=bias)
        plain.weight.copy_(independent(kind, w, a, b, m))
        if bias:
            plain.bias.copy_(layer.base_layer.bias)
    expected = FakeQuantLinear(plain, SPEC, inputs, OBSERVER)
    x = torch.randn(2, 5, K)
    for module in (layer, expected):
        set_enabled(module, True)
        module.train()
        module(x)  # static ranges see it
        for observer in (s for s in module.modules() if hasattr(s, "commit")):
            observer.commit()
        module.eval()
    assert layer.computes_merged
    assert torch.equal(layer(x), expected(x))
    assert not torch.equal(layer(x), functional.linear(x, plain.weight, plain.bias))
    with torch.no_grad():
        assert torch.equal(layer(x), expected(x))
    for dtype in (torch.bfloat16, torch.float16):
        with torch.autocast("cpu", dtype):
            assert layer(x).dtype == dtype
            assert torch.equal(layer(x), expected(x))


@kinds
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("inputs", [None, DYNAMIC], ids=["16-bit x", "dynamic"])
def test_gradients_of_the_merged_form(kind, autocast, dtype, inputs):
    layer, w = layer_of(kind, dtype=dtype, inputs=inputs)
    set_enabled(layer, True)
    values = leaves(layer)
    x = torch.randn(2, 5, K)
    ours, theirs = (x.clone().requires_grad_() for _ in range(2))
    target = torch.randn(2, 5, N)

    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y = layer(ours)
    (y.float() * target).sum().backward()

    seen = theirs if layer.input_fake_quant is None else layer.input_fake_quant(theirs)
    merged = independent(kind, w, *values)
    if autocast:
        # the quantizer's fp32 values are rounded once, for the matmul
        weight = fake_quantize_ste(merged, SPEC, torch.bfloat16)
        expected = functional.linear(seen.bfloat16(), weight, layer.bias.bfloat16())
    else:
        expected = functional.linear(seen, fake_quantize_ste(merged, SPEC), layer.bias)
    (expected.float() * target).sum().backward()

    assert torch.equal(y, expected)
    assert torch.equal(ours.grad, theirs.grad)
    a, b = layer.factors
    held = [a, b] if layer.magnitude is None else [a, b, layer.magnitude]
    for parameter, value in zip(held, values):
        assert parameter.dtype == parameter.grad.dtype == dtype
        # the arithmetic is fp32; a bf16 parameter gets its result, rounded once
        assert torch.equal(parameter.grad, value.grad.to(dtype))
        assert parameter.grad.abs().max() > 0


def test_merged_form_keeps_no_weight_for_the_backward_pass():
    layer, _ = layer_of()
    set_enabled(layer, True)
    kept = []
    x = torch.randn(2, 5, K, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: (kept.append(t.shape), t)[1], lambda t: t
    ):
        y = layer(x)
    assert all(shape.numel() < N * K for shape in kept)
    y.sum().backward()
    assert layer.factors[0].grad.abs().max() > 0


def test_what_the_initialisation_took_from_the_base_is_not_added_twice():
    layer, w = layer_of()
    layer.remember_initial()
    set_enabled(layer, True)
    x = torch.randn(3, K)
    # B A - B0 A0 is zero to the last bit while nothing has changed
    assert torch.equal(layer.merged_weight(), w)
    assert torch.equal(layer(x), functional.linear(x, fake_quantize(w, SPEC), layer.bias))
    a0, b0 = (f.detach().clone() for f in layer.factors)
    with torch.no_grad():
        layer.factors[1].mul_(1.5)
    a, b, _ = leaves(layer)
    assert torch.equal(layer.merged_weight(), w + ((b @ a) - (b0 @ a0)) * 1.5)
    assert not any("initial" in name for name in layer.state_dict())


def test_a_weight_that_is_kept_is_rounded_when_merged():
    layer, w = layer_of(weight=None)
    set_enabled(layer, True)
    a, b, m = leaves(layer)
    merged = independent("lora", w, a, b, m)
    x = torch.randn(3, K)
    rounded = merged.detach().bfloat16().float()
    assert torch.equal(layer(x), functional.linear(x, rounded, layer.bias))
    layer(x).sum().backward()
    functional.linear(x, merged).sum().backward()
    # straight through the rounding: dL/dW' does not depend on the weight's value
    assert torch.equal(layer.factors[0].grad, a.grad)
    assert torch.equal(layer.factors[1].grad, b.grad)


def test_switch_follows_the_state_dict():
    layer, _ = layer_of(inputs=DYNAMIC)
    other = copy.deepcopy(layer)
    set_enabled(layer, True)
    assert not other.computes_merged
    other.load_state_dict(layer.state_dict())
    assert other.computes_merged
    assert other.input_fake_quant.active


# --- dropout --------------------------------------------------------------------------------------


@kinds
def test_dropout_is_off_in_eval_mode(kind):
    layer, _ = layer_of(kind, dropout=0.5)
    without, _ = layer_of(kind)
    x = torch.randn(2, 5, K)
    for merged in (False, True):
        for module in (layer, without):
            set_enabled(module, merged)
            module.eval()
        assert torch.equal(layer(x), without(x))
        assert not torch.equal(layer.train()(x), without(x))


def test_dropout_perturbs_the_adapter_alone_and_without_bias():
    layer, _ = layer_of(dropout=0.3)
    set_enabled(layer, True)
    x = torch.randn(1, 1, K)
    merged = layer.eval()(x)
    layer.train()
    a, b = layer.factors
    torch.manual_seed(5)
    once = layer(x)
    torch.manual_seed(5)
    difference = functional.dropout(x, 0.3) - x
    assert torch.equal(once, merged + functional.linear(functional.linear(difference, a), b) * 1.5)
    # one token many times: each row has a mask of its own
    count = 4000
    with torch.no_grad():
        noise = layer(x.expand(1, count, K)) - merged
    standard = noise.std(1) / count**0.5
    assert torch.all(standard > 0)
    # the mean of 48 values, each within 5 standard errors (chance of a miss: 3e-5; the seed is set)
    assert torch.all(noise.mean(1).abs() < 5 * standard)


# --- layers without an adapter --------------------------------------------------------------------


def test_frozen_layer_has_both_forms_too():
    torch.manual_seed(0)
    w = torch.randn(N, K)
    base = Linear4bit.from_weight(w, Spec4bit(block_size=32), torch.float32, torch.randn(N))
    layer = FrozenLinear(base)
    layer.merge_with(lambda: w.bfloat16(), SPEC, None, OBSERVER, torch.bfloat16)
    x = torch.randn(3, K, requires_grad=True)
    assert torch.equal(layer(x), base(x))
    assert torch.equal(layer.weight, base.weight)
    set_enabled(layer, True)
    hat = fake_quantize(w.bfloat16().float(), SPEC)
    y = layer(x)
    assert torch.equal(y, functional.linear(x, hat, base.bias))
    (grad,) = torch.autograd.grad(y.sum(), x)
    assert torch.equal(grad, torch.ones(3, N) @ hat)
    assert not trained(layer)


def test_merging_in_place_is_for_16_bit_bases():
    layer, w = layer_of()
    before = layer.base_layer.weight
    for safe in (False, True):
        with pytest.raises(UserError, match="not merged into a 4-bit base"):
            layer.merge(safe_merge=safe)
    assert torch.equal(layer.base_layer.weight, before)
    dense = nn.Linear(K, N, bias=False)
    dense.weight = nn.Parameter(w.clone(), requires_grad=False)
    layer.base_layer = dense
    layer.merge()
    a, b, _ = leaves(layer)
    assert torch.equal(dense.weight, w + (b @ a) * 1.5)
