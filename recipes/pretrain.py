"""Train the demo model from scratch on the demo corpus, and measure it against xz.

Writes ``output_dir/model``: bf16 weights of the step with the lowest validation loss, the
tokenizer, and ``training.json``, the record of how it was made. That directory is what
``data/demo_model`` holds. A corpus must be learned rather than memorised: the held-out text has to
cost fewer bits per byte than xz needs for it after it has seen the training text.
"""

import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from lightning import seed_everything
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from data import corpus
from data.module import TextDataModule
from data.tokenizer import train_tokenizer
from qat.artifact import staged_directory
from qat.config import to_yaml
from qat.errors import UserError
from qat.evaluate import Quality, measure
from qat.loggers import Loggers, read_metrics
from qat.packing import batches
from qat.report import environment
from qat.result import Stopwatch
from qat.scheme import Scheme
from qat.training import fit
from recipes.common import new_data, new_module, own_directory
from recipes.config import PretrainConfig


def run(config: PretrainConfig) -> None:
    """Run the recipe; see the module docstring and ``--help``."""
    if config.data != "demo" or config.model != "demo":
        raise UserError(
            "pretrain_demo trains the built-in model on the built-in corpus: leave "
            "model and data at demo"
        )
    if config.scheme != Scheme():
        raise UserError("scheme: pretrain_demo trains in 16 bit; quantize with recipe=qat_int4")
    if config.dry_run:
        numel = sum(p.numel() for p in new_model(config).parameters())
        print(f"{to_yaml(config)}\n{numel:,} parameters, {numel * 2 / 1e6:.1f} MB in bf16")
        return
    with own_directory(config) as directory:
        train(config, directory)


def new_model(config: PretrainConfig) -> PreTrainedModel:
    """The randomly initialised model; residual outputs start smaller the deeper the model is."""
    torch.manual_seed(config.seed)
    shape = LlamaConfig(**asdict(config.shape), bos_token_id=0, eos_token_id=0, pad_token_id=0)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(shape, dtype=torch.float32)
    with torch.no_grad():
        for layer in model.model.layers:
            for linear in (layer.self_attn.o_proj, layer.mlp.down_proj):
                linear.weight.mul_(1 / math.sqrt(2 * shape.num_hidden_layers))
    return model


def train(config: PretrainConfig, directory: Path) -> None:
    """Tokenizer, training, measurement, model directory."""
    seed_everything(config.seed, verbose=False)
    tokenizer = train_tokenizer(corpus.documents("train"), config.shape.vocab_size)
    data = new_data(config, tokenizer)
    if len(data.held_out_blocks.store.tokens) >= config.text.max_validation_tokens:
        raise UserError(
            f"text.max_validation_tokens={config.text.max_validation_tokens}: cuts the held-out "
            "text, whose bits per byte are measured; raise it"
        )
    loggers = Loggers(config.logger, config.wandb, directory, asdict(config))
    model = new_model(config)
    module = new_module(config, model)
    checkpoints = directory / "checkpoints" / "pretrain"
    watch = Stopwatch()
    with watch.phase("train"):
        phase = loggers.phase("pretrain")
        fit(module, data, config.trainer, checkpoints, phase, keep_best=True)
    best = torch.load(checkpoints / "best.ckpt", map_location="cpu", weights_only=True)
    module.load_state_dict(best["state_dict"])
    model.to(torch.bfloat16)
    record = _record(config, model, data, directory, best["global_step"], watch.seconds["train"])
    with staged_directory(directory / "model", replace=True) as staging:
        model.save_pretrained(staging)
        tokenizer.save_pretrained(staging)
        (staging / "training.json").write_text(json.dumps(record, indent=1) + "\n", "utf-8")
    loggers.finish(directory / "model", record["bits_per_byte"])
    size = sum(path.stat().st_size for path in (directory / "model").iterdir())
    print(f"\nbest step {best['global_step']} of {config.max_steps}")
    for name, bits in record["bits_per_byte"].items():
        print(f"{name:<28}{bits:.4f} bits per byte of held-out text")
    print(f"{directory / 'model'}: {size / 1e6:.2f} MB")


def bits_per_byte(quality: Quality, vocab_size: int) -> float:
    """Bits per byte of the held-out text, from the mean loss of its tokens.

    The first token of a document has no context and no target: it is charged log2(vocab_size).
    """
    held_out = corpus.sizes()["validation"]
    predicted = quality.loss * quality.tokens / math.log(2)
    return (predicted + held_out.documents * math.log2(vocab_size)) / held_out.bytes


def _record(
    config: PretrainConfig,
    model: PreTrainedModel,
    data: TextDataModule,
    directory: Path,
    best_step: int,
    seconds: float,
) -> dict[str, Any]:
    """The training record; bits per byte are those of the bf16 weights, in fp32 arithmetic."""
    exact = model.__class__(model.config).eval()
    exact.load_state_dict({name: value.float() for name, value in model.state_dict().items()})
    quality = measure(exact, batches(data.held_out_blocks, 8), None, "held-out text")
    held_out = corpus.sizes()["validation"]
    xz = corpus.xz_bits_per_byte()
    metrics = read_metrics(directory / "metrics.csv")
    settings = asdict(config)
    for place in ("output_dir", "resume"):
        del settings[place]
    return {
        "config": settings,
        "best_step": best_step,
        "validation_loss": quality.loss,
        "validation_tokens": quality.tokens,
        "validation_bytes": held_out.bytes,
        "bits_per_byte": {
            "model": bits_per_byte(quality, model.config.vocab_size),
            "xz -9e": xz.alone,
            "xz -9e after training text": xz.with_prefix,
        },
        "corpus_fingerprint": corpus.fingerprint(),
        "loss_curve": {
            metric: [[step, round(value, 4)] for _, step, m, value in metrics if m == metric]
            for metric in ("train_loss", "val_loss")
        },
        "seconds": seconds,
        "environment": environment(),
    }
