"""The configuration of the frozen base and the adapters on it."""

import math
from dataclasses import dataclass, field
from typing import Literal

from peft import LoraConfig

from qat_kernels.nf4 import Spec4bit

Initialisation = Literal[
    "default", "gaussian", "orthogonal", "pissa", "pissa_niter_16", "olora", "loftq"
]

TAKES_FROM_BASE = ("pissa", "pissa_niter_16", "olora", "loftq")
"""Initialisations that move a part of the base into the adapter."""


@dataclass(frozen=True)
class AdapterConfig:
    """The frozen base and the adapters on it."""

    base: Literal["nf4", "fp4", "16bit"] = "nf4"
    """How linear layers of the base are held: 4-bit NormalFloat or float, or as they are."""
    block_size: int = 64
    """Weights that share one absmax in the 4-bit base: 32, 64, ... 4096."""
    double_quant: bool = True
    """Quantize the absmax values too (8 bits, blocks of 256): 4.13 instead of 4.5 bits."""
    rank: int = 16
    """Rank r of the adapters."""
    alpha: float = 32.0
    """Adapters are scaled by alpha / r, or alpha / sqrt(r) with rslora."""
    targets: list[str] = field(default_factory=lambda: ["all-linear"])
    """Layers that get an adapter: all-linear (but the head), names such as q_proj, or wildcards."""
    dropout: float = 0.0
    """Dropout of the adapters' inputs."""
    rslora: bool = False
    """Rank-stabilised scaling (arXiv:2312.03732)."""
    dora: bool = False
    """Weight-decomposed adapters (arXiv:2402.09353)."""
    init: Initialisation = "default"
    """default (B = 0), gaussian, orthogonal (BA = 0), pissa (arXiv:2404.02948), pissa_niter_16 (the
    same by a fast SVD), olora (arXiv:2406.01775), loftq (arXiv:2310.08659)."""
    loftq_iterations: int = 1
    """Alternations of quantizing and factorising; read only by init=loftq."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Dtype of the adapters' parameters."""
    modules_to_save: list[str] = field(default_factory=list)
    """Modules that are trained as a whole beside the adapters, for example lm_head."""
    new_tokens: list[str] = field(default_factory=list)
    """Special tokens to add; their rows of embedding and head are trained."""

    def __post_init__(self) -> None:
        """Raise ValueError for a value outside its range, or for what has no merged form."""
        if self.rank < 1:
            raise ValueError(f"rank={self.rank}: at least 1")
        if not 0 < self.alpha < math.inf:
            raise ValueError(f"alpha={self.alpha}: a finite number above 0")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout={self.dropout}: at least 0 and below 1")
        if self.loftq_iterations < 1:
            raise ValueError(f"loftq_iterations={self.loftq_iterations}: at least 1")
        if self.init == "loftq" and self.base == "16bit":
            raise ValueError("init=loftq: needs a 4-bit base; take base=nf4, or init=pissa")
        if self.dora and self.init in TAKES_FROM_BASE:
            raise ValueError(
                f"dora=true with init={self.init}: the norms would belong to another base; take "
                "init=default"
            )
        if not self.targets:
            raise ValueError("targets=[]: name layers, or all-linear")
        tokens = self.new_tokens
        if len(set(tokens)) < len(tokens) or not all(token.strip() for token in tokens):
            raise ValueError(f"new_tokens={tokens}: each a text of its own, none empty")
        self.spec()

    def spec(self) -> Spec4bit | None:
        """How the base is quantized; None for 16 bit."""
        if self.base == "16bit":
            return None
        return Spec4bit(self.base, self.block_size, self.double_quant)

    def peft(self, targets: list[str] | None = None) -> LoraConfig:
        """PEFT's configuration, with the resolved ``targets``."""
        inits = {"default": True, "loftq": True}
        return LoraConfig(
            r=self.rank,
            lora_alpha=self.alpha,
            target_modules=targets,
            lora_dropout=self.dropout,
            use_rslora=self.rslora,
            use_dora=self.dora,
            init_lora_weights=inits.get(self.init, self.init),
            task_type="CAUSAL_LM",
        )
