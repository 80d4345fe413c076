"""The contestants of `recipes.benchmark_qlora`, each ready to train on the same random model."""

import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path

import torch
from peft import get_peft_model
from torch import Tensor, nn
from torch.optim import Optimizer
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from qat.adapters import prepare_adapters, target_names
from qat.fake_quant import set_enabled
from qat.loss import TokenLoss
from qat.models import recompute_activations
from qat.optim import build_optimizer
from qat.original import OriginalWeights
from qat.packing import Batch
from qat.prepare import KEEP_DTYPES
from recipes.config import AdapterBenchmarkConfig, Contestant


def device_of(config: AdapterBenchmarkConfig) -> torch.device:
    """Where the run computes."""
    if config.device == "auto":
        return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    return torch.device(config.device, 0) if config.device == "cuda" else torch.device("cpu")


def storage_of(config: AdapterBenchmarkConfig) -> torch.dtype:
    """Dtype of what is not 4-bit, for all contestants."""
    return torch.float32 if config.precision == "32-true" else KEEP_DTYPES[config.scheme.keep_dtype]


@dataclass(frozen=True)
class Entrant:
    """One contestant, ready to train."""

    model: nn.Module
    """In training mode."""
    mean_loss: Callable[[], Tensor]
    """Mean token loss of the batch in nats, fp32 scalar."""
    optimizer: Optimizer
    config: AdapterBenchmarkConfig
    """The run's."""
    merged: bool | None = None
    """Which form our layers compute in; None for the peer."""

    def loss(self) -> Tensor:
        """The same, in the run's arithmetic."""
        device = device_of(self.config).type
        with torch.autocast(device, torch.bfloat16, enabled=self.config.precision == "bf16-mixed"):
            return self.mean_loss()

    def step(self) -> float:
        """One optimizer step; seconds."""
        if self.merged is not None:
            set_enabled(self.model, self.merged)
        _synchronize()
        start = time.perf_counter()
        self.loss().backward()
        trained = [p for p in self.model.parameters() if p.requires_grad]
        torch.nn.utils.clip_grad_norm_(trained, self.config.optim.clip_norm or torch.inf)
        self.optimizer.step()
        self.optimizer.zero_grad()
        _synchronize()
        return time.perf_counter() - start


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def build_all(
    config: AdapterBenchmarkConfig, model: Path, kinds: list[Contestant]
) -> dict[Contestant, Entrant]:
    """The contestants; ours and merged are two forms of one model, which is built once."""
    entrants: dict[Contestant, Entrant] = {}
    ours: Entrant | None = None
    for kind in kinds:
        if kind == "peft":
            entrants[kind] = build(config, model, kind)
        else:
            ours = ours or build(config, model, kind)
            entrants[kind] = replace(ours, merged=kind == "merged")
    return entrants


def build(config: AdapterBenchmarkConfig, model: Path, kind: Contestant) -> Entrant:
    """One contestant, from the files of the random model."""
    batch = _batch(config)
    if kind == "peft":
        peer = _peer(config, model)
        # the model shifts the labels itself
        inputs = {"input_ids": batch["input_ids"], "labels": batch["input_ids"]}
        return Entrant(
            peer, lambda: peer(**inputs).loss, build_optimizer(peer, config.optim), config
        )
    original = OriginalWeights(str(model))
    ours, _ = prepare_adapters(
        original, config.adapter, config.scheme, config.seed, storage_of(config), device_of(config)
    )
    if config.activation_checkpointing:
        recompute_activations(ours, True)
    ours.train()
    token_loss = TokenLoss(config.loss_chunk)
    targets = int((batch["labels"] != -100).sum())
    return Entrant(
        ours,
        lambda: token_loss(ours, batch) / targets,
        build_optimizer(ours, config.optim),
        config,
        merged=kind == "merged",
    )


def _peer(config: AdapterBenchmarkConfig, model: Path) -> nn.Module:
    """As the users of transformers, PEFT and bitsandbytes write it."""
    adapter, device = config.adapter, device_of(config)
    bf16 = config.precision == "bf16-mixed"
    base = AutoModelForCausalLM.from_pretrained(
        model,
        dtype=storage_of(config),
        device_map={"": device},
        quantization_config=BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=adapter.base,
            bnb_4bit_use_double_quant=adapter.double_quant,
            bnb_4bit_compute_dtype=torch.bfloat16 if bf16 else torch.float32,
        ),
    )
    if device.type == "cpu":
        layer_type = import_module("bitsandbytes").nn.Linear4bit
        for layer in base.modules():
            if isinstance(layer, layer_type):
                layer.support_avx512bf16_for_cpu = False
    if config.activation_checkpointing:
        recompute_activations(base, True)
    # the very names, so that both have the same adapters
    targets = target_names(OriginalWeights(str(model)).skeleton(), adapter)
    with warnings.catch_warnings():
        # peft 0.21 asks by a name that transformers 5.23 calls old
        warnings.filterwarnings("ignore", ".*is_gradient_checkpointing", FutureWarning)
        peer: nn.Module = get_peft_model(base, adapter.peft(targets))
    return peer.train()


def _batch(config: AdapterBenchmarkConfig) -> Batch:
    """Full blocks of one document each; the last position of a block has no target."""
    device, size = device_of(config), (config.batch_size, config.seq_len)
    generator = torch.Generator().manual_seed(config.seed)
    tokens = torch.randint(config.shape.vocab_size, size, generator=generator).to(device)
    labels = tokens.roll(-1, 1)
    labels[:, -1] = -100
    return {
        "input_ids": tokens,
        "labels": labels,
        "position_ids": torch.arange(config.seq_len, device=device).expand(size),
        "segment_ids": torch.ones_like(tokens, dtype=torch.int32),
    }
