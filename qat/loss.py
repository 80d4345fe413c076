"""The training loss: all logits at once, or a chunk of positions at a time for large vocabularies.

The logits of B x S positions are B·S·V values, three times over: as they come, in fp32, and their
gradient. With V = 128k and 4k positions that is 6 GiB. In chunks, the decoder runs as before; the
head then sees some positions at a time, and only those that have a target.

    L = sum_i  logsumexp(z_i) - z_i[t_i],     z_i = f(W x_i + b)

    dL/dx_i = W^T J_f^T (softmax(z_i) - onehot(t_i)),     dL/dW = the same terms, outer x_i, summed

The loss is a sum, so what comes from above is one number: the gradients of a chunk can be computed
right after its loss, while its logits exist, and be scaled in the backward pass. (Recomputing the
logits there instead, as activation checkpointing would, costs one more product with W: of four
instead of three, of three instead of two where W is frozen.) Liger-Kernel's fused cross-entropy
(arXiv:2410.10989) does the same with Triton; it runs where it is installed, on CUDA.

f is what some architectures do after the head (soft caps, scales). What `after_head` knows of it is
not trusted: `supports_chunked` compares with the model's own logits, and a model that does not
agree keeps its whole logits.

Legend: x [n, H] decoder states of the n positions with a target, H hidden size, V vocabulary.
"""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from lightning.fabric.utilities.rank_zero import rank_zero_only
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel

from qat.fake_quant import FakeQuantLinear
from qat.observers import RangeObserver
from qat.packing import Batch, attention_mask

log = logging.getLogger(__name__)

MAX_LOGITS = 2**26
"""Logits of a micro-batch above which they are computed in chunks: 256 MiB in fp32."""
MIN_ROWS = 256
"""Fewest positions of a chunk that the size decides: below, the product with W is inefficient."""


def forward_arguments(model: PreTrainedModel, batch: Batch) -> dict[str, Any]:
    """What the model, or its decoder, is called with; documents do not see each other."""
    return {
        "input_ids": batch["input_ids"],
        "attention_mask": attention_mask(batch["segment_ids"], model.config, model.dtype),
        "position_ids": batch["position_ids"],
        "use_cache": False,
    }


def forward_logits(model: PreTrainedModel, batch: Batch) -> Tensor:
    """Logits [B, S, V] of packed blocks; documents in a block do not see each other."""
    logits: Tensor = model(**forward_arguments(model, batch)).logits
    return logits


def loss_sum(logits: Tensor, labels: Tensor) -> Tensor:
    """Sum of the token losses in nats, fp32 scalar; logits [B, S, V], labels [B, S]."""
    return functional.cross_entropy(
        logits.flatten(0, 1).float(), labels.flatten(), ignore_index=-100, reduction="sum"
    )


