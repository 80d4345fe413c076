"""Adapter training against plain transformers, PEFT and bitsandbytes: speed and memory of a step.

On one GPU, the 8 B shape (16 GB of disk while it runs):

    python train.py recipe=benchmark_qlora preset=model/llama_8b output_dir=runs/8b

The contestants train the same adapters on the same 4-bit weights of a random model, on the same
tokens, in the same arithmetic, with the same optimizer (`qat.optim`), clipping and activation
checkpointing:

    ours    `qat.adapters.prepare_adapters` on streamed weights, loss by `qat.loss.TokenLoss`
    peft    `from_pretrained` with BitsAndBytesConfig, `get_peft_model`, `model(labels=...).loss`
    merged  ours, as it trains the weights that are shipped: Q(W + s B A), W read in each pass

Each has the attention that it would have by itself. On these full blocks that is SDPA for all:
causal without a mask for peft, with the mask of packed documents for ours, which is what training
here pays. Nobody's training loop (Lightning, Trainer) is in the figures. The peer is not prepared
by `prepare_model_for_kbit_training`, which would hold embeddings and norms in fp32. On the CPU its
layers get `support_avx512bf16_for_cpu=False`: where the processor has AVX512-BF16, a forward pass
in eval mode repacks their weights in place, after which gradients through them vanish.

Before anything is timed, ours and peft compute loss and gradients from equal adapters: the figures
are of equals, or the run fails. Steps are timed in turn, so that drifts in speed hit all alike; the
ratio is the median over the turns. Peaks are growth since before the model is loaded, each in a
process of its own: of the CUDA allocator's memory, or of the resident process, where the files'
pages count although the system can take them back.
"""

import json
import logging
import math
import multiprocessing
import statistics
import tempfile
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from datetime import UTC, datetime
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from qat.adapters import prepare_adapters
from qat.fake_quant import set_enabled
from qat.linear_4bit import Linear4bit
from qat.lora import LoraLinear
from qat.memory import RunPlan, predict
from qat.memory_meter import MemoryMeter, release
from qat.original import OriginalWeights
from qat.report import environment
from qat.training import TrainerConfig
from recipes.config import AdapterBenchmarkConfig, Contestant
from recipes.contestants import Entrant, build, build_all, device_of, storage_of
from recipes.random_model import write_random_model

WARM_UP = 2
"""Steps of each contestant that are not counted."""
PEER = "base_model.model."
"""What PEFT's wrapper puts before the names of the model's modules."""
BF16_LOSS_TOLERANCE = 2.0**-11
"""Relative. Stated, not derived: the rounding errors of single tokens cancel in the mean. On four
random layers equals differed by less than 1e-7, and a peer on fp4 instead of nf4 by 7e-4."""
BF16_GRADIENT_TOLERANCE = 0.05
"""Norm of the difference by norm. Stated, as above: equals 0.004, fp4 instead of nf4 0.2 to 0.5."""


def run(config: AdapterBenchmarkConfig) -> None:
    """Measure, print the table, write benchmark_qlora.json where asked.

    Raises:
        RuntimeError: loss or gradients of ours and peft differ; all figures are printed before.
        UserError: the disk has no room for the random model.
    """
    kinds = [k for k in config.contestants if k != "peft" or find_spec("bitsandbytes")]
    output = None if config.output_dir is None else Path(config.output_dir)
    if output is not None:
        output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".random-model-", dir=output) as place:
        model = Path(place)
        parameters = write_random_model(config.shape, model, config.seed, device_of(config))
        memory = {kind: _in_process(config, model, kind) for kind in kinds}
        predicted = {kind: _predicted(config, model, kind) for kind in kinds if kind != "peft"}
        entrants = build_all(config, model, kinds)
        check = compare(entrants["ours"], entrants["peft"], config) if _both(kinds) else None
        seconds = measure(entrants, config.repeats)
    result = {
        "date": datetime.now(UTC).date().isoformat(),
        "device": str(device_of(config)),
        "parameters": parameters,
        "tokens_per_step": config.batch_size * config.seq_len,
        "missing": [kind for kind in config.contestants if kind not in kinds],
        "seconds": seconds,
        "speed_over_peft": _ratios(seconds),
        "memory_bytes": memory,
        "predicted_step_bytes": predicted,
        "check": check,
        "config": asdict(config),
        "environment": environment(),
    }
    print(f"\n{table(result)}")
    if output is not None:
        text = json.dumps(result, indent=2) + "\n"
        (output / "benchmark_qlora.json").write_text(text, "utf-8")
    if check is not None and not check["equal"]:
        raise RuntimeError("ours and peft do not compute the same: their figures do not compare")


