"""Optimizers by name, their groups, exact resume, and the schedule."""

import copy
import io
import logging
import math
import sys
from typing import get_args, get_type_hints

import peft
import pytest
import torch
from torch import nn

from qat.errors import UserError
from qat.optim import OptimConfig, build_optimizer, build_schedule, lr_factor
from tests.qat.test_module import BLOCKS, STEPS, module_of, step_batches, train
from tests.tiny import tiny

NAMES = get_args(get_type_hints(OptimConfig)["name"])


def network() -> nn.Module:
    torch.manual_seed(0)
    # 4096 values and more: below, bitsandbytes keeps 32-bit states
    return nn.Sequential(nn.Linear(64, 128), nn.LayerNorm(128), nn.Linear(128, 64, bias=False))


def factors(steps, **options):
    config = OptimConfig(**options)
    return [lr_factor(step, config, steps) for step in range(steps + 1)]


def test_warmup_is_linear_and_starts_above_zero():
    assert factors(10, warmup_steps=4, schedule="constant") == [
        1 / 5,
        2 / 5,
        3 / 5,
        4 / 5,
        *[1.0] * 7,
    ]


@pytest.mark.parametrize("schedule", ["cosine", "linear"])
def test_decay_starts_at_the_peak_and_ends_at_the_floor(schedule):
    values = factors(12, warmup_steps=2, schedule=schedule, min_lr_ratio=0.1)
    assert values[2] == 1.0
    assert values[12] == 0.1
    assert values[2:] == sorted(set(values[2:]), reverse=True)


def test_cosine_and_linear_at_their_quarters():
    # (1 + cos(pi / 4)) / 2, exact up to the one rounding that both sides share
    assert factors(4)[1] == (1 + math.cos(math.pi / 4)) / 2
    assert factors(4, schedule="linear") == [1.0, 0.75, 0.5, 0.25, 0.0]
    assert factors(4, schedule="linear", min_lr_ratio=0.5) == [1.0, 0.875, 0.75, 0.625, 0.5]


def test_beyond_the_end_and_warmup_as_long_as_the_run():
    config = OptimConfig(min_lr_ratio=0.25)
    assert lr_factor(99, config, 10) == 0.25
    assert lr_factor(5, OptimConfig(warmup_steps=5), 5) == 1.0


def test_schedule_object_follows_the_function():
    config = OptimConfig(lr=0.5, warmup_steps=3)
    optimizer = build_optimizer(network(), config)
    schedule = build_schedule(optimizer, config, 9)
    for step in range(9):
        assert schedule.get_last_lr() == [0.5 * lr_factor(step, config, 9)] * 2
        optimizer.step()
        schedule.step()


def test_only_matrices_decay():
    model = network()
    groups = build_optimizer(model, OptimConfig(weight_decay=0.1)).param_groups
    assert [group["weight_decay"] for group in groups] == [0.1, 0.0]
    assert {id(p) for p in groups[0]["params"]} == {id(model[0].weight), id(model[2].weight)}
    assert {id(p) for p in groups[1]["params"]} == {
        id(model[0].bias),
        id(model[1].weight),
        id(model[1].bias),
    }


def test_frozen_parameters_are_left_out():
    model = network()
    model[0].requires_grad_(False)
    model[1].requires_grad_(False)
    (group,) = build_optimizer(model, OptimConfig()).param_groups
    assert [id(p) for p in group["params"]] == [id(model[2].weight)]


@pytest.mark.parametrize("name", NAMES)
def test_every_optimizer_lowers_a_loss_on_the_cpu(name):
    model = network()
    optimizer = build_optimizer(model, OptimConfig(name=name, lr=1e-3))
    x = torch.randn(32, 64, generator=torch.Generator().manual_seed(1))
    losses = []
    for _ in range(8):
        loss = (model(x) - x).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
    state = optimizer.state[model[0].weight]
    large = [v for v in state.values() if torch.is_tensor(v) and v.numel() >= 64 * 128]
    expected = torch.uint8 if name.endswith("8bit") else torch.float32
    assert large
    assert {v.dtype for v in large} == {expected}


PAGED = {
    "paged_adamw": ("32-bit AdamW", "AdamW32bit"),
    "paged_adamw_8bit": ("8-bit AdamW", "AdamW8bit"),
    "paged_lion_8bit": ("8-bit Lion", "Lion8bit"),
}


@pytest.mark.parametrize("name", PAGED)
def test_without_pages_a_line_says_what_runs(name, caplog):
    what, cls = PAGED[name]
    with caplog.at_level(logging.WARNING):
        optimizer = build_optimizer(network(), OptimConfig(name=name))
    assert caplog.messages == [
        f"optim.name={name}: pages are a CUDA feature; on this cpu device the same {what} runs "
        "with its state in RAM"
    ]
    assert type(optimizer).__name__ == cls
    assert not optimizer.is_paged


