"""The predicted peak, part by part."""

import psutil
import pytest
import torch

from qat.memory import OPTIMIZER_BYTES, peak_memory_bytes, predict
from qat.optim import OptimConfig, build_optimizer
from qat.prepare import plan
from qat.scheme import Scheme
from qat.training import TrainerConfig
from qat_kernels import QuantSpec
from tests.tiny import CONFIGS, tiny

HIDDEN, INTERMEDIATE, LAYERS, VOCAB, SEQ = 64, 96, 2, 256, 128
WIDE = QuantSpec(bits=8, granularity="channel", grid="absmax")


def predicted(scheme=None, optim="adamw", checkpoints=1, **trainer):
    coverage = plan(tiny("llama"), scheme or Scheme())
    config = TrainerConfig(**{"micro_batch_size": 4} | trainer)
    optimizer = OptimConfig(name=optim)
    return predict(coverage, CONFIGS["llama"], SEQ, config, optimizer, checkpoints)


def counts():
    model = tiny("llama")
    total = sum(p.numel() for p in model.parameters())
    head_and_embedding = 2 * VOCAB * HIDDEN
    norms = sum(p.numel() for p in model.parameters() if p.ndim == 1)
    return total, total - head_and_embedding - norms


def test_weights_gradients_and_copies_follow_the_parameter_counts():
    total, quantized = counts()
    result = predicted()
    assert result.parameters == result.gradients == 4 * total
    assert result.optimizer == 8 * total
    assert result.quantized_copies == 4 * quantized
    assert predicted(precision="bf16-mixed").quantized_copies == 2 * quantized


def test_memory_is_the_sum_of_its_parts_and_the_table_shows_each():
    result = predicted()
    parts = [
        result.parameters,
        result.gradients,
        result.optimizer,
        result.quantized_copies,
        result.activations,
    ]
    assert result.memory == sum(parts)
    table = result.table()
    assert all(f"{part / 2**20:,.1f} MiB" in table for part in [*parts, result.disk])
    assert len(table.splitlines()) == 7


def test_activations_grow_with_the_micro_batch_and_shrink_with_checkpointing():
    logits = 4 * SEQ * VOCAB * 12
    one, two = predicted().activations - logits, predicted(micro_batch_size=8).activations
    assert two == 2 * (one + logits)
    recomputed = predicted(activation_checkpointing=True).activations - logits
    # one layer whole, of the others their inputs
    assert recomputed == one // LAYERS + LAYERS * 4 * SEQ * HIDDEN * 4
    assert predicted(precision="bf16-mixed").activations < predicted().activations


def test_disk_holds_checkpoints_and_the_packed_model():
    total, quantized = counts()
    artifact = int(quantized * 4.5 / 8) + 2 * (total - quantized)
    # one more than the run keeps, because a new one is complete before it replaces the old one
    assert predicted(checkpoints=0).disk == artifact + 12 * total
    assert predicted(checkpoints=3).disk == artifact + 4 * 12 * total
    wide = predicted(Scheme(weight=WIDE), checkpoints=0).disk
    assert wide == int(quantized * 8.5 / 8) + 2 * (total - quantized) + 12 * total


@pytest.mark.parametrize("name", OPTIMIZER_BYTES)
def test_optimizer_state_is_as_large_as_predicted(name):
    """Bytes of the state after a step; small parameters keep 32-bit states, so one large one."""
    layer = torch.nn.Linear(512, 512, bias=False)
    optimizer = build_optimizer(layer, OptimConfig(name=name))
    layer(torch.randn(2, 512)).sum().backward()
    optimizer.step()
    state = optimizer.state[layer.weight]
    # without the 256-entry tables of the 8-bit codes, which all parameters share
    tensors = [v for k, v in state.items() if torch.is_tensor(v) and not k.startswith("qmap")]
    stored = sum(t.numel() * t.element_size() for t in tensors)
    assert stored / layer.weight.numel() == pytest.approx(OPTIMIZER_BYTES[name], rel=0.01)


def test_the_measured_peak_is_at_least_what_is_resident_now():
    resident = psutil.Process().memory_info().rss
    # the kernel counts pages of a process in batches of up to 64 for each thread
    assert peak_memory_bytes() >= resident - (1 << 20)
