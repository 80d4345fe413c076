"""Quantization-aware training: from a model and a text to a checked low-bit artifact."""

from dataclasses import asdict
from pathlib import Path

import torch
from lightning import seed_everything
from transformers import PreTrainedModel

from data.demo import model_path
from qat.compressed_tensors import layout
from qat.config import to_yaml
from qat.loggers import Loggers
from qat.memory import Prediction, predict
from qat.memory_advice import advised
from qat.memory_meter import MemoryMeter, release
from qat.models import load_config, load_model, load_tokenizer, meta_model
from qat.packing import check_packing
from qat.prepare import KEEP_DTYPES, Coverage, prepare
from qat.result import Stopwatch
from qat.rundir import is_rank_zero
from qat.training import calibrate, fit
from recipes.common import (
    finish_run,
    new_data,
    new_module,
    new_result,
    own_directory,
    run_plan,
)
from recipes.config import TrainConfig


def run(config: TrainConfig) -> None:
    """Run the recipe; see the module docstring and ``--help``."""
    if config.dry_run:
        coverage, prediction = foresee(config)
        print(to_yaml(config), coverage.summary(), "", prediction.table(), sep="\n")
        return
    with own_directory(config) as directory:
        _, prediction = foresee(config)
        with advised(prediction):
            train(config, directory, prediction)


def foresee(config: TrainConfig) -> tuple[Coverage, Prediction]:
    """Coverage and predicted memory, from shapes alone; raises what the run would raise."""
    path = model_path(config.model)
    model = meta_model(path)
    coverage = prepare(model, config.scheme)
    layout(coverage)
    return coverage, predict(model, coverage, run_plan(config, load_config(path).dtype))


def train(config: TrainConfig, directory: Path, prediction: Prediction) -> None:
    """Train, then finish on rank 0."""
    path = model_path(config.model)
    tokenizer = load_tokenizer(path, load_config(path).get_text_config().vocab_size)
    seed_everything(config.seed, verbose=False)
    watch = Stopwatch(MemoryMeter())
    with watch.phase("data"):
        data = new_data(config, tokenizer)
        check_model(config)
    loggers = Loggers(config.logger, config.wandb, directory, asdict(config))
    checkpoints = directory / "checkpoints"
    if config.finetunes:
        with watch.phase("finetune"):
            module = new_module(config, load_model(path))
            fit(module, data, config.trainer, checkpoints / "finetune", loggers.phase("finetune"))
            del module
    with watch.phase("train"):
        model = load_model(path)
        coverage = prepare(model, config.scheme)
        calibration = data.calibration_blocks(config.scheme.observer.calibration_blocks)
        calibrate(model, calibration)
        module = new_module(config, model)
        fit(module, data, config.trainer, checkpoints / "qat", loggers.phase("qat"))
    del module
    release(model)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    if not is_rank_zero():
        return
    result = new_result(config, directory, data, tokenizer, model, coverage, watch)
    result.calibration = calibration
    result.prediction = prediction
    if config.finetunes:
        result.load_finetuned = lambda: finetuned(config, checkpoints / "finetune")
    finish_run(result, loggers)


def check_model(config: TrainConfig) -> None:
    """Find out before any training whether the model can be packed, prepared and run."""
    model = load_model(model_path(config.model))
    check_packing(model, config.text.seq_len)
    prepare(model, config.scheme)
    with torch.no_grad():
        model(input_ids=torch.zeros((1, 2), dtype=torch.int64), use_cache=False)


def finetuned(config: TrainConfig, checkpoints: Path) -> PreTrainedModel:
    """The 16-bit baseline as it would be saved: fp32 arithmetic on values of the 16-bit grid."""
    model = load_model(model_path(config.model))
    saved = torch.load(checkpoints / "last.ckpt", map_location="cpu", mmap=True, weights_only=True)
    prefix = "model."
    model.load_state_dict(
        {name.removeprefix(prefix): value for name, value in saved["state_dict"].items()}
    )
    keep = KEEP_DTYPES[config.scheme.keep_dtype]
    with torch.no_grad():
        # parameters only: model.to() would round the rotary frequencies too, which are buffers
        for parameter in model.parameters():
            parameter.copy_(parameter.to(keep))
    return model