def _both(kinds: list[Contestant]) -> bool:
    return {"ours", "peft"} <= set(kinds)


# --- the comparison ------------------------------------------------------------------------------


def compare(ours: Entrant, peft: Entrant, config: AdapterBenchmarkConfig) -> dict[str, Any]:
    """Loss and gradients of both from the same adapters, which are copied from ours to the peer.

    Returns:
        Both losses, relative differences of loss and gradients, their tolerances, the share of
        4-bit codes that are equal, and whether all is within its tolerance.
    """
    theirs = dict(peft.model.named_parameters())
    trained = {n: p for n, p in ours.model.named_parameters() if p.requires_grad}
    assert {PEER + n for n in trained} == {n for n, p in theirs.items() if p.requires_grad}
    for name, parameter in trained.items():
        theirs[PEER + name].data.copy_(parameter.data)
    set_enabled(ours.model, False)
    losses, gradients = {}, {}
    for kind, entrant, prefix in (("ours", ours, ""), ("peft", peft, PEER)):
        loss = entrant.loss()
        loss.backward()
        parameters = dict(entrant.model.named_parameters())
        grads = [parameters[prefix + name].grad for name in trained]
        gradients[kind] = torch.cat([g.flatten() for g in grads if g is not None])
        losses[kind] = float(loss.detach())
        entrant.optimizer.zero_grad()
    difference = gradients["ours"] - gradients["peft"]
    of_loss = abs(losses["ours"] - losses["peft"]) / losses["ours"]
    of_gradient = float(difference.norm() / gradients["ours"].norm())
    loss_limit, gradient_limit = tolerances(config)
    return {
        "loss": losses,
        "loss_difference": of_loss,
        "loss_tolerance": loss_limit,
        "gradient_difference": of_gradient,
        "gradient_tolerance": gradient_limit,
        "equal_codes": _equal_codes(ours.model, peft.model),
        "equal": of_loss <= loss_limit and of_gradient <= gradient_limit,
    }


def tolerances(config: AdapterBenchmarkConfig) -> tuple[float, float]:
    """Relative bounds (loss, gradients) of what the order of additions can do.

    fp32, u = 2^-24: a sum of n terms is off by at most about 6 sqrt(n) u (Higham and Mary 2019,
    theorem 2.4, failure probability 1e-7). A layer adds over the hidden size in two norms, in
    q, k or v, in o and in gate or up; over the head's size and the positions in attention; over
    the intermediate size in down; then come head, softmax and the sum over tokens. The backward
    pass goes the same way twice. Each of the two contestants is off by that much. bf16: see the
    constants.
    """
    if config.precision == "bf16-mixed":
        return BF16_LOSS_TOLERANCE, BF16_GRADIENT_TOLERANCE
    shape = config.shape
    head = shape.hidden_size // shape.num_attention_heads
    layer = 5 * shape.hidden_size + shape.intermediate_size + head + config.seq_len
    tokens = config.batch_size * config.seq_len
    n = shape.num_hidden_layers * layer + shape.hidden_size + shape.vocab_size + tokens
    return 12 * math.sqrt(n) * 2.0**-24, 12 * math.sqrt(3 * n) * 2.0**-24


def _equal_codes(ours: nn.Module, peft: nn.Module) -> float:
    """Share of the bytes of 4-bit codes under adapters that are the same in both."""
    same = total = 0
    for name, layer in ours.named_modules():
        if isinstance(layer, LoraLinear) and isinstance(layer.base_layer, Linear4bit):
            codes = layer.base_layer.codes
            theirs: Any = peft.get_submodule(f"{PEER}{name}.base_layer").weight
            same += int((theirs.data.flatten() == codes).sum())
            total += codes.numel()
    return same / total


def measure(entrants: dict[Contestant, Entrant], repeats: int) -> dict[Contestant, list[float]]:
    """Seconds of each contestant's steps, made in turn."""
    seconds: dict[Contestant, list[float]] = {kind: [] for kind in entrants}
    for turn in tqdm(range(repeats + WARM_UP), desc="benchmark"):
        for kind, entrant in entrants.items():
            taken = entrant.step()
            if turn >= WARM_UP:
                seconds[kind].append(taken)
    return seconds


def _ratios(seconds: dict[Contestant, list[float]]) -> dict[Contestant, float]:
    """Speed as a multiple of the peer's, the median over the turns; empty without the peer."""
    peer = seconds.get("peft")
    if peer is None:
        return {}
    return {
        kind: statistics.median([theirs / own for theirs, own in zip(peer, times)])
        for kind, times in seconds.items()
    }


