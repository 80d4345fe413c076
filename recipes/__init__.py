"""The registry of recipes: what ``python train.py recipe=NAME`` runs.

Entries name modules instead of importing them, so that listing the recipes needs no torch.
"""

import importlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qat.errors import UserError, did_you_mean

CONFIGS = Path(__file__).resolve().parent.parent / "configs"


@dataclass(frozen=True)
class Recipe:
    """One job: its configuration and the function that runs it."""

    name: str
    """Value of ``recipe=``."""
    summary: str
    """One line for the list of recipes."""
    schema_path: str
    """``module:Class`` of the configuration dataclass."""
    run_path: str
    """``module:function`` that takes the configuration and runs the job."""

    @property
    def config_file(self) -> Path:
        """The recipe's YAML deltas."""
        return CONFIGS / f"{self.name}.yaml"

    def schema(self) -> type:
        """Import and return the configuration dataclass."""
        schema: type = _import(self.schema_path)
        return schema

    def run(self, config: Any) -> None:
        """Import the recipe's module and run the job."""
        _import(self.run_path)(config)


_TRAIN = ("recipes.config:TrainConfig", "recipes.qat:run")
_ADAPTERS = ("recipes.config:AdapterRunConfig", "recipes.qlora:run")

RECIPES = {
    recipe.name: recipe
    for recipe in (
        Recipe("qat_int4", "quantization-aware training to packed int4 weights", *_TRAIN),
        Recipe("qat_int8", "quantization-aware training to int8 weights and inputs", *_TRAIN),
        Recipe("qlora_nf4", "LoRA adapters on a frozen NF4 base, merged once to int4", *_ADAPTERS),
        Recipe("qlora_int4", "the same, ending on the int4 weights that are shipped", *_ADAPTERS),
        Recipe("lora_bf16", "LoRA adapters on a 16-bit base, merged once to int4", *_ADAPTERS),
        Recipe(
            "pretrain_demo",
            "train the built-in demo model from scratch",
            "recipes.config:PretrainConfig",
            "recipes.pretrain:run",
        ),
        Recipe(
            "benchmark",
            "time and memory of a training step with and without quantization",
            "recipes.config:BenchmarkConfig",
            "recipes.benchmark:run",
        ),
        Recipe(
            "benchmark_qlora",
            "time and memory of adapter training against transformers, PEFT and bitsandbytes",
            "recipes.config:AdapterBenchmarkConfig",
            "recipes.benchmark_qlora:run",
        ),
        Recipe(
            "benchmark_decode",
            "decoding on the CPU from int4 and int8 artifacts against transformers in bf16",
            "recipes.config:DecodeBenchmarkConfig",
            "recipes.benchmark_decode:run",
        ),
    )
}


def find(name: str) -> Recipe:
    """The recipe of that name; UserError with the nearest name if there is none."""
    if name not in RECIPES:
        raise UserError(
            f"recipe={name}: no such recipe.{did_you_mean(name, RECIPES)} "
            f"There are: {', '.join(RECIPES)}"
        )
    return RECIPES[name]


def listing() -> str:
    """One line per recipe."""
    width = max(map(len, RECIPES))
    return "\n".join(f"  {name:{width}}  {r.summary}" for name, r in RECIPES.items())


def _import(path: str) -> Any:
    module, _, name = path.partition(":")
    return getattr(importlib.import_module(module), name)
