"""Optimizers by name and the learning-rate schedule."""

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR


@dataclass(frozen=True)
class OptimConfig:
    """Optimizer and schedule."""

    name: Literal["adamw", "adamw_8bit", "lion_8bit", "ademamix_8bit"] = "adamw"
    """adamw is PyTorch's, fused; the 8-bit ones are bitsandbytes'."""
    lr: float = 1e-4
    """Peak learning rate."""
    weight_decay: float = 0.0
    """Decoupled weight decay of matrices (norms and biases have none)."""
    beta1: float = 0.9
    """Decay of the first moment."""
    beta2: float = 0.95
    """Decay of the second moment."""
    eps: float = 1e-8
    """Term added to the denominator."""
    warmup_steps: int = 0
    """Optimizer steps of linear warm-up."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """Shape of the decay after the warm-up."""
    min_lr_ratio: float = 0.0
    """Learning rate at the end, as a share of lr."""
    clip_norm: float = 1.0
    """Gradient norm above which gradients are scaled down; 0 turns it off."""

    def __post_init__(self) -> None:
        """Raise ValueError for a value outside its range."""
        for name in ("lr", "eps"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name}={getattr(self, name)}: a finite number above 0")
        for name in ("weight_decay", "warmup_steps", "clip_norm"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name}={getattr(self, name)}: a finite number, at least 0")
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: at least 0 and below 1")
        if not 0 <= self.min_lr_ratio <= 1:
            raise ValueError(f"min_lr_ratio={self.min_lr_ratio}: between 0 and 1")


def build_optimizer(model: nn.Module, config: OptimConfig) -> Optimizer:
    """The optimizer over the parameters that require a gradient, decay for matrices only."""
    matrices: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for parameter in model.parameters():
        if parameter.requires_grad:
            (matrices if parameter.ndim >= 2 else others).append(parameter)
    groups = [
        {"params": matrices, "weight_decay": config.weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    betas = (config.beta1, config.beta2)
    if config.name == "adamw":
        return torch.optim.AdamW(groups, lr=config.lr, betas=betas, eps=config.eps, fused=True)
    import bitsandbytes

    if config.name == "adamw_8bit":
        made: Any = bitsandbytes.optim.AdamW8bit(groups, lr=config.lr, betas=betas, eps=config.eps)
    elif config.name == "lion_8bit":
        made = bitsandbytes.optim.Lion8bit(groups, lr=config.lr, betas=betas)
    else:
        made = bitsandbytes.optim.AdEMAMix8bit(
            groups, lr=config.lr, betas=(*betas, 0.9999), eps=config.eps
        )
    optimizer: Optimizer = made
    return optimizer


def lr_factor(step: int, config: OptimConfig, max_steps: int) -> float:
    """Share of the peak learning rate at an optimizer step (0 is the first)."""
    if step < config.warmup_steps:
        return (step + 1) / (config.warmup_steps + 1)
    if config.schedule == "constant":
        return 1.0
    progress = min(1.0, (step - config.warmup_steps) / max(1, max_steps - config.warmup_steps))
    decay = 1 - progress if config.schedule == "linear" else (1 + math.cos(math.pi * progress)) / 2
    return config.min_lr_ratio + (1 - config.min_lr_ratio) * decay


def build_schedule(optimizer: Optimizer, config: OptimConfig, max_steps: int) -> LambdaLR:
    """Warm-up, then the decay to ``min_lr_ratio`` at ``max_steps``."""
    return LambdaLR(optimizer, lambda step: lr_factor(step, config, max_steps))