# --- memory --------------------------------------------------------------------------------------


def _in_process(
    config: AdapterBenchmarkConfig, model: Path, kind: Contestant
) -> dict[str, dict[str, int]]:
    """Peaks of loading and of two steps in a fresh process, bytes; see `_peaks`."""
    with ProcessPoolExecutor(
        1,
        multiprocessing.get_context("spawn"),
        # its remark on a kernel of the Hub; before this module, and with it PEFT, is imported there
        initializer=logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel,
        initargs=(logging.ERROR,),
    ) as pool:
        return pool.submit(_peaks, config, model, kind).result()


def _peaks(
    config: AdapterBenchmarkConfig, model: Path, kind: Contestant
) -> dict[str, dict[str, int]]:
    """{"load": ..., "step": ...} of the host, and of the device in use (the host, on the CPU)."""
    # what is imported on first use, for all alike
    OriginalWeights(str(model)).skeleton()
    if find_spec("bitsandbytes"):
        import_module("bitsandbytes")
    meter = MemoryMeter(give_back=True)
    with meter.phase("load"):
        entrant = build(config, model, kind)
    release(entrant.model)
    with meter.phase("step"):
        for _ in range(WARM_UP):
            entrant.step()
    on_gpu = device_of(config).type == "cuda"
    return {"host": meter.host, "used": meter.device if on_gpu else meter.host}


def _predicted(config: AdapterBenchmarkConfig, model: Path, kind: Contestant) -> int:
    """What `qat.memory` expects of the steps, bytes."""
    ours, coverage = prepare_adapters(
        OriginalWeights(str(model)), config.adapter, config.scheme, config.seed, load=False
    )
    trainer = TrainerConfig(
        accelerator="gpu" if device_of(config).type == "cuda" else "cpu",
        precision=config.precision,
        global_batch_size=config.batch_size,
        micro_batch_size=config.batch_size,
        loss_chunk=config.loss_chunk,
        activation_checkpointing=config.activation_checkpointing,
    )
    plan = RunPlan(
        seq_len=config.seq_len,
        max_steps=WARM_UP,
        trainer=trainer,
        optim=config.optim,
        storage=storage_of(config),
        merges=kind == "merged",
    )
    prediction = predict(ours, coverage, plan)
    return prediction.vram or prediction.phases["train"]


# --- the table -----------------------------------------------------------------------------------


def table(result: dict[str, Any]) -> str:
    """The result for people: Markdown, and a line on whether it compares equals."""
    tokens, config = result["tokens_per_step"], result["config"]
    hardware = result["environment"]["gpu"] if result["device"] != "cpu" else "CPU"
    lines = [
        f"{result['parameters']:,} parameters, {config['batch_size']} x {config['seq_len']} tokens "
        f"a step, {config['precision']}, {hardware}",
        "",
        "| | tokens/s, median | min | max | of peft | load MiB | step MiB | predicted MiB |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for kind, times in result["seconds"].items():
        speeds = [tokens / t for t in (statistics.median(times), max(times), min(times))]
        used = result["memory_bytes"][kind]["used"]
        ratio = result["speed_over_peft"].get(kind)
        expected = result["predicted_step_bytes"].get(kind)
        cells = [
            *(f"{speed:,.1f}" for speed in speeds),
            "" if ratio is None else f"{ratio:.3f}",
            *(f"{used[phase] / 2**20:,.0f}" for phase in ("load", "step")),
            "" if expected is None else f"{expected / 2**20:,.0f}",
        ]
        lines.append(f"| `{kind}` | {' | '.join(cells)} |")
    lines += ["", _verdict(result)]
    return "\n".join(lines)


def _verdict(result: dict[str, Any]) -> str:
    check = result["check"]
    if "peft" in result["missing"]:
        return "`peft` is missing: bitsandbytes is not installed (pip install bitsandbytes)."
    if check is None:
        return "ours and peft did not both take part: nothing is compared."
    return (
        f"ours and peft {'agree' if check['equal'] else 'DIFFER'}: loss {check['loss']['ours']:.6f}"
        f" and {check['loss']['peft']:.6f}, relative difference {check['loss_difference']:.1e} "
        f"(tolerance {check['loss_tolerance']:.1e}); gradients {check['gradient_difference']:.1e} "
        f"({check['gradient_tolerance']:.1e}); {check['equal_codes']:.4%} of the codes' bytes equal"
    )
