"""`fit`: one training phase through Lightning, resumable at any moment."""

import os
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from lightning import LightningDataModule, Trainer
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch.callbacks import Callback, TQDMProgressBar
from lightning.pytorch.loggers import Logger
from lightning.pytorch.strategies import DDPStrategy
from tqdm import tqdm
from transformers import PreTrainedModel

from qat.fake_quant import InputFakeQuant
from qat.loggers import MetricsCsv
from qat.loss import TokenLoss, forward_logits
from qat.models import recompute_activations
from qat.module import CausalLMModule
from qat.packing import Batch


@dataclass(frozen=True)
class TrainerConfig:
    """How the training loop runs."""

    accelerator: Literal["auto", "cpu", "gpu", "mps"] = "auto"
    """Where to train; auto takes a GPU if there is one."""
    devices: int = 1
    """Devices (processes) on each machine."""
    num_nodes: int = 1
    """Machines."""
    strategy: Literal["auto", "ddp"] = "auto"
    """How devices share the work."""
    precision: Literal["32-true", "bf16-mixed"] = "32-true"
    """Arithmetic of the matmuls; master weights, optimizer and quantizers are fp32 in both."""
    global_batch_size: int = 16
    """Blocks of an optimizer step, over all devices; does not change with their number."""
    micro_batch_size: int = 8
    """Blocks of one forward pass on one device; lower it when memory is short."""
    loss_chunk: int = 0
    """Positions whose logits exist at a time; 0 decides by size (all, up to 256 MiB in fp32)."""
    activation_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""
    checkpoint_every_steps: int = 100
    """Optimizer steps between two checkpoints."""
    validate_every_steps: int = 100
    """Optimizer steps between two validations."""
    log_every_steps: int = 1
    """Optimizer steps between two logged losses."""
    progress_bar: bool = True
    """Show the progress bar."""

    def __post_init__(self) -> None:
        """Raise ValueError for counts below one and for batches that do not divide."""
        for name in (
            "devices",
            "num_nodes",
            "global_batch_size",
            "micro_batch_size",
            "checkpoint_every_steps",
            "validate_every_steps",
            "log_every_steps",
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: at least 1")
        if self.loss_chunk < 0:
            raise ValueError(f"loss_chunk={self.loss_chunk}: at least 1, or 0 to decide by size")
        devices = self.devices * self.num_nodes
        if self.global_batch_size % (self.micro_batch_size * devices):
            raise ValueError(
                f"global_batch_size={self.global_batch_size}: must be a multiple of "
                f"micro_batch_size x devices = {self.micro_batch_size} x {devices}; lower "
                "trainer.micro_batch_size or change the batch"
            )


class Checkpoints(Callback):
    """Ends each optimizer step: the module's share, then ``last.ckpt`` when it is due.

    It is due every so many steps and at the last one; ``best.ckpt`` is kept if asked.

    A checkpoint of a step that validates is written after the validation, so that a run killed
    between the two does not lose the validation's rows. Files are replaced atomically.
    """

    def __init__(self, directory: Path, every: int, validate_every: int, keep_best: bool) -> None:
        self.directory = directory
        self.every = every
        self.validate_every = validate_every
        self.keep_best = keep_best
        self.best = float("inf")

    def state_dict(self) -> dict[str, Any]:
        """The best validation loss so far."""
        return {"best": self.best}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the best validation loss."""
        self.best = state_dict["best"]

    def on_load_checkpoint(self, trainer: Trainer, module: Any, checkpoint: dict[str, Any]) -> None:
        """Count micro-batches as this run makes them; before, they may have been other ones."""
        done = checkpoint["global_step"] * trainer.accumulate_grad_batches
        progress = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]
        for counts in (progress["total"], progress["current"]):
            shift = done - counts["ready"]
            for name in counts:
                counts[name] += shift

    def on_train_batch_end(self, trainer: Trainer, module: CausalLMModule, *args: Any) -> None:
        """End an optimizer step; save if that is due and the step does not validate."""
        batch_idx = args[-1]
        if (batch_idx + 1) % trainer.accumulate_grad_batches:
            return
        module.end_step()
        if trainer.global_step % self.validate_every:
            self._save_if_due(trainer)

    def on_validation_end(self, trainer: Trainer, *args: Any) -> None:
        """Save after the validation of a step that is due, and keep the best."""
        if trainer.state.fn != "fit" or trainer.sanity_checking:
            return
        loss = float(trainer.callback_metrics["val_loss"])
        if self.keep_best and loss < self.best:
            self.best = loss
            self._save(trainer, "best.ckpt")
        self._save_if_due(trainer)

    def _save_if_due(self, trainer: Trainer) -> None:
        step = trainer.global_step
        if step % self.every == 0 or step == trainer.max_steps:
            self._save(trainer, "last.ckpt")

    def _save(self, trainer: Trainer, name: str) -> None:
        temporary = self.directory / f".{name}.tmp"
        try:
            trainer.save_checkpoint(temporary, weights_only=False)
            if trainer.is_global_zero:
                with temporary.open("rb") as file:
                    os.fsync(file.fileno())
                os.replace(temporary, self.directory / name)
        except BaseException:
            temporary.unlink(missing_ok=True)  # half a file, most often because the disk is full
            raise
        trainer.strategy.barrier()


class DirectCheckpointIO(TorchCheckpointIO):
    """Writes checkpoints straight to their file; Lightning's own collects each in memory first."""

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None
    ) -> None:
        """Write what Lightning collected (the tensors themselves, no copies) to ``path``.

        Raises:
            RuntimeError: the disk is full; the OSError is its context.
        """
        # a file object: torch's writer for paths would not say why it failed
        with Path(path).open("wb") as file:
            torch.save(checkpoint, file)


