import copy
import pickle
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig
from peft.tuners.lora.layer import Linear as PeftLinear
from torch import nn
from torch.nn import functional

from qat.linear_4bit import BUFFERS, Linear4bit
from qat.lora import LoraLinear
from qat.scheme import ObserverConfig
from qat_kernels.nf4 import Spec4bit, dequantize_4bit, quantize_4bit

SPECS = [Spec4bit(), Spec4bit("fp4", 32, False), Spec4bit("nf4", 4096)]
N, K = 48, 96


def layer_of(spec=SPECS[0], dtype=torch.bfloat16, bias=True, seed=0):
    torch.manual_seed(seed)
    w = torch.randn(N, K)
    return Linear4bit.from_weight(w, spec, dtype, torch.randn(N) if bias else None)


def bits(layer):
    return {name: None if b is None else b.clone() for name, b in layer._buffers.items()}


def assert_same_bits(layer, before):
    assert layer._buffers.keys() == before.keys()
    for name, old in before.items():
        new = layer._buffers[name]
        if old is None:
            assert new is None
        else:
            assert new.dtype == old.dtype
            assert torch.equal(new, old)


@pytest.mark.parametrize("spec", SPECS, ids=str)
@pytest.mark.parametrize("bias", [True, False])
def test_forward_is_a_linear_on_the_dequantized_weight(spec, bias):
    layer = layer_of(spec, bias=bias)
    x = torch.randn(2, 5, K)
    expected = functional.linear(x, layer.weight.float(), layer.bias)
    assert torch.equal(layer(x), expected)
    assert layer.weight.dtype == torch.bfloat16
    torch.manual_seed(0)
    packed = quantize_4bit(torch.randn(N, K), spec)
    assert torch.equal(layer.weight, dequantize_4bit(packed, spec, (N, K), torch.bfloat16))
    again = Linear4bit(packed, spec, (N, K), torch.bfloat16, layer.bias)
    assert torch.equal(again(x), expected)


def test_the_weight_is_no_parameter_and_cannot_be_replaced():
    layer = layer_of()
    assert [name for name, _ in layer.named_parameters()] == ["bias"]
    assert not layer.bias.requires_grad
    assert [name for name, _ in layer.named_buffers()] == list(BUFFERS)
    weight = layer.weight
    assert type(weight) is torch.Tensor
    assert weight.shape == (N, K)
    assert (layer.in_features, layer.out_features) == (K, N)
    before = bits(layer)
    weight.zero_()
    assert_same_bits(layer, before)
    with pytest.raises(KeyError):
        layer.weight = nn.Parameter(weight)
    with pytest.raises(AttributeError):
        layer.weight = weight
    layer.reset_parameters()
    assert_same_bits(layer, before)


CASTS = {
    "float": lambda m: m.float(),
    "half": lambda m: m.half(),
    "double": lambda m: m.double(),
    "bfloat16": lambda m: m.to(torch.bfloat16),
    "type": lambda m: m.type(torch.float16),
    "device and dtype": lambda m: m.to("cpu", torch.float16),
    "twice": lambda m: m.half().float(),
}


@pytest.mark.parametrize("cast", CASTS.values(), ids=CASTS)
@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_casting_the_model_changes_no_buffer(cast, spec):
    layer = layer_of(spec)
    before, weight = bits(layer), layer.weight
    model = cast(nn.Sequential(layer, nn.Linear(N, 3)))
    assert_same_bits(layer, before)
    assert torch.equal(layer.weight, weight)
    dtype = model[1].weight.dtype
    assert layer.bias.dtype == dtype
    x = torch.randn(4, K, dtype=dtype)
    assert torch.equal(layer(x), functional.linear(x, weight.to(dtype), layer.bias))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_casts_the_input(dtype):
    layer = layer_of(dtype=torch.float32)
    x = torch.randn(4, K, dtype=dtype)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
        expected = functional.linear(x, layer.weight, layer.bias)
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, expected)