@pytest.mark.parametrize("name", [n for n in NAMES if n not in PAGED])
def test_nothing_is_said_about_the_others(name, caplog):
    build_optimizer(network(), OptimConfig(name=name))
    assert not caplog.messages


@pytest.mark.parametrize("name", [n for n in NAMES if n != "adamw"])
def test_without_bitsandbytes(name, monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(
        UserError, match=rf"optim\.name={name}: needs bitsandbytes.*optim\.name=ada"
    ):
        build_optimizer(network(), OptimConfig(name=name))
    build_optimizer(network(), OptimConfig())


def test_small_tensors_keep_fp32_state():
    """The rule of bitsandbytes: 8 bits from 4096 values on."""
    model = nn.ModuleList([nn.Linear(63, 65, bias=False), nn.Linear(64, 64, bias=False)])
    optimizer = build_optimizer(model, OptimConfig(name="adamw_8bit"))
    steps(model, optimizer, range(1))
    made = [optimizer.state[layer.weight]["state1"].dtype for layer in model]
    assert made == [torch.float32, torch.uint8]


def steps(model, optimizer, numbers):
    """Optimizer steps with gradients that depend on the step's number alone."""
    for number in numbers:
        generator = torch.Generator().manual_seed(number)
        for parameter in model.parameters():
            gradient = torch.randn(parameter.shape, generator=generator)
            parameter.grad = gradient.to(parameter)
        optimizer.step()


def tensors_of(state):
    """(place, tensor) of all tensors in a nested state."""
    if torch.is_tensor(state):
        return [("", state)]
    items = state.items() if isinstance(state, dict) else enumerate(state)
    nested = (dict, list, tuple, torch.Tensor)
    found = [(k, tensors_of(v)) for k, v in items if isinstance(v, nested)]
    return [(f"{key}.{place}", tensor) for key, tensors in found for place, tensor in tensors]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", NAMES)
def test_state_survives_a_file_bit_for_bit(name, dtype):
    """Of large tensors and small ones, and what follows is the uninterrupted run."""
    config = OptimConfig(name=name, lr=1e-2, weight_decay=0.1)
    model = network().to(dtype)
    optimizer = build_optimizer(model, config)
    steps(model, optimizer, range(3))
    file = io.BytesIO()
    torch.save([model.state_dict(), optimizer.state_dict()], file)
    file.seek(0)
    weights, state = torch.load(file, weights_only=True)

    other = network().to(dtype)
    other.load_state_dict(weights)
    resumed = build_optimizer(other, config)
    resumed.load_state_dict(state)
    before, after = tensors_of(optimizer.state_dict()), tensors_of(resumed.state_dict())
    assert [place for place, _ in before] == [place for place, _ in after]
    assert len(before) >= 4
    for (place, a), (_, b) in zip(before, after):
        assert a.dtype == b.dtype, place
        assert torch.equal(a, b), place

    steps(model, optimizer, range(3, 6))
    steps(other, resumed, range(3, 6))
    for a, b in zip(model.parameters(), other.parameters()):
        assert torch.equal(a, b)
    for (place, a), (_, b) in zip(*(tensors_of(o.state_dict()) for o in (optimizer, resumed))):
        assert torch.equal(a, b), place


class KilledError(Exception):
    """Ends a run before its time."""


@pytest.mark.parametrize("name", NAMES)
def test_a_resumed_run_is_the_uninterrupted_one(name, tmp_path):
    """Through Lightning's own saving and loading."""
    batches = step_batches(BLOCKS, 1) * STEPS
    whole = module_of(name=name, lr=1e-2)
    train(whole, tmp_path / "whole", batches=batches)

    killed = module_of(name=name, lr=1e-2)
    original = killed.training_step

    def step(batch, batch_idx):
        if killed.global_step == 5:
            raise KilledError
        return original(batch, batch_idx)

    killed.training_step = step
    with pytest.raises(KilledError):
        train(killed, tmp_path / "parts", batches=batches, checkpoint_every_steps=3)
    resumed = module_of(name=name, lr=1e-2)
    metrics = train(resumed, tmp_path / "parts", batches=batches, checkpoint_every_steps=3)
    assert list(metrics["train_loss"]) == [1, 2, 3, 4, 5, 6]
    for a, b in zip(whole.model.parameters(), resumed.model.parameters()):
        assert torch.equal(a, b)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", PAGED)
def test_pages_on_cuda_before_and_after_a_checkpoint(name):
    config = OptimConfig(name=name, lr=1e-2)
    model = nn.Linear(400, 300).cuda()
    optimizer = build_optimizer(model, config)
    steps(model, optimizer, range(2))
    other = copy.deepcopy(model)
    resumed = build_optimizer(other, config)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert not hasattr(resumed.state[other.weight]["state1"], "is_paged")
    steps(model, optimizer, range(2, 4))
    steps(other, resumed, range(2, 4))
    assert optimizer.state[model.weight]["state1"].is_paged
    assert resumed.state[other.weight]["state1"].is_paged
    for a, b in zip(model.parameters(), other.parameters()):
        assert torch.equal(a, b)


def lora_model():
    model = tiny("llama_bias")
    torch.manual_seed(0)
    config = peft.LoraConfig(r=4, target_modules=["q_proj"], lora_bias=True)
    peft.inject_adapter_in_model(config, model)
    model.model.norm.weight.requires_grad_(True)
    return model


def test_lora_plus_gives_b_a_rate_of_its_own():
    model = lora_model()
    config = OptimConfig(lr=1e-3, lora_plus_ratio=16.0, weight_decay=0.1, warmup_steps=1)
    optimizer = build_optimizer(model, config)
    names = {id(p): n for n, p in model.named_parameters()}
    made = [
        (group["lr"], group["weight_decay"], {names[id(p)] for p in group["params"]})
        for group in optimizer.param_groups
    ]
    layers = [f"model.layers.{layer}.self_attn.q_proj" for layer in range(2)]
    assert made == [
        (1e-3, 0.1, {f"{layer}.lora_A.default.weight" for layer in layers}),
        (1e-3, 0.0, {"model.norm.weight"}),
        (1e-3 * 16, 0.1, {f"{layer}.lora_B.default.weight" for layer in layers}),
        (1e-3 * 16, 0.0, {f"{layer}.lora_B.default.bias" for layer in layers}),
    ]
    schedule = build_schedule(optimizer, config, 8)
    for step in range(8):
        factor = lr_factor(step, config, 8)
        base = [1e-3, 1e-3, 1e-3 * 16, 1e-3 * 16]
        assert schedule.get_last_lr() == [rate * factor for rate in base]
        optimizer.step()
        schedule.step()


def test_without_lora_plus_the_groups_are_the_two_of_old():
    groups = build_optimizer(lora_model(), OptimConfig(weight_decay=0.1)).param_groups
    assert [(len(group["params"]), group["weight_decay"]) for group in groups] == [(4, 0.1), (3, 0)]


@pytest.mark.parametrize("frozen", [False, True])
def test_lora_plus_without_lora(frozen):
    model = lora_model() if frozen else network()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.requires_grad_(False)
    with pytest.raises(UserError, match=r"optim\.lora_plus_ratio=4\.0: .*this model trains none"):
        build_optimizer(model, OptimConfig(lora_plus_ratio=4.0))


def test_only_what_trains_enters_and_the_rest_stays_bit_identical():
    model = lora_model()
    optimizer = build_optimizer(model, OptimConfig(lr=0.1, weight_decay=0.5))
    inside = {id(p) for group in optimizer.param_groups for p in group["params"]}
    before = copy.deepcopy(model.state_dict())
    steps(model, optimizer, range(2))
    for name, parameter in model.named_parameters():
        trains = ".lora_" in name or name == "model.norm.weight"
        assert (id(parameter) in inside) == trains
        assert torch.equal(parameter, before[name]) != trains
    assert len(optimizer.state) == len(inside) == 7


def test_the_first_adamw_step_by_hand():
    """After one step m / sqrt(v) is the sign of the gradient, whatever the decay rates."""
    weight = nn.Parameter(torch.tensor([[1.0, -2.0]]))
    module = nn.Module()
    module.register_parameter("weight", weight)
    optimizer = build_optimizer(module, OptimConfig(lr=0.5, weight_decay=0.25, eps=1e-30))
    weight.grad = torch.tensor([[3.0, -0.125]])
    optimizer.step()
    # w (1 - lr * decay) - lr * sign(g); m and v carry two roundings each, of 2^-24
    expected = torch.tensor([[0.875 - 0.5, -1.75 + 0.5]])
    torch.testing.assert_close(weight.detach(), expected, rtol=0, atol=4 * 2**-24)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": 0.0}, r"lr=0\.0: a finite number above 0"),
        ({"eps": -1.0}, r"eps=-1\.0: a finite number above 0"),
        ({"weight_decay": -0.1}, r"weight_decay=-0\.1: a finite number, at least 0"),
        ({"warmup_steps": -1}, "warmup_steps=-1: a finite number, at least 0"),
        ({"clip_norm": -1.0}, r"clip_norm=-1\.0: a finite number, at least 0"),
        ({"lr": float("nan")}, "lr=nan: a finite number above 0"),
        ({"beta1": 1.0}, r"beta1=1\.0: at least 0 and below 1"),
        ({"lora_plus_ratio": 0.0}, r"lora_plus_ratio=0\.0: a finite number above 0"),
        ({"min_lr_ratio": 1.5}, r"min_lr_ratio=1\.5: between 0 and 1"),
    ],
)
def test_values_outside_their_range(options, message):
    with pytest.raises(ValueError, match=message):
        OptimConfig(**options)
