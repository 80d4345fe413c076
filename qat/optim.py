"""Optimizers by name, their parameter groups, and the learning-rate schedule.

The 8-bit optimizers are bitsandbytes' (Dettmers et al. 2022, arXiv:2110.02861): state in 8 bits
with an fp32 absmax per 256 values. Tensors of fewer than 4096 values keep fp32 state there; that
is bitsandbytes' own rule, and most LoRA matrices of small models fall under it. The paged ones
(QLoRA, arXiv:2305.14314) keep the state of tensors from 10^5 values on in CUDA managed memory,
which moves to RAM when the device is full.
"""

import logging
import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from lightning.fabric.utilities.rank_zero import rank_zero_only
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from qat.errors import UserError

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class OptimConfig:
    """Optimizer and schedule."""

    name: Literal[
        "adamw",
        "adamw_8bit",
        "lion_8bit",
        "ademamix_8bit",
        "paged_adamw",
        "paged_adamw_8bit",
        "paged_lion_8bit",
    ] = "adamw"
    """adamw is PyTorch's, fused; the others are bitsandbytes'. Paged: state that moves to RAM when
    a CUDA device is full; elsewhere the same optimizer runs without pages."""
    lr: float = 1e-4
    """Peak learning rate."""
    lora_plus_ratio: float = 1.0
    """LoRA+: learning rate of LoRA's B matrices, as a multiple of lr (the paper has about 16)."""
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
        for name in ("lr", "eps", "lora_plus_ratio"):
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
    """The optimizer over the parameters that require a gradient, decay for matrices only.

    Where the parameters are not on a CUDA device, a paged optimizer is made without pages (same
    arithmetic, same checkpoint), and a log line says so.

    Raises:
        UserError: bitsandbytes is missing, or LoRA+ is asked for and there is no LoRA.
    """
    groups = _groups(model, config)
    betas = (config.beta1, config.beta2)
    if config.name == "adamw":
        return torch.optim.AdamW(groups, lr=config.lr, betas=betas, eps=config.eps, fused=True)
    optimizer = _of_bitsandbytes(groups, config, betas)
    if optimizer.is_paged:
        optimizer.register_step_pre_hook(_page_again)
    made: Optimizer = optimizer
    return made


def _groups(model: nn.Module, config: OptimConfig) -> list[dict[str, Any]]:
    """Groups of matrices and of the rest; LoRA+ (Hayou et al. 2024, arXiv:2402.12354) adds two."""
    split = config.lora_plus_ratio != 1
    members: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            is_b = split and ".lora_B." in f".{name}"
            members.setdefault((is_b, parameter.ndim < 2), []).append(parameter)
    if split and not any(is_b for is_b, _ in members):
        raise UserError(
            f"optim.lora_plus_ratio={config.lora_plus_ratio}: the learning rate of LoRA's B "
            "matrices, and this model trains none. Leave it at 1, or choose a recipe with adapters"
        )
    return [
        {
            "params": members[is_b, is_vector],
            "lr": config.lr * (config.lora_plus_ratio if is_b else 1),
            "weight_decay": 0.0 if is_vector else config.weight_decay,
        }
        for is_b, is_vector in sorted(members)
    ]


def _of_bitsandbytes(
    groups: list[dict[str, Any]], config: OptimConfig, betas: tuple[float, float]
) -> Any:
    """One of bitsandbytes' optimizers, without pages where there are none."""
    try:
        from bitsandbytes import optim
    except ImportError as error:
        raise UserError(
            f"optim.name={config.name}: needs bitsandbytes, which cannot be imported ({error}). "
            "Install it (pip install bitsandbytes), or use optim.name=adamw"
        ) from error
    paged, kind = config.name.startswith("paged_"), config.name.removeprefix("paged_")
    device = groups[0]["params"][0].device.type if groups else "cpu"
    if paged and device != "cuda":
        what = {"adamw": "32-bit AdamW", "adamw_8bit": "8-bit AdamW", "lion_8bit": "8-bit Lion"}
        where = "RAM" if device == "cpu" else "device memory"
        rank_zero_only(log.warning)(
            f"optim.name={config.name}: pages are a CUDA feature; on this {device} device the same "
            f"{what[kind]} runs with its state in {where}"
        )
        paged = False
    if kind == "lion_8bit":
        return optim.Lion8bit(groups, lr=config.lr, betas=betas, is_paged=paged)
    if kind == "ademamix_8bit":
        return optim.AdEMAMix8bit(groups, lr=config.lr, betas=(*betas, 0.9999), eps=config.eps)
    cls = optim.AdamW8bit if kind == "adamw_8bit" else optim.AdamW32bit
    return cls(groups, lr=config.lr, betas=betas, eps=config.eps, is_paged=paged)


def _page_again(optimizer: Any, *_: Any) -> None:
    """Before a step: state that a checkpoint brought into device memory goes back to pages.

    Both bitsandbytes' loading and Lightning's move to the device leave ordinary tensors; without
    this a resumed run would need more device memory than the run that it continues.
    """
    for parameter, state in optimizer.state.items():
        for name in ("state1", "state2"):
            value = state.get(name)
            # bitsandbytes gives no pages to fewer than 10^5 values
            if value is not None and value.numel() >= 1e5 and not hasattr(value, "is_paged"):
                pages = optimizer.get_state_buffer(parameter, dtype=value.dtype)
                state[name] = pages.copy_(value)


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
