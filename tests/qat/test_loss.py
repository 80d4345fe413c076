"""The loss in chunks: its values, its gradients, its memory, and when it is not used."""

import copy
import logging
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import peft
import pytest
import torch
from peft.utils.other import ModulesToSaveWrapper
from torch import nn
from transformers import CohereConfig, GraniteConfig, LlamaForCausalLM

from qat.fake_quant import FakeQuantLinear
from qat.loss import (
    MAX_LOGITS,
    Head,
    TokenLoss,
    chunk_rows,
    chunked_loss,
    forward_logits,
    head_of,
    loss_sum,
    supports_chunked,
    supports_liger,
)
from qat.prepare import prepare
from qat.scheme import InputSpec, Rule, Scheme
from qat.training import TrainerConfig
from qat_kernels import QuantSpec
from tests.qat.test_module import SUM_BOUND, module_of, train
from tests.tiny import BASE, CONFIGS, VOCAB, random_batch, tiny

SCALED = {
    "cohere": CohereConfig(**BASE, logit_scale=0.25),
    "granite": GraniteConfig(**BASE, logits_scaling=3.0),
}
"""Architectures that scale their logits; gemma2 caps them."""
BF16_BOUND = 4 * 2**-9
"""Relative bound for gradients under bf16 autocast: both round W x, its gradient and the gradient's
product with W or x once each (2^-9), and the chunks add up in fp32."""
GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.fixture(params=[*CONFIGS, *SCALED])
def model(request, monkeypatch):
    for name, config in SCALED.items():
        monkeypatch.setitem(CONFIGS, name, config)
    return tiny(request.param)


def batch_with_gaps():
    """Two blocks of 24; 41 positions have a target."""
    batch = random_batch()
    batch["labels"][0, 3:9] = -100
    batch["labels"][1, -1] = -100
    return batch


def plain(model, batch):
    return loss_sum(forward_logits(model, batch), batch["labels"])


def in_chunks(rows):
    """The loss in chunks, which fails where it would quietly be the plain one."""
    token_loss = TokenLoss(rows)

    def loss(model, batch):
        value = token_loss(model, batch)
        assert token_loss._function is chunked_loss
        return value

    return loss


def loss_and_gradients(function, model, batch, scale=1.0):
    model.zero_grad()
    loss = function(model, batch)
    (loss * scale).backward()
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return loss.detach(), found


def assert_agree(model, batch, rows, bound=SUM_BOUND, loss_bound=SUM_BOUND):
    """Both are sums of the same terms in another order."""
    expected, gradients = loss_and_gradients(plain, model, batch, scale=0.125)
    loss, ours = loss_and_gradients(in_chunks(rows), model, batch, scale=0.125)
    assert loss.dtype == torch.float32
    assert float((loss - expected).abs()) <= loss_bound * float(expected)
    assert ours.keys() == gradients.keys()
    whole = torch.stack([g.norm() for g in gradients.values()]).norm()
    for name, gradient in gradients.items():
        assert ours[name].dtype == gradient.dtype
        # of the whole gradient: some biases have none but for rounding (softmax does not see them)
        assert float((ours[name] - gradient).norm()) <= bound * float(whole), name


@pytest.mark.parametrize("rows", [1, 8, 41, 47])
def test_loss_and_gradients_are_the_plain_ones(model, rows):
    assert_agree(model, batch_with_gaps(), rows)


def test_one_chunk_over_all_targets_has_the_plain_losses_exactly():
    """The same product of the same shape, and one sum: where every position has a target."""
    model, batch = tiny("gemma2"), random_batch()
    states = model.get_decoder()(input_ids=batch["input_ids"]).last_hidden_state.flatten(0, 1)
    ours = chunked_loss(head_of(model), states, batch["labels"].flatten(), 1000)
    logits = model(input_ids=batch["input_ids"]).logits
    assert torch.equal(ours, loss_sum(logits, batch["labels"]))


def test_no_target_at_all():
    model, batch = tiny("llama"), random_batch()
    batch["labels"].fill_(-100)
    expected, gradients = loss_and_gradients(plain, model, batch)
    loss, ours = loss_and_gradients(in_chunks(8), model, batch)
    assert loss == expected == 0
    assert ours.keys() == gradients.keys()
    assert not any(bool(gradient.any()) for gradient in ours.values())


