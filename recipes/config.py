"""The configuration tree of each recipe; configs/*.yaml hold only what differs."""

import math
from dataclasses import dataclass, field
from typing import Literal

from qat.adapter_config import AdapterConfig
from qat.chat_config import ChatConfig
from qat.evaluate import EvaluateConfig
from qat.loggers import WandbConfig
from qat.optim import OptimConfig
from qat.scheme import Scheme
from qat.text import TextConfig
from qat.training import TrainerConfig


@dataclass(frozen=True)
class BaselinesConfig:
    """What the trained model is compared with."""

    finetune: bool | None = None
    """Train a 16-bit model on the same data, steps and seed, which doubles the training time; null
    does so for the demo model under qat recipes only."""


@dataclass(frozen=True)
class RunConfig:
    """Keys that every training recipe has."""

    recipe: str = ""
    """Name of the recipe."""
    model: str = "demo"
    """Local directory or Hugging Face id of a causal LM; demo is the built-in one."""
    data: str = "demo"
    """Text file, JSON lines or parquet file to train on; demo is the built-in corpus."""
    output_dir: str | None = None
    """Directory of the run; null takes a fresh runs/<recipe>-<number>."""
    max_steps: int = 200
    """Optimizer steps."""
    seed: int = 0
    """Seed of data order and random streams."""
    resume: str | None = None
    """Directory of an interrupted run to continue."""
    dry_run: bool = False
    """Print the configuration, the coverage and the predicted memory and disk; train nothing."""
    preset: list[str] = field(default_factory=list)
    """Files below configs/ to merge in, for example trainer/debug."""
    text: TextConfig = field(default_factory=TextConfig)
    """Reading and packing of the text."""
    scheme: Scheme = field(default_factory=Scheme)
    """What is quantized and how."""
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    """The training loop."""
    optim: OptimConfig = field(default_factory=OptimConfig)
    """Optimizer and schedule."""
    logger: Literal["wandb", "none"] = "wandb"
    """Beside metrics.csv: Weights & Biases (offline without a key), or nothing."""
    wandb: WandbConfig = field(default_factory=WandbConfig)
    """Weights & Biases."""

    def __post_init__(self) -> None:
        """Raise ValueError for a run that cannot do what it is asked to."""
        if self.max_steps < 1:
            raise ValueError(f"max_steps={self.max_steps}: at least 1")
        if not 0 <= self.seed < 2**31:
            raise ValueError(f"seed={self.seed}: from 0 to {2**31 - 1}")
        if self.optim.warmup_steps >= self.max_steps:
            raise ValueError(
                f"optim.warmup_steps={self.optim.warmup_steps}: below max_steps={self.max_steps}"
            )
        if self.scheme.enable_after_steps >= self.max_steps:
            raise ValueError(
                f"scheme.enable_after_steps={self.scheme.enable_after_steps}: below max_steps="
                f"{self.max_steps}, else nothing trains with quantization"
            )


@dataclass(frozen=True)
class FinetuneConfig(RunConfig):
    """Keys of the recipes that end in an artifact."""

    baselines: BaselinesConfig = field(default_factory=BaselinesConfig)
    """Comparisons in the report."""
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    """Evaluation after training."""
    prompt: str = "The module defines the following functions:"
    """Prompt of the sample in the report."""

    @property
    def finetunes(self) -> bool:
        """Whether the 16-bit baseline is trained."""
        if self.baselines.finetune is None:
            return self.model == "demo"
        return self.baselines.finetune


@dataclass(frozen=True)
class TrainConfig(FinetuneConfig):
    """Quantization-aware training."""


Output = Literal["adapter", "nf4", "merged"]


