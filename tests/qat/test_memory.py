"""The predicted peak, part by part, against tensors that can be counted; and the meter."""

import psutil
import pytest
import torch

from qat.adapter_config import AdapterConfig
from qat.adapters import prepare_adapters
from qat.memory import (
    RUNTIME_BYTES,
    RunPlan,
    artifact_bytes,
    gradient_bytes,
    optimizer_bytes,
    predict,
    tensor_bytes,
)
from qat.memory_meter import MemoryMeter, peak_memory_bytes, release
from qat.optim import OptimConfig, build_optimizer
from qat.original import OriginalWeights
from qat.prepare import plan, prepare
from qat.scheme import Scheme
from qat.training import TrainerConfig
from qat_kernels import QuantSpec
from tests.tiny import CONFIGS, save_tiny, tiny

HIDDEN, LAYERS, VOCAB, SEQ = 64, 2, 256, 128
WIDE = QuantSpec(bits=8, granularity="channel", grid="absmax")
NAMES = ("adamw", "adamw_8bit", "lion_8bit", "ademamix_8bit", "paged_adamw", "paged_lion_8bit")


def on_meta(family="llama"):
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(CONFIGS[family], dtype=torch.float32)
    model.tie_weights()
    return model


def run_plan(optim="adamw", max_steps=10, finetunes=False, **trainer):
    config = TrainerConfig(**{"micro_batch_size": 4, "global_batch_size": 4} | trainer)
    return RunPlan(SEQ, max_steps, config, OptimConfig(name=optim), finetunes=finetunes)


def predicted(scheme=None, quantized=True, **changes):
    model = on_meta()
    coverage = (prepare if quantized else plan)(model, scheme or Scheme())
    return predict(model, coverage, run_plan(**changes))


def counts():
    model = tiny("llama")
    total = sum(p.numel() for p in model.parameters())
    norms = sum(p.numel() for p in model.parameters() if p.ndim == 1)
    return total, total - 2 * VOCAB * HIDDEN - norms


def test_weights_gradients_and_copies_follow_the_parameter_counts():
    total, quantized = counts()
    result = predicted()
    assert result.gradients == 4 * total
    assert result.optimizer == 8 * total
    buffers = sum(b.numel() * b.element_size() for b in tiny("llama").buffers())
    # each quantizer has a switch of one byte, of 14 matrices
    assert result.weights == 4 * total + buffers + 14
    # a QAT step adds a copy of each weight; kept ones are rounded, so they have copies too
    assert result.copies - predicted(quantized=False).copies >= 4 * quantized


def test_activations_grow_with_the_micro_batch_and_shrink_with_checkpointing():
    one = predicted().activations

    def step(blocks):
        result = predicted(micro_batch_size=blocks, global_batch_size=blocks)
        return result.gradients + result.copies + result.activations

    # At the peak, in the backward pass of the loss, what does not grow is the rounded copies of all
    # weights but the embedding's, whose own backward pass does not need it, and in 4 bytes each the
    # loss and its gradient. Gradients of the step before are gone, and none of this one is made.
    fixed = 4 * counts()[0] - 4 * VOCAB * HIDDEN + 8
    assert 2 * step(4) - step(8) == 2 * step(8) - step(16) == fixed
    assert predicted(activation_checkpointing=True).activations < one / 2
    assert predicted(precision="bf16-mixed").activations < one
    assert predicted(loss_chunk=64).activations < one


def test_the_train_phase_is_the_sum_of_its_parts():
    result = predicted()
    parts = [result.weights, result.gradients, result.optimizer, result.copies, result.activations]
    assert result.phases["train"] == sum(parts) + RUNTIME_BYTES
    assert result.memory == result.ram == max(result.phases.values())
    table = result.table()
    assert all(f"{part / 2**20:,.1f} MiB" in table for part in [*parts, result.ram, result.disk])


@pytest.mark.parametrize("family", sorted(CONFIGS.keys() - {"gpt2"}))
def test_every_family_can_be_replayed(family):
    model = on_meta(family)
    assert predict(model, prepare(model, Scheme()), run_plan()).activations > 0


def test_gradients_of_several_micro_batches_stay_alive():
    """Accumulating keeps them during the whole backward pass."""
    apart = predicted(global_batch_size=8).phases["train"]
    assert apart >= predicted().phases["train"]