@pytest.mark.parametrize("count", [0, 1, 7, 8, 9, 20, 24])
def test_chunks_are_few_and_no_longer_than_asked(count):
    lengths = []

    def logits(x, tensors):
        lengths.append(x.shape[1])
        return nn.functional.linear(x, *tensors)

    x, weight = torch.randn(count, 4), torch.randn(11, 4)
    chunked_loss(Head((weight,), logits), x, torch.zeros(count, dtype=torch.int64), 8)
    assert sum(lengths) == count
    assert len(lengths) == -(-count // 8)
    assert max(lengths, default=0) <= 8
    # no shorter last one than the division leaves
    assert max(lengths, default=0) - min(lengths, default=0) < max(len(lengths), 1)


def test_the_size_decides():
    assert chunk_rows(0, 4096, 256) == 4096
    assert chunk_rows(0, MAX_LOGITS // 2**15, 2**15) == 2**11
    assert chunk_rows(0, 2**11 + 1, 2**15) == 2**11
    assert chunk_rows(0, 10**6, 128_256) == 523
    assert chunk_rows(0, 10**6, 2**20) == 256
    assert chunk_rows(7, 4096, 256) == 7
    assert chunk_rows(5000, 4096, 2**20) == 4096


def test_a_chunk_has_at_least_one_position():
    with pytest.raises(ValueError, match="loss_chunk=-1: at least 1, or 0 to decide by size"):
        TrainerConfig(loss_chunk=-1)


def test_small_logits_take_the_plain_path_bit_for_bit():
    model, batch = tiny("llama"), batch_with_gaps()
    expected, gradients = loss_and_gradients(plain, model, batch)
    for chunk in (0, batch["labels"].numel()):
        token_loss = TokenLoss(chunk)
        loss, ours = loss_and_gradients(token_loss, model, batch)
        assert not token_loss._decided
        assert torch.equal(loss, expected)
        assert all(torch.equal(ours[name], gradients[name]) for name in gradients)


HEADS = {
    "kept": [],
    "int4": [Rule(match="lm_head", action="quantize")],
    "int8 inputs": [
        Rule(
            match="lm_head",
            action="quantize",
            weight=QuantSpec(bits=8, granularity="channel", grid="absmax"),
            input=InputSpec(),
        )
    ],
}


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize(
    ("family", "head"),
    # tied heads cannot be quantized
    [*(("llama", head) for head in HEADS), ("llama_tied", "kept"), ("gemma2", "kept")],
)
def test_prepared_models(family, head, autocast):
    model = tiny(family)
    prepare(model, Scheme(rules=HEADS[head]))
    assert isinstance(model.lm_head, FakeQuantLinear) == (head != "kept")
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        bound = BF16_BOUND if autocast else SUM_BOUND
        assert_agree(model, batch_with_gaps(), 8, bound, SUM_BOUND)


def test_a_quantized_weight_is_computed_once():
    model = tiny("llama")
    prepare(model, Scheme(rules=HEADS["int4"]))
    calls = []
    model.lm_head.weight_fake_quant.register_forward_hook(lambda *_: calls.append(1))
    function = in_chunks(4)
    function(model, batch_with_gaps())
    calls.clear()
    function(model, batch_with_gaps()).backward()
    assert calls == [1]


def test_a_head_with_an_observer_keeps_the_plain_path():
    """It would see the positions with a target only."""
    model = tiny("llama")
    static = InputSpec(granularity="tensor", dynamic=False, scale_dtype="bfloat16")
    wide = QuantSpec(bits=8, granularity="channel", grid="absmax")
    rule = Rule(match="lm_head", action="quantize", weight=wide, input=static)
    prepare(model, Scheme(weight=wide, rules=[rule]))
    assert not supports_chunked(model)


def lora_on(model, *targets):
    torch.manual_seed(0)
    config = peft.LoraConfig(r=4, target_modules=list(targets), init_lora_weights=False)
    peft.inject_adapter_in_model(config, model)
    return model


def test_adapters_on_a_frozen_model():
    model = lora_on(tiny("llama"), "q_proj", "down_proj")
    assert not any(t.requires_grad for t in head_of(model).tensors)
    assert_agree(model, batch_with_gaps(), 8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_head_that_trains_as_a_whole_beside_adapters(dtype):
    model = lora_on(tiny("llama"), "q_proj")
    model.lm_head = ModulesToSaveWrapper(model.lm_head, "default")
    model.lm_head.modules_to_save.requires_grad_(True)
    (weight,) = head_of(model).tensors
    assert weight is model.lm_head.modules_to_save["default"].weight
    assert weight.requires_grad
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        assert_agree(
            model, batch_with_gaps(), 4, SUM_BOUND if dtype == torch.float32 else BF16_BOUND
        )


@pytest.mark.parametrize("hooked", [False, True])
def test_heads_that_are_called_as_they_are(hooked):
    """An adapter on the head, or a hook."""
    model = tiny("gemma2") if hooked else lora_on(tiny("llama"), "lm_head", "q_proj")
    if hooked:
        model.lm_head.register_forward_hook(lambda _, args, out: out * 0.5)
    assert_agree(model, batch_with_gaps(), 8)


def test_the_head_of_disabled_adapters_is_the_original():
    model = tiny("llama")
    original = model.lm_head
    model.lm_head = ModulesToSaveWrapper(original, "default")
    with torch.no_grad():
        model.lm_head.modules_to_save["default"].weight.zero_()
    model.lm_head.enable_adapters(False)
    batch = batch_with_gaps()
    with torch.no_grad():
        # the order of additions only
        expected = float(plain(model, batch))
        assert float(in_chunks(8)(model, batch)) == pytest.approx(expected, rel=SUM_BOUND)


class ScaledLogits(LlamaForCausalLM):
    """Does something after the head that nobody knows of."""

    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        output.logits = output.logits * (1 + 2**-20)
        return output


class ScaledStates(LlamaForCausalLM):
    """Does something between decoder and head."""

    def forward(self, input_ids, attention_mask, position_ids, use_cache):
        states = self.model(input_ids, attention_mask, position_ids, use_cache=False)
        return SimpleNamespace(logits=self.lm_head(states.last_hidden_state / 2))


class OtherPositions(LlamaForCausalLM):
    """Calls the decoder with something else than it was given."""

    def forward(self, input_ids, attention_mask, position_ids, use_cache):
        return super().forward(input_ids, attention_mask, position_ids * 2, use_cache=False)


@pytest.mark.parametrize("cls", [ScaledLogits, ScaledStates, OtherPositions])
def test_a_model_that_does_something_else_keeps_its_own_logits(cls, caplog):
    torch.manual_seed(0)
    model, batch = cls(CONFIGS["llama"]), batch_with_gaps()
    expected = plain(model, batch)
    token_loss = TokenLoss(8)
    with caplog.at_level(logging.WARNING):
        assert torch.equal(token_loss(model, batch), expected)
        assert torch.equal(token_loss(model, batch), expected)
    (message,) = caplog.messages
    assert f"trainer.loss_chunk: {cls.__name__} makes its logits in a way of its own" in message


def test_the_check_leaves_the_model_and_the_random_stream_alone():
    model = tiny("gpt2").train()
    model.transformer.h[0].eval()
    modes = [part.training for part in model.modules()]
    weights = copy.deepcopy(model.state_dict())
    hooks = [len(p._forward_hooks) + len(p._forward_pre_hooks) for p in model.modules()]
    stream = torch.get_rng_state()
    assert supports_chunked(model)
    assert torch.equal(torch.get_rng_state(), stream)
    assert [part.training for part in model.modules()] == modes
    assert hooks == [len(p._forward_hooks) + len(p._forward_pre_hooks) for p in model.modules()]
    assert all(torch.equal(v, weights[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize("recompute", [False, True])
def test_dropout_is_that_of_the_plain_path(recompute):
    model, batch = tiny("gpt2").train(), batch_with_gaps()
    if recompute:
        # the old name warns in the newest transformers
        name = "activation_checkpointing_enable"
        enable = getattr(model, name, None) or model.gradient_checkpointing_enable
        enable({"use_reentrant": False})
    made = []
    for function in (plain, in_chunks(8)):
        torch.manual_seed(3)
        made.append(loss_and_gradients(function, model, batch))
    (expected, gradients), (loss, ours) = made
    assert float(loss) == pytest.approx(float(expected), rel=SUM_BOUND)
    whole = torch.stack([g.norm() for g in gradients.values()]).norm()
    for name, gradient in gradients.items():
        assert float((ours[name] - gradient).norm()) <= SUM_BOUND * float(whole)


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_validation_computes_no_gradients(context, monkeypatch):
    model, batch = tiny("gemma2"), batch_with_gaps()
    monkeypatch.setattr(torch.autograd, "grad", None)
    with context():
        value = in_chunks(8)(model, batch)
        assert not value.requires_grad
        assert float(value) == pytest.approx(float(plain(model, batch)), rel=SUM_BOUND)


def test_training_in_chunks_follows_the_plain_path(tmp_path):
    expected = train(module_of("gemma2", scheme=Scheme()), tmp_path / "plain")
    made = train(module_of("gemma2", scheme=Scheme()), tmp_path / "chunks", loss_chunk=5)
    assert made.keys() == expected.keys()
    # at the first step nothing but the order of additions differs; what AdamW makes of it later
    # (a sign where a gradient is near zero) is no longer bounded by it
    assert made["train_loss"][1] == pytest.approx(expected["train_loss"][1], rel=SUM_BOUND)
    assert made["grad_norm"][1] == pytest.approx(expected["grad_norm"][1], rel=SUM_BOUND)
    assert made["train_loss"] != expected["train_loss"]


PEAK = """
import pathlib, re, torch
from qat.loss import Head, chunked_loss, loss_sum

def kilobytes(key):
    return int(re.search(key + r":\\s+(\\d+)", pathlib.Path("/proc/self/status").read_text())[1])

V, N, H = 32_000, 2_048, 64
x, weight = torch.randn(N, H, requires_grad=True), torch.randn(V, H, requires_grad=True)
targets = torch.arange(N)
head = Head((weight,), lambda x, tensors: torch.nn.functional.linear(x, *tensors))
loss_sum(head.logits(x[None, :8], head.tensors), targets[None, :8]).backward()  # libraries
for loss in (
    lambda: chunked_loss(head, x, targets, 64),
    lambda: loss_sum(head.logits(x[None], head.tensors), targets[None]),
):
    pathlib.Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = kilobytes("VmRSS")
    loss().backward()
    print(1024 * (kilobytes("VmHWM") - before))
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's /proc")
def test_peak_memory_stays_far_below_the_whole_logits():
    """At most four tensors of a chunk's logits and three of the weight's gradient: 1/4 of them."""
    # without it the allocator keeps freed memory, as much as it likes
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": str(2**20)}
    output = subprocess.run(
        [sys.executable, "-c", PEAK], capture_output=True, text=True, check=True, env=environment
    ).stdout
    chunks, whole = map(int, output.split())
    logits = 4 * 2_048 * 32_000
    assert chunks < logits / 4
    # the measure sees the whole logits and their gradient where they are made
    assert whole > 2 * logits


def test_liger_is_not_for_the_cpu():
    assert not supports_liger(tiny("llama"))


@GPU
@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 8, 41])
def test_chunks_on_the_gpu(rows, dtype):
    """Whichever function is chosen there."""
    model = tiny("llama").to("cuda")
    batch = {name: value.to("cuda") for name, value in batch_with_gaps().items()}
    token_loss = TokenLoss(rows)
    with torch.autocast("cuda", dtype, enabled=dtype != torch.float32):
        expected, gradients = loss_and_gradients(plain, model, batch)
        loss, ours = loss_and_gradients(token_loss, model, batch)
    assert token_loss._function is not None
    # bf16, or TF32 in Triton's products
    bound = 8 * (2**-9 if dtype == torch.bfloat16 else 2**-11)
    assert float((loss - expected).abs()) <= bound * float(expected)
    whole = torch.stack([g.norm() for g in gradients.values()]).norm()
    for name, gradient in gradients.items():
        assert float((ours[name] - gradient).norm()) <= bound * float(whole)


def test_the_vocabulary_of_the_tests_fits_their_chunks():
    """The tests above reach the chunked path only through a chunk that is asked for."""
    assert chunk_rows(0, 48, VOCAB) == 48
