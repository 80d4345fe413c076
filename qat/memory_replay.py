"""Bytes alive at the peak of a training step, from a step on tensors without values.

torch's fake tensors have shapes, dtypes and devices but no data. A dispatch mode sees each
operation below autograd and counts the storages that it makes until they are freed, so that the
count includes what is saved for the backward pass, gradients, and the temporaries of Python code.
Temporaries inside a kernel are invisible; the one that matters, the dequantized weight of a 4-bit
layer, is added. Quantizers of weights are replaced by stand-ins with the same input and output,
because they work through a weight in thousands of pieces.
"""

import weakref
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedModel

from qat.fake_quant import WeightFakeQuant
from qat.lora import MergedLinear
from qat.loss import chunk_rows, chunked_loss, forward_arguments, forward_logits, head_of, loss_sum
from qat.models import recompute_activations
from qat.packing import Batch


@dataclass(frozen=True)
class Replay:
    """What is replayed: a training step of one micro-batch, or a forward pass without gradients."""

    blocks: int
    """Text blocks B."""
    seq_len: int
    """Tokens of a block S."""
    train: bool = True
    """Forward and backward; else forward alone, in eval mode."""
    bf16: bool = False
    """Under autocast to bf16."""
    recompute: bool = False
    """Activation checkpointing."""
    loss_chunk: int = 0
    """See `qat.training.TrainerConfig`."""
    accumulates: bool = False
    """Whether gradients of an earlier micro-batch are there in the backward pass."""

    def like(self, other: "Replay") -> "Replay":
        """The other one at this one's size."""
        return replace(other, blocks=self.blocks, seq_len=self.seq_len)


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of storages made while it is active, until each is freed.

    Args:
        held: tensors that exist already; views of them count nothing.
    """

    def __init__(self, held: list[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live = 0
        self.peak = 0
        self._seen: dict[int, Any] = {}
        for tensor in held:
            self._add(tensor)
        self.live = self.peak = 0

    def _add(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = id(storage), storage.nbytes()
        if key in self._seen:
            return

        def freed(_: Any) -> None:
            self.live -= size
            del self._seen[key]

        self._seen[key] = weakref.ref(storage, freed)
        self.live += size
        self.peak = max(self.peak, self.live)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run one operation and count what it made."""
        if func is torch.ops.aten._grouped_mm.default:
            out = _grouped_mm(*args, **(kwargs or {}))
        else:
            out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self._add(tensor)
        if func.namespace == "qat_kernels":
            self.peak = max(self.peak, self.live + _dequantized(args, out))
        return out


def _grouped_mm(a: Tensor, b: Tensor, offs: Tensor | None = None, *_: Any, **__: Any) -> Tensor:
    """Result of the product of experts' groups; torch's own rule for fake tensors wants bf16.

    [T, K] x [E, K, N] -> [T, N];  [E, M, K] x [K, T] -> [M, T];  [M, T] x [T, N] -> [E, M, N].
    """
    shape = [a.shape[-2], b.shape[-1]]
    if a.ndim == b.ndim:
        shape.insert(0, len(offs) if offs is not None and a.ndim == 2 else a.shape[0])
    return torch.empty(shape, dtype=a.dtype, device=a.device)


def _dequantized(args: Any, out: Tensor) -> int:
    """Bytes of the weight that an operator on 4-bit codes makes and forgets.

    In its own dtype, and in that of the product where they differ. The operator that only
    dequantizes returns its weight, which is counted already.
    """
    leaves = tree_leaves(args)
    codes = max(t.numel() for t in leaves if isinstance(t, Tensor) and t.dtype == torch.uint8)
    made = next(dtype for dtype in reversed(leaves) if isinstance(dtype, torch.dtype))
    sizes = {made, out.dtype}
    if 2 * codes <= out.numel() + 1:
        return 0
    return 2 * codes * sum(dtype.itemsize for dtype in sizes)


def replay(model: PreTrainedModel, step: Replay) -> int:
    """Bytes alive at the peak of a step beside weights, buffers and optimizer state.

    Gradients are included; those of the step before are alive in the forward pass, as Lightning
    clears them right before the backward pass.

    Args:
        model: on the meta device, or already made fake by an earlier call; its weights are replaced
            by fake ones.
        step: what to replay.
    """
    mode = _mode_of(model)
    with mode:
        held = _make_fake(model)
        shape = (step.blocks, step.seq_len)
        ids = torch.zeros(shape, dtype=torch.int64)
        batch = dict.fromkeys(("input_ids", "labels", "position_ids"), ids)
        batch["segment_ids"] = torch.zeros(shape, dtype=torch.int32)
        live = LiveBytes([*held, ids, batch["segment_ids"]])
        with live:
            if step.train:
                _train(model, batch, step)
            else:
                _evaluate(model, batch)
    return live.peak


