"""The Lightning module: one training step for plain, quantization-aware and static-W8A8 runs.

The three differ only in what `qat.prepare` did to the model. The loss of an optimizer step is the
mean over all its target tokens, on all devices and micro-batches together: each micro-batch's sum
is divided by the step's token count, which the data module puts into the batch. So the same step
comes out for every split into devices and micro-batches, up to the order of additions.

Whatever varies with time is a function of the optimizer step alone (random streams, the step where
fake-quantization sets in, the step where observers freeze), so that a resumed run cannot differ.

Batch (B blocks of S tokens): input_ids, labels, position_ids int64 [B, S]; labels are the next
tokens, -100 where there is none; segment_ids int32 [B, S]; loss_tokens int64 scalar.
"""

from dataclasses import dataclass
from typing import Any

import torch
from lightning import LightningModule
from torch import Tensor
from torch.optim import Optimizer
from transformers import PreTrainedModel

from qat.adapter_state import trained_state
from qat.errors import UserError
from qat.fake_quant import observers, set_enabled
from qat.loss import TokenLoss
from qat.optim import OptimConfig, build_optimizer, build_schedule
from qat.packing import Batch
from qat.trained import quantized_parameters
from qat_kernels import fake_quantize


@dataclass(frozen=True)
class Timing:
    """Optimizer steps at which the quantizers change."""

    enable_after_steps: int = 0
    """Fake-quantization is off before this step."""
    freeze_after_steps: int | None = None
    """Observers stop moving from this step on."""


@torch.no_grad()
def quantization_error(model: torch.nn.Module, active_only: bool = False) -> dict[str, float]:
    """Relative error ||w - w_hat|| / ||w|| of each quantized weight, by parameter name."""
    errors = {}
    for item in quantized_parameters(model, active_only):
        weight = item.weight.detach().float()
        difference = fake_quantize(weight, item.quantizer.spec).sub_(weight)
        errors[item.name] = float(difference.norm() / weight.norm().clamp_min(1e-30))
    return errors


