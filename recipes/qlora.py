"""Adapters on a frozen base: from a model and instructions to a checked low-bit artifact.

Differs from `recipes.qat` in what prepares the model, and in what is written beside the artifact.
"""

from dataclasses import asdict, replace
from pathlib import Path

import torch
from lightning import seed_everything
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from qat.adapter_files import AdapterFiles, reload_nf4
from qat.adapter_state import base_sha256, in_fp32, stored_bytes, summary
from qat.compressed_tensors import layout
from qat.config import to_yaml
from qat.fake_quant import set_enabled
from qat.fidelity import reload
from qat.loggers import Loggers
from qat.memory import Prediction, predict
from qat.memory_advice import advised
from qat.memory_meter import MemoryMeter, release
from qat.packing import check_packing
from qat.prepare import Coverage
from qat.result import AdapterResult, Result, Stopwatch
from qat.rundir import is_rank_zero
from qat.training import calibrate, fit
from recipes.adapter_parts import Parts
from recipes.common import (
    finish_run,
    new_data,
    new_module,
    new_result,
    own_directory,
    run_plan,
)
from recipes.config import AdapterRunConfig


def run(config: AdapterRunConfig) -> None:
    """Run the recipe; see the module docstring and ``--help``."""
    if config.dry_run:
        coverage, text, prediction = foresee(Parts.load(config))
        print(to_yaml(config), coverage.summary(), text, "", prediction.table(), sep="\n")
        return
    with own_directory(config) as directory:
        parts = Parts.load(config)
        *_, prediction = foresee(parts)
        with advised(prediction):
            train(parts, directory, prediction)


def foresee(parts: Parts) -> tuple[Coverage, str, Prediction]:
    """Coverage, adapters and predicted memory, from shapes; raises what the run would raise."""
    config = parts.config
    model, coverage = parts.build(config.adapter, load=False)
    layout(coverage)
    plan = replace(
        run_plan(config, parts.original.dtype),
        storage=parts.storage,
        merges=config.merge_share > 0,
        outputs=tuple(config.written),
    )
    prediction = predict(model, coverage, plan)
    return coverage, summary(model, parts.keep), prediction


def train(parts: Parts, directory: Path, prediction: Prediction) -> None:
    """Train, then finish on rank 0."""
    config = parts.config
    seed_everything(config.seed, verbose=False)
    watch = Stopwatch(MemoryMeter())
    with watch.phase("data"):
        data = new_data(config, parts.tokenizer, config.chat)
        if data.chat is not None:
            # shipped with the model, so that it is served as it was trained
            parts.tokenizer.chat_template = data.chat.template.source
    checkpoints = directory / "checkpoints"
    loggers = Loggers(config.logger, config.wandb, directory, asdict(config))
    if config.finetunes:
        check_model(parts)
        with watch.phase("finetune"):
            model, _ = parts.build(parts.baseline)
            module = new_module(config, model, config.max_steps, base_sha256(model))
            fit(module, data, config.trainer, checkpoints / "finetune", loggers.phase("finetune"))
            del model, module
    with watch.phase("base"):
        model, coverage = parts.build(config.adapter)
        if data.chat is not None:
            stop_at(model, parts.tokenizer, data.chat.template.turn_ends)
        check_packing(model, config.text.seq_len)
        sha256 = base_sha256(model)
    calibration = data.calibration_blocks(config.scheme.observer.calibration_blocks)
    with watch.phase("train"):
        if config.merge_share:
            set_enabled(model, True)
            calibrate(model, calibration)
        module = new_module(config, model, config.plain_steps, sha256)
        fit(module, data, config.trainer, checkpoints / "adapter", loggers.phase("adapter"))
    del module
    release(model)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    if not is_rank_zero():
        return
    result = new_result(config, directory, data, parts.tokenizer, model, coverage, watch)
    result.calibration = calibration
    result.prediction = prediction
    result.load_original = parts.original.load
    if config.finetunes:
        result.load_finetuned = lambda: parts.finetuned(checkpoints / "finetune" / "last.ckpt")
    ship(parts, result, sha256)
    finish_run(result, loggers)


def ship(parts: Parts, result: Result, sha256: str) -> None:
    """Write what stands beside the artifact, and say in the result how to read it back."""
    config, model = parts.config, result.trained
    in_fp32(model)
    if not config.merge_share:
        set_enabled(model, True)
        calibrate(model, result.calibration)
    files = AdapterFiles(
        model,
        result.coverage,
        parts.original,
        config.adapter,
        parts.keep,
        parts.tokenizer,
        sha256,
        result.provenance,
    )
    with result.watch.phase("write"):
        files.write(config.written, result.run)
    result.adapters = adapter_result(config, files, result.run)


def check_model(parts: Parts) -> None:
    """Find out before the baseline trains whether the base can be made and run."""
    model, _ = parts.build(replace(parts.config.adapter, init="default"))
    check_packing(model, parts.config.text.seq_len)


def stop_at(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, ends: list[str]) -> None:
    """Let generation stop where the assistant's turn ends, as well as at the end of text."""
    known = model.generation_config.eos_token_id
    ids = known if isinstance(known, list) else [known]
    ids = [*ids, tokenizer.eos_token_id, *tokenizer.convert_tokens_to_ids(ends)]
    stops = sorted({int(i) for i in ids if i is not None})
    if stops:
        model.generation_config.eos_token_id = stops[0] if len(stops) == 1 else stops


def adapter_result(config: AdapterRunConfig, files: AdapterFiles, directory: Path) -> AdapterResult:
    """What the report says of the adapters, and how to read back what was written of them."""
    written = config.written
    return AdapterResult(
        trained_merged=config.merge_share > 0,
        min_gain_kept=config.min_gain_kept,
        bits_per_weight=files.bits,
        size_bytes=stored_bytes(files.model, files.keep),
        load_nf4=(lambda: reload_nf4(directory / "nf4")) if "nf4" in written else None,
        nf4_caveat=files.caveat() if "nf4" in written else None,
        load_merged=(lambda: reload(directory / "merged")) if "merged" in written else None,
        outputs=written,
        facts=files.facts() | {"merge_share": config.merge_share},
    )