@dataclass(frozen=True)
class AdapterRunConfig(FinetuneConfig):
    """Adapters on a frozen base."""

    adapter: AdapterConfig = field(default_factory=AdapterConfig)
    """The frozen base and the adapters on it."""
    chat: ChatConfig = field(default_factory=ChatConfig)
    """Conversations and instructions: formats, template, what is trained on."""
    merge_share: float = 0.0
    """Share of the steps, at the end, that train the merged and quantized weights; 0: none."""
    min_gain_kept: float | None = 0.9
    """Least share of the training's gain that the artifact must keep, else the run fails; null
    accepts anything."""
    prompt: str = "Which module defines asyncio.Queue.join?"
    """Prompt of the sample in the report; with instruction data, a user's turn."""
    outputs: list[Output] | None = None
    """What is written beside the artifact: adapter (PEFT's format), nf4 (the 4-bit base in
    bitsandbytes' format, with the adapter), merged (16 bit). null: adapter, and nf4 where that is
    what was trained."""

    def __post_init__(self) -> None:
        """Raise ValueError for a run that cannot do what it is asked to."""
        super().__post_init__()
        if not 0 <= self.merge_share <= 1:
            raise ValueError(f"merge_share={self.merge_share}: between 0 and 1")
        if self.scheme.enable_after_steps:
            raise ValueError("scheme.enable_after_steps: adapters take merge_share instead")
        if "nf4" in (self.outputs or []) and not self.trains_nf4:
            raise ValueError(
                "outputs: nf4 is for runs that train on a 4-bit base to their end; this one has "
                f"adapter.base={self.adapter.base} and merge_share={self.merge_share}"
            )

    @property
    def trains_nf4(self) -> bool:
        """Whether the run ends on the 4-bit base with its adapter."""
        return self.adapter.base != "16bit" and self.merge_share == 0

    @property
    def written(self) -> list[Output]:
        """The outputs beside the artifact."""
        if self.outputs is not None:
            return self.outputs
        return ["adapter", "nf4"] if self.trains_nf4 else ["adapter"]

    @property
    def plain_steps(self) -> int:
        """Optimizer steps before the merged form sets in."""
        merged = math.ceil(self.max_steps * self.merge_share)
        return self.max_steps - merged

    @property
    def finetunes(self) -> bool:
        """Whether the 16-bit baseline is trained; only if it is asked for."""
        return bool(self.baselines.finetune)


@dataclass(frozen=True)
class ModelShape:
    """A Llama-architecture model built from scratch."""

    hidden_size: int = 256
    """Features between layers."""
    intermediate_size: int = 704
    """Features inside the MLP."""
    num_hidden_layers: int = 4
    """Decoder layers."""
    num_attention_heads: int = 4
    """Query heads."""
    num_key_value_heads: int = 2
    """Key and value heads."""
    vocab_size: int = 4096
    """Entries of the vocabulary."""
    max_position_embeddings: int = 1024
    """Longest context."""
    tie_word_embeddings: bool = True
    """Share the embedding with the output head."""
    attention_dropout: float = 0.0
    """Dropout of attention weights while training."""

    def __post_init__(self) -> None:
        """Raise ValueError for heads that do not divide what they share."""
        for name, part in (
            ("hidden_size", "num_attention_heads"),
            ("num_attention_heads", "num_key_value_heads"),
        ):
            if getattr(self, part) < 1 or getattr(self, name) % getattr(self, part):
                value = getattr(self, name)
                raise ValueError(f"{name}={value}: a multiple of {part}={getattr(self, part)}")


@dataclass(frozen=True)
class PretrainConfig(RunConfig):
    """Training the demo model from scratch; model and scheme are not used."""

    shape: ModelShape = field(default_factory=ModelShape)
    """The model."""


@dataclass(frozen=True)
class BenchmarkConfig:
    """Timing of a training step; prints, and writes nothing but a JSON file in output_dir."""

    recipe: str = ""
    """Name of the recipe."""
    output_dir: str | None = None
    """Directory for <recipe>.json; null only prints."""
    preset: list[str] = field(default_factory=list)
    """Files below configs/ to merge in."""
    shape: ModelShape = field(default_factory=ModelShape)
    """The model, randomly initialised."""
    scheme: Scheme = field(default_factory=Scheme)
    """The quantization to time."""
    optim: OptimConfig = field(default_factory=OptimConfig)
    """The optimizer."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to run; auto takes a GPU if there is one."""
    precision: Literal["32-true", "bf16-mixed"] = "32-true"
    """Arithmetic of the matmuls."""
    batch_size: int = 4
    """Blocks of a step."""
    seq_len: int = 512
    """Tokens of a block."""
    repeats: int = 5
    """Timed steps of each kind, in turn, after two that are not counted."""
    seed: int = 0
    """Seed of weights and tokens."""


Contestant = Literal["ours", "peft", "merged"]


