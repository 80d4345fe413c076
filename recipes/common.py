"""What the training recipes share: data and module as the configuration describes them."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerFast

from data.module import TextDataModule
from qat.config import to_yaml
from qat.errors import resumable
from qat.module import CausalLMModule, Timing
from qat.rundir import run_directory
from recipes.config import RunConfig


@contextmanager
def own_directory(config: RunConfig) -> Iterator[Path]:
    """The run's directory for a block; what ends the block early says how to continue."""
    text = to_yaml(config)
    with run_directory(config.output_dir, config.resume, config.recipe, text) as directory:
        again = f"python train.py recipe={config.recipe} resume={directory}"
        with resumable(directory, again):
            yield directory


def new_data(config: RunConfig, tokenizer: PreTrainedTokenizerFast) -> TextDataModule:
    """The data module, its token caches filled."""
    data = TextDataModule(
        config.data,
        tokenizer,
        config.text,
        global_batch_size=config.trainer.global_batch_size,
        micro_batch_size=config.trainer.micro_batch_size,
        seed=config.seed,
    )
    data.setup("fit")
    return data


def new_module(config: RunConfig, model: PreTrainedModel) -> CausalLMModule:
    """The Lightning module; the baseline gets the same but for what `prepare` did."""
    freeze = config.scheme.observer.freeze_after_steps
    timing = Timing(
        enable_after_steps=config.scheme.enable_after_steps,
        freeze_after_steps=config.max_steps * 3 // 4 if freeze is None else freeze,
    )
    return CausalLMModule(
        model,
        config.optim,
        config.max_steps,
        config.seed,
        timing=timing,
        log_every_steps=config.trainer.log_every_steps,
    )
