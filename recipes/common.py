"""What the training recipes share: data and module as the configuration describes them."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from data.chat import DEMO
from data.demo import model_path
from data.module import TextDataModule
from qat.chat_config import ChatConfig
from qat.config import load, to_yaml
from qat.errors import resumable
from qat.finish import finish
from qat.loggers import Loggers
from qat.memory import RunPlan
from qat.models import load_model
from qat.module import CausalLMModule, Timing
from qat.prepare import Coverage
from qat.provenance import command_line, git_state, public_config
from qat.report import table, verdict
from qat.result import Result, Stopwatch
from qat.rundir import run_directory
from recipes import CONFIGS, find
from recipes.config import FinetuneConfig, RunConfig


@contextmanager
def own_directory(config: RunConfig) -> Iterator[Path]:
    """The run's directory for a block; what ends the block early says how to continue."""
    text = to_yaml(config)
    git_state()  # now, since the checkout may move on while the run lasts
    with run_directory(config.output_dir, config.resume, config.recipe, text) as directory:
        again = f"python train.py recipe={config.recipe} resume={directory}"
        with resumable(directory, again):
            yield directory


def new_data(
    config: RunConfig, tokenizer: PreTrainedTokenizerFast, chat: ChatConfig | None = None
) -> TextDataModule:
    """The data module, its token caches filled; rows are conversations if ``chat`` is given."""
    data = TextDataModule(
        config.data,
        tokenizer,
        config.text,
        global_batch_size=config.trainer.global_batch_size,
        micro_batch_size=config.trainer.micro_batch_size,
        seed=config.seed,
        chat=chat,
    )
    data.setup("fit")
    return data


def new_module(
    config: RunConfig,
    model: PreTrainedModel,
    enable_after_steps: int | None = None,
    base_sha256: str | None = None,
) -> CausalLMModule:
    """The Lightning module; the baseline gets the same but for what `prepare` did.

    Args:
        config: the run's.
        model: what to train.
        enable_after_steps: the step at which quantizers are switched on; None takes the scheme's.
        base_sha256: identity of the frozen base under adapters.
    """
    freeze = config.scheme.observer.freeze_after_steps
    enable = config.scheme.enable_after_steps if enable_after_steps is None else enable_after_steps
    timing = Timing(
        enable_after_steps=enable,
        freeze_after_steps=config.max_steps * 3 // 4 if freeze is None else freeze,
    )
    return CausalLMModule(
        model,
        config.optim,
        config.max_steps,
        config.seed,
        timing=timing,
        log_every_steps=config.trainer.log_every_steps,
        base_sha256=base_sha256,
    )


def run_plan(config: FinetuneConfig, file_dtype: torch.dtype | None) -> RunPlan:
    """What the prediction of memory and disk needs to know of a run; file_dtype of the original."""
    return RunPlan(
        seq_len=config.text.seq_len,
        max_steps=config.max_steps,
        trainer=config.trainer,
        optim=config.optim,
        file_dtype=file_dtype or torch.float32,
        evaluate=config.evaluate,
        finetunes=config.finetunes,
    )


def new_result(
    config: FinetuneConfig,
    directory: Path,
    data: TextDataModule,
    tokenizer: PreTrainedTokenizerFast,
    trained: PreTrainedModel,
    coverage: Coverage,
    watch: Stopwatch,
) -> Result:
    """The result of a run, but for what its recipe knows: baselines, calibration, predictions."""
    evaluate = config.evaluate
    base = Path(model_path(config.model)).expanduser()
    return Result(
        run=directory,
        recipe=config.recipe,
        model=config.model,
        data=config.data,
        config=asdict(config),
        trained=trained,
        coverage=coverage,
        scheme=config.scheme,
        tokenizer=tokenizer,
        load_original=lambda: load_model(model_path(config.model)),
        load_finetuned=None,
        batches=data.validation_blocks(evaluate.max_tokens, evaluate.batch_size),
        calibration=[],
        data_fingerprint=data.fingerprint(),
        prompt=config.prompt,
        chat=data.chat is not None,
        data_summary=data.chat_summary(),
        data_class=data_class(config, data),
        base=base if base.is_dir() else None,
        # of the built-in model; of others their card may say it
        language="en" if config.model == DEMO else None,
        command=command(config),
        watch=watch,
    )


def data_class(config: RunConfig, data: TextDataModule) -> str:
    """What kind of text a run trains on, in words for the model card."""
    if config.data == DEMO:
        kind = "questions about" if data.chat else "documentation of"
        return f"built-in demo set: {kind} the Python standard library, in English"
    summary = data.chat_summary()
    if summary is None:
        return "plain text, given by the user as a file"
    return f"conversations ({summary['format']}), given by the user as a file"


def command(config: RunConfig) -> str:
    """The command that makes a run again, without local paths."""
    recipe = find(config.recipe)
    usual = load(recipe.schema(), [], [recipe.config_file], CONFIGS)
    return command_line(public_config(asdict(config)), public_config(asdict(usual)))


def finish_run(result: Result, loggers: Loggers) -> None:
    """Finish, print what came out, and log it."""
    report = finish(result)
    print(f"\n{report.scheme}\n\n{table(report)}\n\n{verdict(report)}\n")
    print(f"{report.sample['prompt']}{report.sample['continuation']}\n")
    print(f"report:   {result.run / 'report.md'}\nartifact: {result.run / 'artifact'}")
    rows: dict[str, float] = {f"{name}/loss": row.quality.loss for name, row in report.rows.items()}
    loggers.finish(result.run / "artifact", rows)