def fit(
    module: CausalLMModule,
    data: LightningDataModule,
    config: TrainerConfig,
    directory: Path,
    loggers: list[Logger],
    keep_best: bool = False,
) -> None:
    """Train ``module`` for its ``max_steps``, from ``directory/last.ckpt`` if there is one.

    A phase that is already complete only loads its result. Afterwards the module holds the
    weights of the last step (or, with ``keep_best``, ``directory/best.ckpt`` has the best ones).

    Raises:
        RuntimeError: a gradient became NaN or infinite.
    """
    directory.mkdir(parents=True, exist_ok=True)
    module.token_loss = TokenLoss(config.loss_chunk)
    validate_every = min(config.validate_every_steps, module.max_steps)
    checkpoints = Checkpoints(directory, config.checkpoint_every_steps, validate_every, keep_best)
    trainer = _trainer(config, module.max_steps, checkpoints, loggers)
    trainer.val_check_interval = validate_every * trainer.accumulate_grad_batches
    if config.activation_checkpointing:
        recompute_activations(module.model, True)
    module.train()  # transformers loads models in eval mode
    last = directory / "last.ckpt"
    for logger in loggers:
        if isinstance(logger, MetricsCsv):
            logger.rewind(checkpoint_step(last))
    with warnings.catch_warnings():
        # lightning 2.6 walks through trees of tensors with a name that torch 2.13 calls old
        warnings.filterwarnings("ignore", ".*LeafSpec", FutureWarning)
        trainer.fit(module, data, ckpt_path=str(last) if last.exists() else None, weights_only=True)
    module.model.eval()
    # the trainer holds the optimizer's state, which nobody needs any more
    module.trainer, data.trainer = None, None


def _trainer(
    config: TrainerConfig, max_steps: int, checkpoints: Checkpoints, loggers: list[Logger]
) -> Trainer:
    """Lightning's trainer, set to the micro-batches that this number of devices makes."""
    callbacks: list[Callback] = [checkpoints]
    if config.progress_bar:
        callbacks.append(TQDMProgressBar(leave=True))
    trainer = Trainer(
        accelerator=config.accelerator,
        devices=config.devices,
        num_nodes=config.num_nodes,
        # buffers are equal on all ranks by construction (observers all-reduce), and broadcasting
        # them would hang when a rank has no validation block
        strategy=DDPStrategy(broadcast_buffers=False)
        if config.strategy == "ddp"
        else config.strategy,
        precision=config.precision,
        max_steps=max_steps,
        check_val_every_n_epoch=None,
        callbacks=callbacks,
        plugins=[DirectCheckpointIO()],
        logger=loggers,
        num_sanity_val_steps=0,
        enable_model_summary=False,
        enable_checkpointing=False,
        enable_progress_bar=config.progress_bar,
        use_distributed_sampler=False,
    )
    per_pass = config.micro_batch_size * trainer.world_size
    trainer.accumulate_grad_batches = config.global_batch_size // per_pass
    return trainer


def training_device(config: TrainerConfig) -> torch.device:
    """Where this process will train: so that a base can be built there right away."""
    if config.accelerator in ("auto", "gpu") and torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    return torch.device("cpu")


def checkpoint_step(path: Path) -> int:
    """Optimizer step of a checkpoint; 0 when there is none."""
    if not path.exists():
        return 0
    step: int = torch.load(path, map_location="meta", mmap=True, weights_only=True)["global_step"]
    return step


@torch.no_grad()
def calibrate(model: PreTrainedModel, batches: Sequence[Batch]) -> None:
    """Find the static input ranges of a prepared model from text; nothing to do without any.

    Each batch counts as one step of the observers' moving average; weights are already quantized,
    inputs are not.
    """
    static = [m for m in model.modules() if isinstance(m, InputFakeQuant) and m.observer]
    if not static:
        return
    was_training = model.training
    model.eval()
    for quantizer in static:
        quantizer.calibrating = True
    for batch in tqdm(batches, desc="calibrate", delay=2, leave=False):
        forward_logits(model, {name: value.to(model.device) for name, value in batch.items()})
        for quantizer in static:
            if quantizer.observer is not None:
                quantizer.observer.commit()
    for quantizer in static:
        quantizer.calibrating = False
    model.train(was_training)