@dataclass(frozen=True)
class AdapterBenchmarkConfig(BenchmarkConfig):
    """Timing of adapter training against transformers, PEFT and bitsandbytes.

    The random model is written to output_dir, or where temporary files go, and removed at the end:
    two bytes a parameter.
    """

    adapter: AdapterConfig = field(default_factory=AdapterConfig)
    """The 4-bit base and the adapters, the same for all."""
    contestants: list[Contestant] = field(default_factory=lambda: ["ours", "peft", "merged"])
    """Who takes part: ours, peft (plain transformers, PEFT and bitsandbytes), merged (ours, as it
    trains the merged low-bit weights)."""
    activation_checkpointing: bool = False
    """Recompute activations in the backward pass."""
    loss_chunk: int = 0
    """Positions whose logits exist at a time, for ours and merged; 0 decides by size."""

    def __post_init__(self) -> None:
        """Raise ValueError for what the contestants cannot all do in the same way."""
        if self.repeats < 1:
            raise ValueError(f"repeats={self.repeats}: at least 1")
        if self.batch_size < 1 or self.seq_len < 2:
            raise ValueError("batch_size: at least 1, and seq_len: at least 2")
        if not self.contestants:
            raise ValueError("contestants=[]: name ours, peft or merged")
        for name in ("hidden_size", "intermediate_size"):
            if getattr(self.shape, name) % 64:
                raise ValueError(
                    f"shape.{name}={getattr(self.shape, name)}: a multiple of 64; on CPUs with "
                    "AVX-512, bitsandbytes 0.50 takes wrong scales for rows that end within a block"
                )
        adapter = self.adapter
        if adapter.base == "16bit" or adapter.block_size != 64:
            raise ValueError(
                f"adapter.base={adapter.base} adapter.block_size={adapter.block_size}: "
                "transformers' BitsAndBytesConfig makes nf4 and fp4 in blocks of 64 only"
            )
        if adapter.init not in ("default", "gaussian", "orthogonal"):
            raise ValueError(
                f"adapter.init={adapter.init}: changes the base, which must be the same for all; "
                "take default, gaussian or orthogonal"
            )
        if adapter.modules_to_save or adapter.new_tokens:
            raise ValueError("adapter: modules_to_save and new_tokens are not compared here")
        if adapter.dropout or adapter.dtype != "float32":
            raise ValueError(
                "adapter.dropout, adapter.dtype: only 0 and float32, so that losses can be compared"
            )


@dataclass(frozen=True)
class DecodeBenchmarkConfig:
    """Timing of decoding from packed weights on the CPU, against plain transformers in bf16.

    The random model and its artifacts are written to output_dir, or where temporary files go, and
    removed at the end: four bytes a parameter.
    """

    recipe: str = ""
    """Name of the recipe."""
    output_dir: str | None = None
    """Directory for benchmark_decode.json, .csv and .png; null only prints."""
    preset: list[str] = field(default_factory=list)
    """Files below configs/ to merge in."""
    shape: ModelShape = field(default_factory=ModelShape)
    """The model, randomly initialised."""
    more_vocabularies: list[int] = field(default_factory=lambda: [128256])
    """The same model with these vocabularies, at batch 1: what the output head costs."""
    batches: list[int] = field(default_factory=lambda: [1, 8, 32])
    """Sequences that are decoded together."""
    check_batch: int = 16
    """Answers of a batch of this size are compared with those to single prompts."""
    prompt_tokens: int = 16
    """Tokens of the (longest) prompt."""
    new_tokens: int = 12
    """Tokens of an answer."""
    repeats: int = 5
    """Timed answers of each contestant, in turn, after one that is not counted."""
    seed: int = 0
    """Seed of weights and prompts."""

    def __post_init__(self) -> None:
        """Raise ValueError for a value outside its range."""
        for name in ("check_batch", "prompt_tokens", "repeats"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: at least 1")
        if self.new_tokens < 4:
            raise ValueError(f"new_tokens={self.new_tokens}: at least 4, of which two warm up")
        if not self.batches or min(self.batches) < 1:
            raise ValueError(f"batches={self.batches}: one or more, each at least 1")
        if any(v < 2 for v in (self.shape.vocab_size, *self.more_vocabularies)):
            raise ValueError("shape.vocab_size, more_vocabularies: at least 2")
        if self.shape.tie_word_embeddings:
            raise ValueError(
                "shape.tie_word_embeddings=true: false, since one contestant quantizes the head"
            )
        if self.prompt_tokens + self.new_tokens > self.shape.max_position_embeddings:
            raise ValueError(
                "prompt_tokens and new_tokens: together at most shape.max_position_embeddings="
                f"{self.shape.max_position_embeddings}"
            )
