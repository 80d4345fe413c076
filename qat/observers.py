"""Observers: how the range of a static activation quantizer is found, followed and frozen.

An observer works in two steps, so that a forward pass never changes the scale that it uses:
`observe` collects what the current optimizer step shows (idempotent, since activation
checkpointing runs a forward twice), `commit` folds it into the moving average once per step, after
an all-reduce over the processes. All state lives in buffers, which checkpoints carry.
"""

import torch
from torch import Tensor, nn

from qat.scheme import ObserverConfig
from qat_kernels import QuantSpec
from qat_kernels.numerics import scale_from_range


class RangeObserver(nn.Module):
    """Moving average of the largest magnitude of an activation, fp32 scalars.

    ``ema_minmax`` averages the extremes of each step. ``percentile`` averages the largest of the
    percentiles of |x| that the step's micro-batches show, so that it depends a little on how the
    step is split.
    """

    pending: Tensor
    """[2] lowest and highest value seen in the current step; (+inf, -inf) when nothing was."""
    range: Tensor
    """[2] moving average of (low, high)."""
    steps: Tensor
    """Number of steps folded in."""
    frozen: Tensor
    """True once the range must not move any more."""

    def __init__(self, config: ObserverConfig) -> None:
        super().__init__()
        self.config = config
        self.register_buffer("pending", torch.tensor([torch.inf, -torch.inf]))
        self.register_buffer("range", torch.zeros(2))
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))
        self.register_buffer("frozen", torch.zeros((), dtype=torch.bool))

    @torch.no_grad()
    def observe(self, x: Tensor) -> None:
        """Take note of an activation x, any shape."""
        x = x.detach().to(torch.float32)
        if self.config.kind == "percentile":
            # the k-th largest of |x|, because torch.quantile stops at 16 M values; the small term
            # keeps 0.01 % of 10,000 values from becoming 0.999...
            above = int(x.numel() * (1 - self.config.percentile / 100) + 1e-6)
            rank = min(above + 1, x.numel())
            high = torch.topk(x.abs().flatten(), rank).values[-1]
            low = -high
        else:
            low, high = torch.aminmax(x)
        self.pending[0] = torch.minimum(self.pending[0], low)
        self.pending[1] = torch.maximum(self.pending[1], high)

    @torch.no_grad()
    def commit(self) -> None:
        """Fold the step's range into the average; the first one is taken as it is.

        A step that showed nothing, or an infinite value, leaves the average alone.
        """
        seen = self.pending.clone()
        self.pending.copy_(torch.tensor([torch.inf, -torch.inf]))
        if bool(self.frozen):
            return
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            # the lowest value as the largest negative one: a single reduction for both
            signed = seen * seen.new_tensor([-1.0, 1.0])
            torch.distributed.all_reduce(signed, op=torch.distributed.ReduceOp.MAX)
            seen = signed * signed.new_tensor([-1.0, 1.0])
        if not bool(torch.isfinite(seen).all()):
            return
        if int(self.steps) == 0:
            self.range.copy_(seen)
        else:
            self.range.lerp_(seen, self.config.momentum)
        self.steps += 1

    def scale(self, spec: QuantSpec) -> Tensor:
        """fp32 scalar scale for the range observed so far."""
        return scale_from_range(self.range[0], self.range[1], spec)[0]
