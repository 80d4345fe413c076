"""Peak memory and disk of a run: predicted without its weights, and measured beside it.

The prediction replays one training step on tensors without values (torch's fake tensors) and adds
up what is alive after each operation. So it follows whatever model, attention, loss and quantizer
do, and holds no table of activations. What the replay does not see is added by name:

    train    = weights + optimizer state + runtime + replay(gradients, activations, copies, logits)
    save     = weights + optimizer state + gradients + runtime
    load     = weights + the files that are read
    finish   = trained + original + one or two more models + reference logits + one evaluation batch

A run's peak is the largest phase. Measured figures are growth since before the model is loaded,
because on the CPU the imports alone are half a gigabyte.

Predictions are of tensors in use. On a CPU glibc keeps a part of what was freed, and runs leave it
alone (see `qat.memory_meter`): their resident memory was 15 to 23 % above the prediction at 112 M
parameters, and 538 MB where 265 were predicted for the training of the demo model, whose tensors
are small.
"""

from dataclasses import dataclass, field

import torch
from torch import nn
from transformers import PreTrainedModel

from qat.adapter_state import has_adapters
from qat.convert import SHARD_BYTES
from qat.evaluate import REFERENCE_BYTES, EvaluateConfig
from qat.fake_quant import Quantizer, set_enabled
from qat.memory_meter import TRIM_THRESHOLD
from qat.memory_replay import Replay, replay
from qat.optim import OptimConfig
from qat.prepare import Coverage
from qat.training import TrainerConfig

OPTIMIZER_STATES = {"adamw": 2, "lion": 1, "ademamix": 3}
"""State tensors of a parameter's shape, by optimizer."""
SMALLEST_8BIT = 4096
"""Values below which bitsandbytes keeps a parameter's state in fp32."""
BLOCK_8BIT = 256
"""Values that share one fp32 absmax in an 8-bit state."""
EVALUATION_LOGITS = 7
"""Tensors as large as a batch's logits in `qat.evaluate.measure`: logits of model and original,
their two log-softmax, and in ``kl_div`` an exponential, a difference and their product."""
RUNTIME_BYTES = (8 << 20) + TRIM_THRESHOLD
"""Beside tensors: 8 MiB for loops and for libraries loaded on first use (measured: what training a
model of 150,000 parameters adds to its tensors), and the free memory that the heap keeps at its end
when tensors in use are measured, `MemoryMeter(give_back=True)`. A run sets no such limit."""