def chunk_rows(loss_chunk: int, positions: int, vocab: int) -> int:
    """Positions whose logits exist at a time.

    Args:
        loss_chunk: the configured number; 0 decides by size.
        positions: of a micro-batch, B·S.
        vocab: V.

    Returns:
        ``positions`` when they are computed at once, else fewer.
    """
    if not loss_chunk:
        at_once = positions * vocab <= MAX_LOGITS
        loss_chunk = positions if at_once else max(MIN_ROWS, MAX_LOGITS // vocab)
    return min(loss_chunk, positions)


@dataclass(frozen=True)
class Head:
    """An output head, as a function of tensors whose gradients the loss computes itself."""

    tensors: tuple[Tensor, ...]
    """What ``logits`` computes with: W [V, H] and perhaps b [V], or a module's parameters."""
    logits: Callable[[Tensor, tuple[Tensor, ...]], Tensor]
    """(x [1, n, H], tensors) -> logits [1, n, V]; three axes, since quantizers want tokens."""
    plain: bool = False
    """Whether the logits are x W^T (+ b) and nothing else."""


def after_head(model: PreTrainedModel) -> Callable[[Tensor], Tensor] | None:
    """What the architecture does with the head's output, as far as known by its configuration."""
    config = model.config
    scale = getattr(config, "logit_scale", None)
    divisor = getattr(config, "logits_scaling", None)
    cap = getattr(config, "final_logit_softcapping", None)
    if scale is None and divisor is None and cap is None:
        return None

    def after(logits: Tensor) -> Tensor:
        if scale is not None:  # Cohere
            logits = logits * scale
        if divisor is not None:  # Granite
            logits = logits / divisor
        if cap is not None:  # Gemma
            logits = torch.tanh(logits / cap) * cap
        return logits

    return after


def head_of(model: PreTrainedModel) -> Head:
    """The model's head for one step: a quantized or rounded weight is computed here, once.

    A weight that trains stays in its own dtype, and autocast casts it for every chunk, so that the
    gradients of the chunks add up in that dtype. A frozen one is cast once.
    """
    module: Any = model.get_output_embeddings()
    chosen = getattr(module, "modules_to_save", None)
    if isinstance(chosen, nn.ModuleDict):  # PEFT's wrapper around a head that trains as a whole
        module = module if module.disable_adapters else chosen[module.active_adapters[0]]
    after = after_head(model)
    prepare_input = None
    weight: Any = None
    if module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module):
        pass  # hooked or wrapped: it must be called as it is
    elif isinstance(module, FakeQuantLinear):
        with torch.autocast(module.weight.device.type, enabled=False):
            weight = module.weight_fake_quant(module.weight)
        prepare_input = module.input_fake_quant
    elif isinstance(module, nn.Linear) and type(module).forward is nn.Linear.forward:
        weight = module.weight

    def logits(x: Tensor, tensors: tuple[Tensor, ...]) -> Tensor:
        if weight is None:
            made: Tensor = module(x)
        else:
            made = functional.linear(prepare_input(x) if prepare_input else x, *tensors)
        return after(made) if after else made

    if weight is None:
        return Head(tuple(p for p in module.parameters() if p.requires_grad), logits)
    bias: Tensor | None = module.bias
    tensors: tuple[Tensor, ...] = (weight,) if bias is None else (weight, bias)
    kind = weight.device.type
    if torch.is_autocast_enabled(kind):
        dtype = torch.get_autocast_dtype(kind)
        tensors = tuple(t if t.requires_grad else t.to(dtype) for t in tensors)
    return Head(tensors, logits, plain=after is None and prepare_input is None)


class _ChunkedLoss(torch.autograd.Function):
    """The sum of the token losses; computes its gradients while a chunk's logits exist."""

    @staticmethod
    def forward(
        ctx: Any, head: Head, rows: int, targets: Tensor, x: Tensor, *tensors: Tensor
    ) -> Tensor:
        """Sum of the losses, fp32 scalar; targets int64 [n], x [n, H], then ``head.tensors``."""
        wanted = ctx.needs_input_grad[3:]
        inputs = (x, *tensors)
        gradients = [torch.zeros_like(t) if w else None for t, w in zip(inputs, wanted)]
        # leaves stay what they are: a module that is called as it is computes with them
        leaves = tuple(
            t if t.is_leaf else t.detach().requires_grad_(w) for t, w in zip(tensors, wanted[1:])
        )
        total = torch.zeros((), device=x.device)
        for start in range(0, len(x), rows):
            part = slice(start, start + rows)
            with torch.enable_grad():
                x_part = x[part].detach().requires_grad_(wanted[0])
                loss = _one_chunk(head, x_part, targets[part], leaves)
            total += loss.detach()
            asked = [t for t, w in zip((x_part, *leaves), wanted) if w]
            # a module can have parameters that are switched off
            found = iter(torch.autograd.grad(loss, asked, allow_unused=True) if asked else ())
            if gradients[0] is not None:
                gradients[0][part] = next(found)
            for gradient in gradients[1:]:
                if gradient is not None and (term := next(found)) is not None:
                    gradient += term
        ctx.save_for_backward(*gradients)
        return total

    @staticmethod
    def backward(ctx: Any, *outputs: Tensor) -> tuple[Tensor | None, ...]:
        """Scale what the forward pass found, in place."""
        (scale,) = outputs
        scaled = (None if g is None else g.mul_(scale) for g in ctx.saved_tensors)
        return None, None, None, *scaled