def _train(model: PreTrainedModel, batch: Batch, step: Replay) -> None:
    model.train()
    trained = [p for p in model.parameters() if p.requires_grad]
    for parameter in trained:
        parameter.grad = torch.empty_like(parameter)
    # on only for this step: the forward pass in evaluation knows nothing of it
    if step.recompute:
        recompute_activations(model, True)
    with torch.autocast("cpu", torch.bfloat16, enabled=step.bf16):
        loss = _loss(model, batch, step.loss_chunk)
    if not step.accumulates:
        model.zero_grad()
    loss.backward()
    model.zero_grad()
    if step.recompute:
        recompute_activations(model, False)


@torch.no_grad()
def _evaluate(model: PreTrainedModel, batch: Batch) -> None:
    model.eval()
    forward_logits(model, batch)


def _loss(model: PreTrainedModel, batch: Batch, loss_chunk: int) -> Tensor:
    """As `qat.loss.TokenLoss`, with a target at each position."""
    labels = batch["labels"]
    rows = chunk_rows(loss_chunk, labels.numel(), model.config.get_text_config().vocab_size)
    if rows < labels.numel():
        # a model without these two makes its logits at once, in training too
        with suppress(AttributeError, TypeError):
            decoder: Any = model.get_decoder()
            states = decoder(**forward_arguments(model, batch)).last_hidden_state
            return chunked_loss(head_of(model), states.flatten(0, 1), labels.flatten(), rows)
    return loss_sum(forward_logits(model, batch), labels)


# --- fake weights --------------------------------------------------------------------------------


def _mode_of(model: nn.Module) -> FakeTensorMode:
    """The mode of a model that is fake already, or a new one."""
    mode: Any = getattr(next(model.parameters()), "fake_mode", None)
    # a constant that some model's code makes on the fly is a real tensor
    return mode or FakeTensorMode(allow_non_fake_inputs=True)


def _make_fake(model: nn.Module) -> list[Tensor]:
    """Replace parameters and buffers by fake ones on the CPU, shared ones once; the fake ones."""
    made: dict[int, tuple[Tensor, Tensor]] = {}

    def fake(tensor: Tensor) -> Tensor:
        if hasattr(tensor, "fake_mode"):
            made.setdefault(id(tensor), (tensor, tensor))
        elif id(tensor) not in made:
            value = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")
            if isinstance(tensor, nn.Parameter):
                value = nn.Parameter(value, tensor.requires_grad)
            made[id(tensor)] = (value, tensor)
        return made[id(tensor)][0]

    for module in model.modules():
        tables: tuple[dict[str, Any], ...] = (module._parameters, module._buffers)
        for table in tables:
            for name, tensor in table.items():
                table[name] = None if tensor is None else fake(tensor)
        if isinstance(module, WeightFakeQuant):
            module.forward = _StandIn(module)  # type: ignore[method-assign]
        if isinstance(module, MergedLinear):
            module.master = _master(module)
    return [value for value, _ in made.values()]


class _StandIn:
    """A weight's quantizer without its arithmetic; the same tensors before and after it."""

    def __init__(self, quantizer: WeightFakeQuant) -> None:
        self.quantizer = weakref.proxy(quantizer)

    def __call__(self, w: Tensor) -> Tensor:
        """A tensor like w, in autocast's dtype where that is on."""
        if not self.quantizer.active:
            return w
        autocast = torch.is_autocast_enabled(w.device.type)
        dtype = torch.get_autocast_dtype(w.device.type) if autocast else w.dtype
        result: Tensor = _Copy.apply(w, dtype)  # type: ignore[no-untyped-call]
        return result


class _Copy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, w: Tensor, dtype: torch.dtype) -> Tensor:
        ctx.save_for_backward(w)
        return torch.empty_like(w, dtype=dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (w,) = ctx.saved_tensors
        return torch.empty_like(grads[0].to(w.dtype)), None


def _master(layer: MergedLinear) -> Callable[[], Tensor]:
    """The 16-bit weight that is read from disk, without its values."""
    base: Any = layer.base_layer
    shape = (base.out_features, base.in_features)
    return lambda: torch.empty(shape, dtype=torch.bfloat16)
