"""Cost of quantization-aware training: its step against the plain step of the same model.

Both steps run in one process, in turn, so that drifts in speed hit both alike; the median of the
pairs' ratios is the figure. Peak memory is measured in a process of its own for each, because a
process's peak never falls.
"""

import json
import multiprocessing
import statistics
import time
from dataclasses import asdict
from pathlib import Path

import torch
from torch.optim import Optimizer
from tqdm import tqdm
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from qat.loss import forward_logits, loss_sum
from qat.memory_meter import peak_memory_bytes
from qat.optim import build_optimizer
from qat.packing import Batch
from qat.prepare import prepare
from qat.report import environment
from recipes.config import BenchmarkConfig


def run(config: BenchmarkConfig) -> None:
    """Time both steps, print the table, write benchmark.json where asked."""
    memory = {kind: _in_process(config, kind == "qat") for kind in ("plain", "qat")}
    models = {kind: _Step(config, kind == "qat") for kind in ("plain", "qat")}
    times: dict[str, list[float]] = {kind: [] for kind in models}
    for repeat in tqdm(range(config.repeats + 2), desc="benchmark"):
        for kind, step in models.items():
            seconds = step()
            if repeat >= 2:
                times[kind].append(seconds)
    result = {
        "parameters": models["plain"].parameters,
        "tokens_per_step": config.batch_size * config.seq_len,
        "seconds": times,
        "median_seconds": {kind: statistics.median(t) for kind, t in times.items()},
        "ratio": statistics.median(
            [qat / plain for qat, plain in zip(times["qat"], times["plain"])]
        ),
        "peak_memory_bytes": memory,
        "config": asdict(config),
        "environment": environment(),
    }
    print(f"\n{result['parameters']:,} parameters, {result['tokens_per_step']} tokens a step")
    print(f"{'step':<8}{'median s':>10}{'min s':>10}{'max s':>10}{'peak MiB':>12}")
    for kind, t in times.items():
        peak = memory[kind] / 2**20
        print(f"{kind:<8}{statistics.median(t):>10.3f}{min(t):>10.3f}{max(t):>10.3f}{peak:>12,.0f}")
    print(f"QAT step / plain step: {result['ratio']:.3f} (median of the pairs' ratios)")
    if config.output_dir is not None:
        directory = Path(config.output_dir)
        directory.mkdir(parents=True, exist_ok=True)
        (directory / "benchmark.json").write_text(json.dumps(result, indent=2) + "\n", "utf-8")


class _Step:
    """One optimizer step of a plain or prepared model, on random tokens."""

    def __init__(self, config: BenchmarkConfig, quantized: bool) -> None:
        torch.manual_seed(config.seed)
        device = config.device
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        self.device = torch.device(device)
        self.autocast = config.precision == "bf16-mixed"
        shape = LlamaConfig(**asdict(config.shape))
        self.model: PreTrainedModel = AutoModelForCausalLM.from_config(shape, dtype=torch.float32)
        self.model.to(self.device).train()
        self.parameters = sum(p.numel() for p in self.model.parameters())
        if quantized:
            prepare(self.model, config.scheme)
        self.optimizer: Optimizer = build_optimizer(self.model, config.optim)
        size = (config.batch_size, config.seq_len)
        tokens = torch.randint(shape.vocab_size, size, device=self.device)
        positions = torch.arange(config.seq_len, device=self.device).expand(size)
        self.batch: Batch = {
            "input_ids": tokens,
            "labels": tokens.roll(-1, 1),
            "position_ids": positions,
            "segment_ids": torch.ones_like(tokens, dtype=torch.int32),
        }

    def __call__(self) -> float:
        """Run the step; seconds."""
        self._synchronize()
        start = time.perf_counter()
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.autocast):
            logits = forward_logits(self.model, self.batch)
            loss = loss_sum(logits, self.batch["labels"]) / self.batch["labels"].numel()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self._synchronize()
        return time.perf_counter() - start

    def _synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()


def _in_process(config: BenchmarkConfig, quantized: bool) -> int:
    """Peak memory of two steps in a fresh process, bytes, above that of the imports."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_peak, (config, quantized))


def _peak(config: BenchmarkConfig, quantized: bool) -> int:
    before = peak_memory_bytes()
    step = _Step(config, quantized)
    for _ in range(2):
        step()
    return peak_memory_bytes() - before
