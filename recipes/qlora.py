"""Adapters on a frozen base: from a model and instructions to a checked low-bit artifact.

Differs from `recipes.qat` in what prepares the model, and in what is written beside the artifact.
"""

from dataclasses import asdict, replace
from pathlib import Path

import torch
from lightning import seed_everything
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from data.demo import model_path
from qat.adapter_files import AdapterFiles, reload_nf4
from qat.adapters import (
    AdapterConfig,
    base_bits,
    base_sha256,
    prepare_adapters,
    stored_bytes,
    trained_state,
)
from qat.artifact import staged_directory
from qat.compressed_tensors import layout
from qat.config import to_yaml
from qat.fake_quant import set_enabled
from qat.finish import AdapterResult, Result, Stopwatch
from qat.loggers import Loggers
from qat.memory import Prediction, RunPlan, predict
from qat.models import BITSANDBYTES, load_config, load_model, load_tokenizer
from qat.original import OriginalWeights
from qat.packing import check_packing
from qat.prepare import KEEP_DTYPES, Coverage
from qat.report import environment
from qat.rundir import is_rank_zero
from qat.training import calibrate, fit, training_device
from recipes.common import finish_run, new_data, new_module, own_directory
from recipes.config import AdapterRunConfig


def run(config: AdapterRunConfig) -> None:
    """Run the recipe; see the module docstring and ``--help``."""
    if config.dry_run:
        _, original, _ = load_parts(config)
        coverage, prediction = foresee(config, original)
        print(to_yaml(config), coverage.summary(), "", prediction.table(), sep="\n")
        return
    with own_directory(config) as directory:
        train(config, directory)


def load_parts(
    config: AdapterRunConfig,
) -> tuple[PreTrainedTokenizerFast, OriginalWeights, list[int]]:
    """Tokenizer with the new tokens, the original weights, and the ids of the new tokens."""
    path = model_path(config.model)
    shape = load_config(path, allow=BITSANDBYTES).get_text_config()
    tokenizer = load_tokenizer(path, shape.vocab_size)
    new = config.adapter.new_tokens
    if new:
        tokenizer.add_special_tokens({"additional_special_tokens": new})
    return (
        tokenizer,
        OriginalWeights(path, rows=len(tokenizer) if new else 0),
        [int(i) for i in tokenizer.convert_tokens_to_ids(new)],
    )


def foresee(config: AdapterRunConfig, original: OriginalWeights) -> tuple[Coverage, Prediction]:
    """Coverage and predicted memory, from shapes alone; raises what the run would raise."""
    model, coverage = prepare_adapters(original, config.adapter, config.scheme, 0, load=False)
    layout(coverage)
    keep = KEEP_DTYPES[config.scheme.keep_dtype]
    prediction = predict(
        model,
        coverage,
        RunPlan(
            seq_len=config.text.seq_len,
            max_steps=config.max_steps,
            trainer=config.trainer,
            optim=config.optim,
            file_dtype=original.dtype,
            evaluate=config.evaluate,
            finetunes=config.finetunes,
            storage=torch.float32 if config.trainer.precision == "32-true" else keep,
            merges=config.merge_share > 0,
            outputs=tuple(config.written),
        ),
    )
    return coverage, prediction