def _one_chunk(head: Head, x: Tensor, targets: Tensor, tensors: tuple[Tensor, ...]) -> Tensor:
    """Sum of the losses of some positions."""
    kind = x.device.type
    # with autocast's cache all chunks would share one cast weight, and their gradients would add
    # up in its 16 bits
    with torch.autocast(kind, enabled=torch.is_autocast_enabled(kind), cache_enabled=False):
        return loss_sum(head.logits(x[None], tensors), targets[None])


def chunked_loss(head: Head, x: Tensor, targets: Tensor, rows: int) -> Tensor:
    """Sum of the token losses of positions that all have a target.

    Args:
        head: from `head_of`, in this step.
        x: [n, H] decoder states, n >= 0.
        targets: int64 [n].
        rows: positions whose logits exist at a time; chunks are made equally long.

    Returns:
        fp32 scalar.
    """
    chunks = -(-len(x) // rows)
    rows = -(-len(x) // chunks) if chunks else rows
    if torch.is_grad_enabled():
        total: Tensor = _ChunkedLoss.apply(head, rows, targets, x, *head.tensors)  # type: ignore[no-untyped-call]
        return total
    total = torch.zeros((), device=x.device)
    for start in range(0, len(x), rows):
        part = slice(start, start + rows)
        total += _one_chunk(head, x[part], targets[part], head.tensors)
    return total


def _vocab(model: PreTrainedModel) -> int:
    size: int = model.config.get_text_config().vocab_size
    return size


def _states(model: PreTrainedModel, batch: Batch) -> Tensor:
    """Decoder states [B, S, H]."""
    states: Tensor = model.get_decoder()(**forward_arguments(model, batch)).last_hidden_state
    return states


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode, afterwards every module's own mode again; no random number is drawn."""
    modes = [(part, part.training) for part in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for part, training in modes:
            part.training = training


@torch.no_grad()
def supports_chunked(model: PreTrainedModel) -> bool:
    """Whether decoder and head, called one after the other, are the whole model.

    Compares with the model's own forward pass on eight random tokens, in eval mode: the decoder's
    output is the head's input, and `head_of` gives the model's logits. Both with equality, for
    they are the same operations in the same order and shape. So a scale or cap that is overlooked
    is found however small its effect is today; a device that adds in no fixed order can fail and
    then only misses the saving. Leaves modes, weights and random streams as they were.
    """
    decoder, module = model.get_decoder(), model.get_output_embeddings()
    # an observer must see every position, not only those with a target
    if module is None or any(isinstance(part, RangeObserver) for part in module.modules()):
        return False
    seen: list[Any] = []
    hooks = [
        decoder.register_forward_hook(lambda _, args, out: seen.append(out.last_hidden_state)),
        module.register_forward_pre_hook(lambda _, args: seen.append(args[0])),
    ]
    batch = _random_batch(model)
    try:
        with _evaluating(model):
            logits = forward_logits(model, batch)
            for hook in hooks:
                hook.remove()
            states = _states(model, batch)
            head = head_of(model)
            same = len(seen) == 2 and all(torch.equal(states, tensor) for tensor in seen)
            return same and torch.equal(head.logits(states, head.tensors), logits)
    except (AttributeError, IndexError, TypeError):
        # a forward pass of another form: no decoder states by that name, a head called otherwise
        return False
    finally:
        for hook in hooks:
            hook.remove()


def _random_batch(model: PreTrainedModel) -> Batch:
    """One block of two documents of four tokens."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(_vocab(model), (1, 8), generator=generator)
    batch = {
        "input_ids": ids,
        "labels": ids.roll(-1, 1),
        "position_ids": torch.arange(4).repeat(2)[None],
        "segment_ids": torch.tensor([[0, 0, 0, 0, 1, 1, 1, 1]], dtype=torch.int32),
    }
    return {name: value.to(model.device) for name, value in batch.items()}


def liger_loss(head: Head, x: Tensor, targets: Tensor, rows: int = 0) -> Tensor:
    """`chunked_loss` by Liger-Kernel's Triton kernels, which choose the chunks themselves.

    Chosen on CUDA for a head without anything after it, where liger-kernel is installed.
    """
    module = import_module("liger_kernel.transformers.fused_linear_cross_entropy")
    make = module.LigerFusedLinearCrossEntropyLoss
    # old versions know no accum_dtype, and ignore the reduction: `supports_liger` refuses them
    fused = make(reduction="sum", accum_dtype=torch.float32)
    weight, *bias = head.tensors
    total: Tensor = fused(weight, x, targets, *bias)
    return total


def supports_liger(model: PreTrainedModel) -> bool:
    """Whether Liger's loss and gradients agree with `chunked_loss` here, on eight random tokens.

    Both round logits and their gradients to the compute dtype, of unit roundoff u, and nothing
    else to less than fp32: relative differences of norms stay near 2u, and 16u is the limit.
    """
    if model.device.type != "cuda" or find_spec("liger_kernel") is None:
        return False
    # validation runs in inference mode
    with torch.inference_mode(False), torch.enable_grad():
        if not head_of(model).plain:
            return False
        batch = _random_batch(model)
        with _evaluating(model), torch.no_grad():
            states = _states(model, batch).flatten(0, 1)
        made = []
        try:
            for function in (chunked_loss, liger_loss):
                head, x = head_of(model), states.clone().requires_grad_()
                loss = function(head, x, batch["labels"].flatten(), len(x))
                inputs = [x, *(t for t in head.tensors if t.requires_grad)]
                made.append((loss.detach(), *torch.autograd.grad(loss, inputs)))
        except Exception as error:  # whatever kernels of another project fail with
            log.warning("liger-kernel is not used, since its cross-entropy fails here: %s", error)
            return False
    dtype = torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else states.dtype
    # fp32 products may run in TF32, with 10 bits
    limit = 16 * max(torch.finfo(dtype).eps / 2, 2.0**-11)
    return all(float((b - a).norm()) <= limit * float(a.norm()) for a, b in zip(*made))


class TokenLoss:
    """The loss of a micro-batch, in chunks where that is asked for and possible.

    Args:
        chunk: positions whose logits exist at a time; 0 decides by size.
    """

    def __init__(self, chunk: int = 0) -> None:
        self.chunk = chunk
        self._function: Callable[[Head, Tensor, Tensor, int], Tensor] | None = None
        self._decided = False

    def __call__(self, model: PreTrainedModel, batch: Batch) -> Tensor:
        """Sum of the token losses in nats, fp32 scalar."""
        labels = batch["labels"]
        positions = labels.numel()
        rows = chunk_rows(self.chunk, positions, _vocab(model))
        if rows < positions and not self._decided:
            self._decide(model)
        if rows >= positions or self._function is None:
            return loss_sum(forward_logits(model, batch), labels)
        # before the forward pass is queued: this waits for the device
        chosen = (labels.flatten() != -100).nonzero().squeeze(1)
        x = _states(model, batch).flatten(0, 1)[chosen]
        function = self._function if len(chosen) else chunked_loss
        return function(head_of(model), x, labels.flatten()[chosen], rows)

    def _decide(self, model: PreTrainedModel) -> None:
        """Find out once what this model allows."""
        self._decided = True
        if not supports_chunked(model):
            rank_zero_only(log.warning)(
                f"trainer.loss_chunk: {type(model).__name__} makes its logits in a way of its own, "
                "so all of a micro-batch exist at once; lower trainer.micro_batch_size if memory "
                "is short"
            )
            return
        self._function = liger_loss if supports_liger(model) else chunked_loss
