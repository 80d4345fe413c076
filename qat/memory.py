"""Peak memory and disk of a run, predicted from shapes; and the peak that was measured."""

import resource
import sys
from dataclasses import dataclass

import torch
from transformers import PreTrainedConfig

from qat.optim import OptimConfig
from qat.prepare import Coverage
from qat.training import TrainerConfig

OPTIMIZER_BYTES = {"adamw": 8.0, "adamw_8bit": 2.03, "lion_8bit": 1.02, "ademamix_8bit": 3.05}
"""Optimizer state per parameter; 8-bit states carry one fp32 scale per block of 256."""


@dataclass(frozen=True)
class Prediction:
    """Predicted peak of one training process, bytes."""

    parameters: int
    """fp32 master weights."""
    gradients: int
    """fp32 gradients."""
    optimizer: int
    """Optimizer state."""
    quantized_copies: int
    """Fake-quantized weights that live until the backward pass."""
    activations: int
    """Activations and logits of one micro-batch."""
    disk: int
    """Checkpoints, artifact and reports of the run."""

    @property
    def memory(self) -> int:
        """Sum of what is in memory at the peak."""
        return (
            self.parameters
            + self.gradients
            + self.optimizer
            + self.quantized_copies
            + self.activations
        )

    def table(self) -> str:
        """One line per part, in MiB."""
        rows = {
            "weights (fp32)": self.parameters,
            "gradients": self.gradients,
            "optimizer state": self.optimizer,
            "fake-quantized weights": self.quantized_copies,
            "activations, logits": self.activations,
            "predicted peak memory": self.memory,
            "predicted disk": self.disk,
        }
        return "\n".join(f"{name:<26}{value / 2**20:>12,.1f} MiB" for name, value in rows.items())


def predict(
    coverage: Coverage,
    shape: PreTrainedConfig,
    seq_len: int,
    trainer: TrainerConfig,
    optim: OptimConfig,
    checkpoints: int,
) -> Prediction:
    """Predict from shapes.

    Args:
        coverage: all parameters of the model.
        shape: the model's (text) configuration.
        seq_len: tokens per block.
        trainer: batch size, precision and checkpointing.
        optim: the optimizer's name.
        checkpoints: how many full checkpoints the run leaves (the 16-bit baseline keeps one too);
            one more is on the disk while it is being written.
    """
    hidden, layers, vocab = shape.hidden_size, shape.num_hidden_layers, shape.vocab_size
    intermediate = getattr(shape, "intermediate_size", None) or 4 * hidden
    numel = sum(entry.numel for entry in coverage.entries)
    quantized = sum(entry.numel for entry in coverage.quantized)
    tokens = trainer.micro_batch_size * seq_len
    width = 2 if trainer.precision == "bf16-mixed" else 4
    # per token and layer: inputs of the norms, q, k, v, attention output and residuals (about 10
    # hidden-sized tensors) and gate, up, their product and the activation in the MLP
    per_layer = tokens * (10 * hidden + 4 * intermediate) * width
    if trainer.activation_checkpointing:
        activations = layers * tokens * hidden * width + per_layer
    else:
        activations = layers * per_layer
    # logits in the matmul's dtype, in fp32, and their gradient
    logits = tokens * vocab * (width + 4 + 4)
    state = int(numel * OPTIMIZER_BYTES[optim.name])
    packed = sum(
        entry.numel * (entry.weight.bits + 0.5) / 8 for entry in coverage.quantized if entry.weight
    )
    disk = (checkpoints + 1) * (4 * numel + state) + int(packed) + 2 * (numel - quantized)
    return Prediction(
        parameters=4 * numel,
        gradients=4 * numel,
        optimizer=state,
        quantized_copies=quantized * width,
        activations=activations + logits,
        disk=disk,
    )


def peak_memory_bytes() -> int:
    """Measured peak: of the GPU's allocator where there is one, else of the resident process."""
    if torch.cuda.is_available():
        return int(torch.cuda.max_memory_allocated())
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
