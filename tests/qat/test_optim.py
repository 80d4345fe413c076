"""Optimizers by name, their groups, and the schedule."""

import math

import pytest
import torch
from torch import nn

from qat.optim import OptimConfig, build_optimizer, build_schedule, lr_factor

NAMES = ["adamw", "adamw_8bit", "lion_8bit", "ademamix_8bit"]


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
    expected = torch.float32 if name == "adamw" else torch.uint8
    assert large
    assert {v.dtype for v in large} == {expected}


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
        ({"min_lr_ratio": 1.5}, r"min_lr_ratio=1\.5: between 0 and 1"),
    ],
)
def test_values_outside_their_range(options, message):
    with pytest.raises(ValueError, match=message):
        OptimConfig(**options)