@pytest.mark.parametrize("autocast", [False, True])
def test_compiled_equals_eager(autocast):
    layer = layer_of()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    results = []
    for one in (layer, compiled):
        x = torch.ones(4, K, requires_grad=True)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            y = one(x)
        y.float().square().sum().backward()
        results.append((y, x.grad))
    for a, b in zip(*results):
        assert torch.equal(a, b)


def gradient(layer, x):
    x = x.clone().requires_grad_()
    layer.train()(x).square().sum().backward()
    return x.grad


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_gradients_after_an_eval_forward_equal_those_without_one(context):
    # bitsandbytes' layer repacks its weight in such a forward, and loses its gradients
    spec, (n, k) = Spec4bit(), (64, 128)  # sizes that its repacking accepts
    torch.manual_seed(1)
    w, x = torch.randn(n, k), torch.randn(5, k)
    layers = [Linear4bit.from_weight(w, spec, torch.float32) for _ in range(2)]
    before = bits(layers[0])
    with context():
        first = layers[0].eval()(x)
        assert torch.equal(layers[0](x), first)
    assert_same_bits(layers[0], before)
    grads = [gradient(layer, x) for layer in layers]
    assert torch.equal(*grads)
    assert bool(grads[0].abs().min() > 0)
    assert torch.equal(layers[0](x), first)


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_state_dict_round_trip(spec):
    source, target = layer_of(spec), layer_of(spec, seed=1)
    assert not torch.equal(source.weight, target.weight)
    state = source.state_dict()
    assert set(state) == {name for name, b in bits(source).items() if b is not None} | {"bias"}
    target.load_state_dict(state)
    assert_same_bits(target, bits(source))
    empty = Linear4bit.meta(K, N, spec, torch.bfloat16, bias=True)
    empty.load_state_dict(state, assign=True)
    assert torch.equal(empty.weight, source.weight)
    other = Linear4bit.meta(K, 2 * N, spec, torch.bfloat16, bias=True)
    with pytest.raises(RuntimeError, match="size mismatch"):
        other.load_state_dict(state)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_copies_are_equal_and_apart(copied, spec):
    layer = layer_of(spec)
    other = copied(layer)
    assert (other.spec, other.weight_dtype, other.shape) == (spec, torch.bfloat16, (N, K))
    assert_same_bits(other, bits(layer))
    assert other.codes.data_ptr() != layer.codes.data_ptr()
    x = torch.randn(3, K)
    assert torch.equal(other(x), layer(x))