def optimizer_bytes(model: nn.Module, optim: OptimConfig) -> int:
    """State of all trained parameters; see `OPTIMIZER_STATES` and the two constants after it."""
    kind = optim.name.removeprefix("paged_")
    states = OPTIMIZER_STATES[kind.removesuffix("_8bit")]
    total = 0
    for parameter in model.parameters():
        numel = parameter.numel()
        if not parameter.requires_grad:
            continue
        if optim.name == "adamw":
            total += states * numel * parameter.element_size()
        elif kind.endswith("_8bit") and numel >= SMALLEST_8BIT:
            total += states * (numel + 4 * -(-numel // BLOCK_8BIT))
        else:
            total += states * numel * 4
    return total


@dataclass(frozen=True)
class RunPlan:
    """What a prediction needs to know of a run beside its model."""

    seq_len: int
    """Tokens of a block."""
    max_steps: int
    """Optimizer steps."""
    trainer: TrainerConfig
    """Batch size, precision, checkpointing."""
    optim: OptimConfig
    """The optimizer."""
    file_dtype: torch.dtype = torch.bfloat16
    """Dtype of the original's files."""
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    """How much text is evaluated at the end."""
    finetunes: bool = False
    """Whether a 16-bit baseline is trained too."""
    storage: torch.dtype | None = None
    """Dtype in which frozen parameters are held; None: as the model has them."""
    merges: bool = False
    """Whether adapters train in their merged form, for a part of the run at least."""
    outputs: tuple[str, ...] = ()
    """What an adapter run writes beside the artifact: adapter, nf4, merged."""


@dataclass(frozen=True)
class Prediction:
    """Predicted peaks of one process, bytes."""

    weights: int
    """Parameters and buffers as training holds them."""
    gradients: int
    """Gradients of what is trained."""
    optimizer: int
    """Optimizer state."""
    copies: int
    """Quantized, rounded or dequantized weights alive at the peak, whatever the batch."""
    activations: int
    """Activations and logits of one micro-batch."""
    mapped: int
    """The original's files under adapters, memory-mapped; the system can take them back."""
    phases: dict[str, int]
    """Host memory (without CUDA: all memory) by phase: load, train, save, finish."""
    vram: int
    """Memory of the CUDA device; 0 when training runs on the host."""
    disk: int
    """Checkpoints and artifact of the run at their largest."""

    @property
    def ram(self) -> int:
        """Peak of the host's memory."""
        return max(self.phases.values())

    @property
    def memory(self) -> int:
        """What `MemoryMeter.peak` measures: device memory where there is a device."""
        return self.vram or self.ram

    def table(self) -> str:
        """One line per part of the training step, then the phases, in MiB."""
        rows = {
            "weights": self.weights,
            "gradients": self.gradients,
            "optimizer state": self.optimizer,
            "copies of weights": self.copies,
            "activations, logits": self.activations,
            "mapped files": self.mapped,
        }
        rows |= {f"phase {name}": value for name, value in self.phases.items()}
        rows |= {"predicted device memory": self.vram} if self.vram else {}
        rows |= {"predicted peak memory": self.ram, "predicted disk": self.disk}
        return "\n".join(f"{name:<26}{value / 2**20:>12,.1f} MiB" for name, value in rows.items())


def predict(model: PreTrainedModel, coverage: Coverage, plan: RunPlan) -> Prediction:
    """Predict the peaks of a run.

    Args:
        model: as training will hold it (prepared, with adapters, or plain), on the meta device;
            it is used up.
        coverage: its coverage.
        plan: the run.
    """
    for parameter in model.parameters():
        if plan.storage is not None and not parameter.requires_grad:
            parameter.data = parameter.data.to(plan.storage)
    file_bytes = sum(entry.numel for entry in coverage.entries) * plan.file_dtype.itemsize
    weights, gradients = tensor_bytes(model), gradient_bytes(model)
    optimizer = optimizer_bytes(model, plan.optim)
    mapped = file_bytes if has_adapters(model) else 0
    step, copies, forward = _replays(model, plan)
    held = weights + optimizer + mapped + RUNTIME_BYTES
    checkpoint = gradients + optimizer
    # a checkpoint goes to its file without a copy in memory, see `qat.training.DirectCheckpointIO`
    saved = held + (gradients if _saves_with_gradients(plan) else 0)
    train = held + step
    finish = _finish_bytes(model, coverage, plan, mapped, forward)
    phases = {"load": weights + file_bytes, "train": train, "save": saved, "finish": finish}
    vram = 0
    if plan.trainer.accelerator in ("auto", "gpu") and torch.cuda.is_available():
        vram = weights + optimizer + step
        # saving copies a tensor at a time to the host
        phases |= {"train": weights + RUNTIME_BYTES, "save": RUNTIME_BYTES + _largest(model)}
    return Prediction(
        weights=weights,
        gradients=gradients,
        optimizer=optimizer,
        copies=copies,
        activations=step - gradients - copies,
        mapped=mapped,
        phases=phases,
        vram=vram,
        disk=_disk_bytes(model, coverage, plan, checkpoint, gradients),
    )


def tensor_bytes(model: nn.Module, as_float: int | None = None) -> int:
    """Parameters and buffers of a model, shared ones once.

    Args:
        model: any module.
        as_float: bytes of a parameter's value; None: what it has.
    """
    parameters = {id(t): t for t in model.parameters()}.values()
    buffers = {id(t): t for t in model.buffers()}.values()
    return sum(p.numel() * (as_float or p.element_size()) for p in parameters) + sum(
        b.numel() * b.element_size() for b in buffers
    )


def gradient_bytes(model: nn.Module) -> int:
    """Gradients of a model's trained parameters."""
    return sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)


def _largest(model: nn.Module) -> int:
    """Bytes of the largest trained parameter, whose optimizer states are no larger than in fp32."""
    return max((4 * p.numel() for p in model.parameters() if p.requires_grad), default=0)


def _replays(model: PreTrainedModel, plan: RunPlan) -> tuple[int, int, int]:
    """(peak of a step, its share that no batch size changes, peak of an evaluation's forward)."""
    trainer, small = plan.trainer, Replay(1, 2)
    accumulates = trainer.global_batch_size > trainer.micro_batch_size * (
        trainer.devices * trainer.num_nodes
    )
    batch = Replay(
        trainer.micro_batch_size,
        plan.seq_len,
        bf16=trainer.precision == "bf16-mixed",
        recompute=trainer.activation_checkpointing,
        loss_chunk=trainer.loss_chunk,
        accumulates=accumulates,
    )
    forms = [False, True] if plan.merges else [None]
    gradients = gradient_bytes(model)
    best = (0, 0)
    for merged in forms:
        if merged is not None:
            set_enabled(model, merged)
        least = replay(model, small.like(batch)) - gradients
        best = max(best, (replay(model, batch), max(least, 0)))
    if any(isinstance(module, Quantizer) for module in model.modules()):
        set_enabled(model, True)
    evaluated = Replay(plan.evaluate.batch_size, plan.seq_len, train=False)
    return *best, replay(model, evaluated)


def _saves_with_gradients(plan: RunPlan) -> bool:
    """Whether a checkpoint is written at a step without a validation, which drops gradients."""
    trainer = plan.trainer
    every = min(trainer.validate_every_steps, plan.max_steps)
    saves = [*range(trainer.checkpoint_every_steps, plan.max_steps, trainer.checkpoint_every_steps)]
    return any(step % every for step in [*saves, plan.max_steps])


def _finish_bytes(
    model: PreTrainedModel, coverage: Coverage, plan: RunPlan, mapped: int, forward: int
) -> int:
    """Host memory of `qat.finish.finish`, at the largest of its ends.

    Conversion: the trained model and a shard. Packed rows: trained, original and reloaded model,
    and beside them what is read back: the packed model, the 4-bit one, the merged one. Baselines:
    trained, original, and a third model while its file is read (the fine-tuned one's checkpoint is
    fp32). The original's logits are kept; one batch is evaluated at a time. Everything is held in
    fp32 then, but for 4-bit and packed weights.
    """
    full = 4 * sum(entry.numel for entry in coverage.entries)
    trained = mapped + tensor_bytes(model, as_float=4)
    file_bytes: int = full // 4 * plan.file_dtype.itemsize
    logits: int = 4 * model.config.get_text_config().vocab_size
    kept_logits = plan.evaluate.max_tokens * logits
    if kept_logits > REFERENCE_BYTES:
        kept_logits = 0
    positions = min(plan.evaluate.batch_size * plan.seq_len, plan.evaluate.max_tokens)
    batch = max(forward, EVALUATION_LOGITS * positions * logits)
    read_back = artifact_bytes(coverage) + batch
    if "nf4" in plan.outputs:
        read_back = max(read_back, trained - mapped + batch)
    if "merged" in plan.outputs:
        read_back = max(read_back, full + max(batch, full // 2))
    reading = 0 if mapped else full if plan.finetunes else file_bytes
    convert = trained + min(artifact_bytes(coverage), SHARD_BYTES)
    packed = trained + 2 * full + read_back
    baselines = trained + 2 * full + max(reading, batch)
    return RUNTIME_BYTES + max(convert, kept_logits + max(packed, baselines))


def artifact_bytes(coverage: Coverage) -> int:
    """Weights of the artifact: codes with a 16-bit scale per group, and 16 bit for the rest."""
    total = 0.0
    for entry in coverage.entries:
        if entry.weight is None:
            total += 2 * entry.numel
            continue
        group = entry.weight.group_of(entry.shape[-1])
        total += entry.numel * (entry.weight.bits + 16 / group) / 8
    return int(total)


def _disk_bytes(
    model: PreTrainedModel, coverage: Coverage, plan: RunPlan, checkpoint: int, trained: int
) -> int:
    """The run's directory at its largest.

    That is while a checkpoint replaces an earlier one, both complete; or at the end, when artifact
    and outputs stand beside the checkpoints.
    """
    outputs = {
        "adapter": trained,
        "nf4": tensor_bytes(model, as_float=2) + trained // 2,
        "merged": 2 * sum(entry.numel for entry in coverage.entries),
    }
    written = artifact_bytes(coverage) + sum(outputs[name] for name in plan.outputs)
    replacing = checkpoint if plan.max_steps > plan.trainer.checkpoint_every_steps else 0
    return (2 if plan.finetunes else 1) * checkpoint + max(replacing, written)