def train(config: AdapterRunConfig, directory: Path) -> None:
    """Train, then finish on rank 0."""
    tokenizer, original, new_rows = load_parts(config)
    _, prediction = foresee(config, original)
    seed_everything(config.seed, verbose=False)
    watch = Stopwatch()
    with watch.phase("data"):
        data = new_data(config, tokenizer, config.chat)
        if data.chat is not None:
            # shipped with the model, so that it is served as it was trained
            tokenizer.chat_template = data.chat.template.source
    checkpoints = directory / "checkpoints"
    loggers = Loggers(config.logger, config.wandb, directory, asdict(config))
    full = replace(config.adapter, base="16bit", init="default")
    if config.finetunes:
        with watch.phase("finetune"):
            model, _ = build(config, full, original, new_rows)
            module = new_module(config, model, config.max_steps, base_sha256(model))
            fit(module, data, config.trainer, checkpoints / "finetune", loggers.phase("finetune"))
            del model, module
    with watch.phase("base"):
        model, coverage = build(config, config.adapter, original, new_rows)
        check_packing(model, config.text.seq_len)
        sha256 = base_sha256(model)
    calibration = data.calibration_blocks(config.scheme.observer.calibration_blocks)
    with watch.phase("train"):
        if config.merge_share:
            set_enabled(model, True)
            calibrate(model, calibration)
        module = new_module(config, model, config.plain_steps, sha256)
        fit(module, data, config.trainer, checkpoints / "adapter", loggers.phase("adapter"))
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    if not is_rank_zero():
        return
    in_fp32(model)
    if not config.merge_share:
        set_enabled(model, True)
        calibrate(model, calibration)
    keep = KEEP_DTYPES[config.scheme.keep_dtype]
    provenance = {
        "recipe": config.recipe,
        "model": config.model,
        "data": config.data,
        "data_fingerprint": data.fingerprint(),
        "config": asdict(config),
        "environment": environment(),
    }
    files = AdapterFiles(
        model, coverage, original, config.adapter, keep, tokenizer, sha256, provenance
    )
    with watch.phase("write"):
        write_outputs(config, files, directory)
    evaluate = config.evaluate
    result = Result(
        run=directory,
        recipe=config.recipe,
        model=config.model,
        data=config.data,
        config=asdict(config),
        trained=model,
        coverage=coverage,
        scheme=config.scheme,
        tokenizer=tokenizer,
        load_original=original.load,
        load_finetuned=(lambda: finetuned(config, full, original, new_rows, checkpoints))
        if config.finetunes
        else None,
        batches=data.validation_blocks(evaluate.max_tokens, evaluate.batch_size),
        calibration=calibration,
        data_fingerprint=data.fingerprint(),
        prompt=config.prompt,
        chat=data.chat is not None,
        data_summary=data.chat_summary(),
        predicted_memory_bytes=prediction.memory,
        adapters=adapter_result(config, files, directory),
        watch=watch,
    )
    finish_run(result, loggers)


def build(
    config: AdapterRunConfig,
    adapter: AdapterConfig,
    original: OriginalWeights,
    new_rows: list[int],
) -> tuple[PreTrainedModel, Coverage]:
    """The base with its adapters, where it will be trained."""
    keep = KEEP_DTYPES[config.scheme.keep_dtype]
    storage = torch.float32 if config.trainer.precision == "32-true" else keep
    device = training_device(config.trainer)
    return prepare_adapters(
        original, adapter, config.scheme, config.seed, storage, device, new_rows
    )


def in_fp32(model: PreTrainedModel) -> None:
    """Hold what was stored in 16 bit in fp32, for exact measurement; no value changes."""
    for parameter in model.parameters():
        parameter.data = parameter.data.float()


def finetuned(
    config: AdapterRunConfig,
    adapter: AdapterConfig,
    original: OriginalWeights,
    new_rows: list[int],
    checkpoints: Path,
) -> PreTrainedModel:
    """The 16-bit baseline: its adapters on the 16-bit base."""
    model, _ = build(config, adapter, original, new_rows)
    path = checkpoints / "finetune" / "last.ckpt"
    saved = torch.load(path, map_location="cpu", mmap=True, weights_only=True)["state_dict"]
    state = {name.removeprefix("model."): value for name, value in saved.items()}
    assert trained_state(model) == state.keys()
    model.load_state_dict(state, strict=False)
    model.cpu()
    in_fp32(model)
    set_enabled(model, False)
    return model


def write_outputs(config: AdapterRunConfig, files: AdapterFiles, directory: Path) -> None:
    """Write what is shipped beside the artifact."""
    for name in config.written:
        with staged_directory(directory / name, replace=True) as staging:
            if name == "adapter":
                files.write_adapter(staging, config.model, on_original=True)
            elif name == "nf4":
                files.write_nf4(staging)
            else:
                files.write_merged(staging)


def adapter_result(
    config: AdapterRunConfig, files: AdapterFiles, directory: Path
) -> AdapterResult:
    """What the report says of the adapters, and how to read back what was written of them."""
    model, written = files.model, config.written
    trained = [p.numel() for p in model.parameters() if p.requires_grad]
    bits = base_bits(model, files.keep)
    return AdapterResult(
        trained_merged=config.merge_share > 0,
        min_gain_kept=config.min_gain_kept,
        bits_per_weight=bits,
        size_bytes=stored_bytes(model, files.keep),
        load_nf4=(lambda: reload_nf4(directory / "nf4")) if "nf4" in written else None,
        nf4_caveat=files.caveat() if "nf4" in written else None,
        load_merged=(lambda: load_model(str(directory / "merged")))
        if "merged" in written
        else None,
        facts={
            **asdict(config.adapter),
            "merge_share": config.merge_share,
            "trained_parameters": sum(trained),
            "base_bits_per_weight": bits,
            **files.identity(),
        },
    )