def test_meta_has_the_shapes_of_the_real_layer():
    for spec in SPECS:
        real = layer_of(spec)
        meta = Linear4bit.meta(K, N, spec, torch.bfloat16, bias=True)
        for name, buffer in real._buffers.items():
            twin = meta._buffers[name]
            if buffer is None:
                assert twin is None
            else:
                assert (twin.shape, twin.dtype, twin.device.type) == (
                    buffer.shape,
                    buffer.dtype,
                    "meta",
                )
        assert meta.weight.shape == (N, K)
        assert meta(torch.empty(2, K, device="meta")).shape == (2, N)
        # an 8 B-shape layer, in no memory
        large = Linear4bit.meta(4096, 14336, spec, torch.bfloat16)
        numel = 4096 * 14336
        size = sum(b.numel() * b.element_size() for b in large.buffers())
        extra = numel // spec.block_size * (1 if spec.double_quant else 4)
        nested = -(-numel // spec.block_size // 256) * 4 + 4 if spec.double_quant else 0
        assert size == numel // 2 + extra + nested
        assert large.bias is None
        moved = large.to_empty(device="meta").half()
        assert moved.codes.dtype == torch.uint8
        assert moved.weight_dtype == torch.bfloat16


def test_bad_weights_are_refused():
    with pytest.raises(ValueError, match="two dimensions"):
        Linear4bit.from_weight(torch.ones(4), Spec4bit(), torch.float32)
    with pytest.raises(ValueError, match="weight dtype torch"):
        Linear4bit.from_weight(torch.ones(2, 2), Spec4bit(), torch.float64)
    layer = layer_of(Spec4bit(block_size=4096), bias=False)
    with pytest.raises(ValueError, match=r"a weight \(96, 48\)"):
        Linear4bit(layer.packed, Spec4bit(), (K, N), torch.float32)
    with pytest.raises(ValueError, match="NaN"):
        Linear4bit.from_weight(torch.full((2, 2), float("nan")), Spec4bit(), torch.float32)


def test_printing_says_how_it_is_stored():
    text = "in_features=96, out_features=48, bias=True, nf4, block_size=64, double_quant"
    assert text in repr(layer_of())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_moving_to_cuda_and_back():
    layer = layer_of()
    before, weight = bits(layer), layer.weight
    layer.to("cuda", torch.float16)
    assert layer.codes.is_cuda
    assert torch.equal(layer.weight.cpu(), weight)
    layer.cpu()
    assert_same_bits(layer, before)


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_adapted_is_the_layer_plus_the_adapter(spec):
    layer = layer_of(spec, torch.float32)
    x, a, b = torch.randn(2, 5, K), torch.randn(4, K), torch.randn(N, 4)
    y = layer.adapted(x, a, b, 0.5)
    expected = layer(x) + functional.linear(functional.linear(x, a), b) * 0.5
    size = functional.linear(x.abs(), layer.weight.abs(), layer.bias.abs())
    size += functional.linear(functional.linear(x.abs(), a.abs()), b.abs()) * 0.5
    # two results, each of fp32 sums of at most K + 4 + 3 terms
    assert bool(((y - expected).abs() <= 2.01 * (K + 7) * 2.0**-24 * size).all())
    with torch.autocast("cpu", torch.bfloat16):
        assert layer.adapted(x, a, b, 0.5).dtype == torch.bfloat16
    with pytest.raises(ValueError, match="do not fit"):
        layer.adapted(x, a[:, 1:], b, 0.5)


def lora_on(base, dtype=torch.float32, **options):
    """A LoRA layer on a 4-bit base, with factors that are not zero."""
    layer = LoraLinear(nn.Linear(K, N, dtype=dtype), LoraConfig(r=4, lora_alpha=6, **options))
    layer.merge_with(lambda: base.weight, None, None, ObserverConfig(), torch.bfloat16)
    nn.init.normal_(layer.lora_B["default"].weight)
    layer.base_layer = base
    return layer.to(dtype)


def test_when_base_and_adapter_are_one_operator():
    on_gpu = SimpleNamespace(is_cuda=True, dtype=torch.float32)
    base = layer_of(dtype=torch.float32)
    layer = lora_on(base)
    assert layer._fuses(on_gpu)
    assert not layer._fuses(torch.randn(1, K))
    assert not layer._fuses(SimpleNamespace(is_cuda=True, dtype=torch.bfloat16))
    for options in ({"use_dora": True}, {"lora_bias": True}):
        assert not lora_on(base, **options)._fuses(on_gpu)
    dropping = lora_on(base, lora_dropout=0.5)
    assert not dropping.train()._fuses(on_gpu)
    assert dropping.eval()._fuses(on_gpu)
    layer.enable_adapters(False)
    assert not layer._fuses(on_gpu)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("tokens", [1, 5])
def test_one_operator_on_the_gpu_is_the_adapter_of_peft(tokens):
    layer = lora_on(layer_of(dtype=torch.float32)).to(torch.bfloat16).cuda()
    x = torch.randn(2, tokens, K, device="cuda", dtype=torch.bfloat16)
    assert layer._fuses(x)
    y, expected = layer(x), PeftLinear.forward(layer, x)
    a, b = (factor.abs() for factor in layer.factors)
    base = functional.linear(
        x.abs().float(), layer.base_layer.weight.abs(), layer.bias.abs().float()
    )
    size = base + 1.5 * functional.linear(functional.linear(x.abs(), a), b).float()
    # each is rounded to bf16 at most five times, W included, and summed in fp32; size is rounded
    assert bool(((y - expected).abs() <= 2.1 * (5 * 2.0**-8 + 2 * K * 2.0**-24) * size).all())