class CausalLMModule(LightningModule):
    """Next-token training of a causal LM, prepared or plain.

    Args:
        model: the model, with fp32 master weights.
        optim: optimizer and schedule.
        max_steps: optimizer steps of the run (the length of the schedule).
        seed: seed of the random streams (dropout), one for each micro-batch and rank.
        timing: when quantizers change; ignored by a plain model.
        log_every_steps: optimizer steps between two logged losses.
        base_sha256: identity of the frozen base under adapters; None for a model that trains whole.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        optim: OptimConfig,
        max_steps: int,
        seed: int,
        timing: Timing | None = None,
        log_every_steps: int = 1,
        base_sha256: str | None = None,
    ) -> None:
        super().__init__()
        self.model = model
        self.optim = optim
        self.max_steps = max_steps
        self.seed = seed
        self.timing = timing or Timing()
        self.log_every_steps = log_every_steps
        self.token_loss = TokenLoss()
        self.step_loss: Tensor | float = 0.0
        self.grad_norm: Tensor | float = 0.0
        self.validation_sums = torch.zeros(2, dtype=torch.float64)
        self.base_sha256 = base_sha256
        if base_sha256 is not None:
            self.strict_loading = False  # checkpoints hold what trains, not the frozen base

    def configure_optimizers(self) -> dict[str, Any]:
        """The optimizer, and its schedule by optimizer step."""
        optimizer = build_optimizer(self.model, self.optim)
        schedule = build_schedule(optimizer, self.optim, self.max_steps)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": schedule, "interval": "step"},
        }

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """With adapters: keep what trains, and say which base it belongs to."""
        if self.base_sha256 is not None:
            names = {f"model.{name}" for name in trained_state(self.model)}
            state = checkpoint["state_dict"]
            checkpoint["state_dict"] = {name: state[name] for name in state if name in names}
            checkpoint["base_sha256"] = self.base_sha256

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """With adapters: refuse another base, or a checkpoint that lacks something.

        Raises:
            UserError: the frozen base is not the one that the checkpoint was trained on.
        """
        if self.base_sha256 is None:
            return
        saved = checkpoint.get("base_sha256", "none")
        if saved != self.base_sha256:
            raise UserError(
                f"resume: the base model is not the one that this run began with (sha256 "
                f"{self.base_sha256[:16]}…, the checkpoint has {saved[:16]}…). Restore the files "
                "that model= names; if they are the same, resume on the kind of device and CPU on "
                "which the run began (another one adds in another order); or start a new run"
            )
        missing = {f"model.{n}" for n in trained_state(self.model)} - checkpoint[
            "state_dict"
        ].keys()
        if missing:
            raise UserError(f"resume: the checkpoint lacks {sorted(missing)[0]}; start a new run")

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        """Set everything that depends on time from the step number."""
        accumulate = self.trainer.accumulate_grad_batches
        step, micro = self.global_step, batch_idx % accumulate
        stream = (step * accumulate + micro) * self.trainer.world_size + self.global_rank
        torch.manual_seed((self.seed << 32) ^ stream)
        if micro == 0:
            set_enabled(self.model, step >= self.timing.enable_after_steps)
            freeze = self.timing.freeze_after_steps
            for observer in observers(self.model):
                observer.frozen.fill_(freeze is not None and step >= freeze)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """The micro-batch's share of the step's mean token loss."""
        share = self.token_loss(self.model, batch) / batch["loss_tokens"]
        self.step_loss += share.detach()
        # Lightning divides by the micro-batches, DDP by the processes; the share needs neither
        loss: Tensor = share * (self.trainer.accumulate_grad_batches * self.trainer.world_size)
        return loss

    def configure_gradient_clipping(
        self,
        optimizer: Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip by norm, and keep the norm for the log."""
        limit = self.optim.clip_norm or torch.inf
        parameters = [p for p in self.model.parameters() if p.grad is not None]
        self.grad_norm = torch.nn.utils.clip_grad_norm_(parameters, limit)
        if not bool(torch.isfinite(self.grad_norm)):
            # before the optimizer spoils weights and state that the next checkpoint would keep
            raise RuntimeError(
                f"the gradient is not finite at step {self.global_step + 1}: training diverged. "
                "Lower optim.lr, raise optim.warmup_steps or lower optim.clip_norm in a new run"
            )

    def end_step(self) -> None:
        """At the end of an optimizer step: commit observers, log.

        Not Lightning's hook ``on_train_batch_end``: callbacks get theirs before the module does,
        and a checkpoint must hold what is done here.
        """
        for observer in observers(self.model):
            observer.commit()
        step = self.global_step
        if step % self.log_every_steps == 0 or step == self.max_steps:
            loss = float(self.trainer.strategy.reduce(self.step_loss, reduce_op="sum"))
            self.log("loss", loss, prog_bar=True, logger=False)
            # the schedule has already stepped; this step ran with the previous value
            factor = self.lr_schedulers().lr_lambdas[0](step - 1)
            self._write(
                {
                    "train_loss": loss,
                    "lr": self.optim.lr * factor,
                    "grad_norm": float(self.grad_norm),
                }
            )
        self.step_loss = 0.0

    def on_validation_start(self) -> None:
        """Start the sums anew."""
        self.validation_sums.zero_()

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Add one batch to the sums."""
        total = self.token_loss(self.model, batch)
        count = (batch["labels"] != -100).sum()
        self.validation_sums += torch.stack([total.double().cpu(), count.double().cpu()])

    def on_validation_epoch_end(self) -> None:
        """Validation loss over all processes, and the quantization error of each layer."""
        sums = self.trainer.strategy.reduce(
            self.validation_sums.to(self.device, torch.float32), reduce_op="sum"
        )
        loss = float(sums[0] / sums[1])
        self.log("val_loss", loss, prog_bar=True, logger=False, sync_dist=True)
        if self.trainer.is_global_zero:
            errors = quantization_error(self.model, active_only=True)
            self._write(
                {"val_loss": loss} | {f"quant_error/{name}": e for name, e in errors.items()}
            )

    def _write(self, metrics: dict[str, float]) -> None:
        for logger in self.trainer.loggers:
            logger.log_metrics(metrics, step=self.global_step)