def test_disk_holds_checkpoints_and_the_packed_model():
    total, quantized = counts()
    coverage = plan(tiny("llama"), Scheme())
    assert artifact_bytes(coverage) == int(quantized * 4.5 / 8) + 2 * (total - quantized)
    # one checkpoint (100 steps apart, so the second replaces nothing), and the artifact
    assert predicted().disk == 12 * total + artifact_bytes(coverage)
    # a new one is complete before it replaces the old one
    assert predicted(max_steps=200).disk == 2 * 12 * total
    assert predicted(finetunes=True).disk == 2 * 12 * total + artifact_bytes(coverage)
    channels = sum(
        entry.numel // entry.shape[-1] for entry in coverage.entries if entry.status == "quantized"
    )
    wide = artifact_bytes(plan(tiny("llama"), Scheme(weight=WIDE)))
    assert wide == quantized + 2 * channels + 2 * (total - quantized)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("shape", [(512, 512), (8, 16)])
def test_optimizer_state_is_as_large_as_predicted(name, shape):
    """Bytes of the state after a step, without step counts and the tables of the 8-bit codes."""
    layer = torch.nn.Linear(*shape, bias=False)
    config = OptimConfig(name=name)
    optimizer = build_optimizer(layer, config)
    layer(torch.randn(2, shape[0])).sum().backward()
    optimizer.step()
    state = optimizer.state[layer.weight]
    skipped = ("qmap", "step")
    tensors = [v for k, v in state.items() if torch.is_tensor(v) and not k.startswith(skipped)]
    assert sum(t.numel() * t.element_size() for t in tensors) == optimizer_bytes(layer, config)


@pytest.fixture
def original(tmp_path):
    return OriginalWeights(str(save_tiny("llama", tmp_path / "model", torch.bfloat16)))


@pytest.mark.parametrize("base", ["nf4", "16bit"])
def test_adapters_are_counted_as_they_are_held(original, base):
    adapter = AdapterConfig(base=base, rank=4)
    held, _ = prepare_adapters(original, adapter, Scheme(), 0)
    counted, coverage = prepare_adapters(original, adapter, Scheme(), 0, load=False)
    assert tensor_bytes(counted) == tensor_bytes(held)
    prediction = predict(counted, coverage, run_plan())
    factors = [p for n, p in held.named_parameters() if ".lora_" in n]
    assert prediction.gradients == gradient_bytes(held) == 4 * sum(p.numel() for p in factors)
    assert prediction.optimizer == 2 * prediction.gradients
    assert prediction.mapped == 2 * counts()[0]


def test_merged_training_makes_one_weight_at_a_time(original):
    """Its weights are made again in the backward pass, so fewer than all matrices are alive."""
    peaks = {}
    for merges in (False, True):
        model, coverage = prepare_adapters(original, AdapterConfig(rank=4), Scheme(), 0, load=False)
        run = RunPlan(SEQ, 10, TrainerConfig(), OptimConfig(), merges=merges)
        peaks[merges] = predict(model, coverage, run).copies
    assert peaks[False] <= peaks[True] < 4 * counts()[1]


def test_the_measured_peak_is_at_least_what_is_resident_now():
    resident = psutil.Process().memory_info().rss
    # the kernel counts pages of a process in batches of up to 64 for each thread
    assert peak_memory_bytes() >= resident - (1 << 20)


def test_the_meter_sees_a_phase_and_not_the_one_inside_it():
    size = 64 << 20
    # twice, since the first use of things costs memory of its own
    for _ in range(2):
        meter = MemoryMeter(give_back=True)
        with meter.phase("outer"):
            b"x" * size
            with meter.phase("inner"):
                b"x" * (2 * size)
    # The kernel counts pages (4 KiB) in batches: a reading is off by up to 32 for each CPU that ran
    # the process (by 64 for each thread before Linux 6.2). Growth is a difference of two readings,
    # and the one busy thread may have come to four CPUs: 2 x 4 x 32 x 4 KiB.
    tolerance = 1 << 20
    assert meter.host["outer"] == pytest.approx(size, abs=tolerance)
    assert meter.host["inner"] == pytest.approx(2 * size, abs=tolerance)
    assert meter.peak == meter.host["inner"]


def test_release_drops_gradients():
    layer = torch.nn.Linear(4, 4)
    layer(torch.ones(1, 4)).sum().backward()
    release(layer)
    assert layer.weight.grad is None
