"""Quantization-aware training: from a model and a text to a checked low-bit artifact."""

from dataclasses import asdict
from pathlib import Path

import torch
from lightning import seed_everything
from transformers import PreTrainedModel

from data.demo import model_path
from data.module import TextDataModule
from qat.compressed_tensors import layout
from qat.config import to_yaml
from qat.errors import UserError, resumable
from qat.finish import Result, Stopwatch, finish, scheme_name
from qat.loggers import Loggers
from qat.memory import Prediction, predict
from qat.models import load_config, load_model, load_tokenizer, meta_model
from qat.module import CausalLMModule, Timing
from qat.packing import check_packing
from qat.prepare import KEEP_DTYPES, Coverage, plan, prepare
from qat.report import table, verdict
from qat.rundir import is_rank_zero, run_directory
from qat.training import calibrate, fit
from recipes.config import TrainConfig


def run(config: TrainConfig) -> None:
    """Run the recipe; see the module docstring and ``--help``."""
    if config.dry_run:
        coverage, prediction = foresee(config)
        print(to_yaml(config), coverage.summary(), "", prediction.table(), sep="\n")
        return
    with run_directory(
        config.output_dir, config.resume, config.recipe, to_yaml(config)
    ) as directory:
        again = f"python train.py recipe={config.recipe} resume={directory}"
        with resumable(directory, again):
            train(config, directory)


def foresee(config: TrainConfig) -> tuple[Coverage, Prediction]:
    """Coverage and predicted memory, from shapes alone; raises what the run would raise."""
    model = meta_model(model_path(config.model))
    positions = getattr(model.config, "max_position_embeddings", None)
    if positions is not None and config.text.seq_len > positions:
        raise UserError(
            f"text.seq_len={config.text.seq_len}: the model has {positions} positions; lower it"
        )
    coverage = plan(model, config.scheme)
    layout(coverage)
    shapes = model.config
    prediction = predict(
        coverage,
        hidden=shapes.hidden_size,
        intermediate=getattr(shapes, "intermediate_size", None) or 4 * shapes.hidden_size,
        layers=shapes.num_hidden_layers,
        vocab=shapes.vocab_size,
        seq_len=config.text.seq_len,
        trainer=config.trainer,
        optim=config.optim,
        checkpoints=2 if config.finetunes else 1,
    )
    return coverage, prediction


def train(config: TrainConfig, directory: Path) -> None:
    """Train, then finish on rank 0."""
    path = model_path(config.model)
    tokenizer = load_tokenizer(path, load_config(path).get_text_config().vocab_size)
    _, prediction = foresee(config)
    seed_everything(config.seed, verbose=False)
    watch = Stopwatch()
    with watch.phase("data"):
        data = TextDataModule(
            config.data,
            tokenizer,
            config.text,
            global_batch_size=config.trainer.global_batch_size,
            micro_batch_size=config.trainer.micro_batch_size,
            seed=config.seed,
        )
        data.setup("fit")
    loggers = Loggers(config.logger, config.wandb, directory, asdict(config))
    checkpoints = directory / "checkpoints"
    model = load_model(path)
    check_packing(model, config.text.seq_len)
    if config.finetunes:
        with watch.phase("finetune"):
            module = new_module(config, model)
            fit(module, data, config.trainer, checkpoints / "finetune", loggers.phase("finetune"))
    with watch.phase("train"):
        model = load_model(path)  # anew: the baseline has trained the first one
        coverage = prepare(model, config.scheme)
        calibration = data.calibration_blocks(config.scheme.observer.calibration_blocks)
        calibrate(model, calibration)
        module = new_module(config, model)
        fit(module, data, config.trainer, checkpoints / "qat", loggers.phase("qat"))
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    if not is_rank_zero():
        return
    report = finish(
        Result(
            run=directory,
            recipe=config.recipe,
            model=config.model,
            data=config.data,
            config=asdict(config),
            trained=model,
            coverage=coverage,
            scheme=config.scheme,
            tokenizer=tokenizer,
            load_original=lambda: load_model(path),
            load_finetuned=(lambda: finetuned(config, checkpoints / "finetune"))
            if config.finetunes
            else None,
            batches=data.validation_blocks(config.evaluate.max_tokens),
            calibration=calibration,
            data_fingerprint=data.fingerprint(),
            prompt=config.prompt,
            predicted_memory_bytes=prediction.memory,
            watch=watch,
        )
    )
    rows = {f"{name}/loss": row.quality.loss for name, row in report.rows.items()}
    loggers.finish(directory / "artifact", rows)
    print(f"\n{scheme_name(config.scheme)}\n\n{table(report)}\n\n{verdict(report)}\n")
    print(f"{report.sample['prompt']}{report.sample['continuation']}\n")
    print(f"report:   {directory / 'report.md'}\nartifact: {directory / 'artifact'}")


def new_module(config: TrainConfig, model: PreTrainedModel) -> CausalLMModule:
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


def finetuned(config: TrainConfig, checkpoints: Path) -> PreTrainedModel:
    """The 16-bit baseline as it would be saved: fp32 arithmetic on values of the 16-bit grid."""
    model = load_model(model_path(config.model))
    saved = torch.load(checkpoints / "last.ckpt", map_location="cpu", mmap=True, weights_only=True)
    prefix = "model."
    model.load_state_dict(
        {name.removeprefix(prefix): value for name, value in saved["state_dict"].items()}
    )
    return model.to(KEEP_DTYPES[config.scheme.keep_dtype]).to(torch.float32)
