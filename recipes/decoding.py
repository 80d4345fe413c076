"""What `recipes.benchmark_decode` measures: artifacts of a random model, steps, layers, answers."""

import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import Tensor
from tqdm import tqdm
from transformers import (
    AutoModelForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    StoppingCriteria,
    StoppingCriteriaList,
)

from qat.convert import write_checkpoint
from qat.packed_layers import Int8Linear, PackedLinear
from qat.prepare import prepare
from qat.runtime import load_packed
from qat.scheme import InputSpec, Rule, Scheme
from qat_kernels import QuantSpec
from recipes.config import DecodeBenchmarkConfig, ModelShape
from recipes.random_model import write_random_model
from recipes.resident import Resident, in_own_process

WEIGHT_INT8 = QuantSpec(bits=8, granularity="channel", grid="absmax")
SCHEMES = {
    "w4": Scheme(),
    "w4 head": Scheme(rules=[Rule("lm_head")]),
    "w8a8": Scheme(weight=WEIGHT_INT8, input=InputSpec()),
}
"""Beside bf16: int4 in groups of 32, the same with the head, int8 weights and inputs."""
WARM_UP_SHAPE: dict[str, Any] = {
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 512,
}
"""The small model that a process serves before its memory counts."""
WARM_UP = 2
"""Steps of each answer, and turns, that are not counted."""
PAD = 0
"""Token that fills up shorter prompts."""


@dataclass(frozen=True)
class Contestants:
    """Models of one vocabulary: plain transformers in bf16, and the artifacts served packed."""

    vocabulary: int
    parameters: int
    models: dict[str, PreTrainedModel]
    weight_bytes: dict[str, int]
    """Bytes of weights that one decoded token reads: everything but the embedding."""
    places: dict[str, Path]
    """Where each was loaded from."""

    def without(self, name: str) -> "Contestants":
        """The others."""
        return replace(self, models={n: m for n, m in self.models.items() if n != name})


def contestants(
    config: DecodeBenchmarkConfig, vocabulary: int, names: list[str], directory: Path
) -> Contestants:
    """Write a random model and its artifacts below ``directory``, and load each as it is served."""
    shape = replace(config.shape, vocab_size=vocabulary)
    places = write_models(shape, config.seed, names, directory)
    models = {n: load_packed(p) if n != "bf16" else _plain(p) for n, p in places.items()}
    parameters = sum(p.numel() for p in models["bf16"].parameters())
    read = {name: _read(model) for name, model in models.items()}
    return Contestants(vocabulary, parameters, models, read, places)


def write_models(
    shape: ModelShape, seed: int, names: list[str], directory: Path
) -> dict[str, Path]:
    """Write a random model (``bf16``) and its artifacts by `SCHEMES`; the directory of each."""
    places = {"bf16": directory / "bf16"}
    places["bf16"].mkdir(parents=True)
    write_random_model(shape, places["bf16"], seed)
    for name in tqdm(names, desc=f"artifacts, vocabulary {shape.vocab_size}", leave=False):
        model = _plain(places["bf16"])
        coverage = prepare(model, SCHEMES[name])
        places[name] = directory / name.replace(" ", "-")
        places[name].mkdir()
        # nothing here reads text, but an artifact has a tokenizer
        words = Tokenizer(WordLevel({"<unk>": 0}, unk_token="<unk>"))
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=words)
        write_checkpoint(model, tokenizer, coverage, SCHEMES[name], places[name])
    return places


def memory(config: DecodeBenchmarkConfig, places: dict[str, Path]) -> dict[str, Resident]:
    """What a process grows by that serves each model, each in a process of its own.

    A small model of the same kind is served first: see `recipes.resident`.
    """
    shape = replace(config.shape, **WARM_UP_SHAPE)
    names = [name for name in places if name != "bf16"]
    with tempfile.TemporaryDirectory(prefix="qat-warm-up-") as directory:
        small = write_models(shape, config.seed, names, Path(directory))
        return {
            name: in_own_process(
                "plain" if name == "bf16" else "packed", place, small[name], config.new_tokens
            )
            for name, place in tqdm(places.items(), desc="memory", leave=False)
        }


def _plain(directory: Path) -> PreTrainedModel:
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.bfloat16)
    return model.eval().requires_grad_(False)


def _read(model: PreTrainedModel) -> int:
    embedding = model.get_input_embeddings().weight
    tensors = {id(t): t for t in (*model.parameters(), *model.buffers()) if t is not embedding}
    return sum(t.numel() * t.element_size() for t in tensors.values())


class _Clock(StoppingCriteria):
    """Notes the time after each step and stops nothing."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        self.times.append(time.perf_counter())
        return torch.zeros(input_ids.shape[0], dtype=torch.bool)


def generate(
    model: PreTrainedModel, prompts: list[Tensor], new_tokens: int
) -> tuple[Tensor, list[float]]:
    """Greedy answers [B, new_tokens] to prompts [T_i], padded on the left, and seconds of steps.

    The first step, which holds the prefill, is not among the seconds.
    """
    length = max(len(prompt) for prompt in prompts)
    ids = torch.full((len(prompts), length), PAD)
    mask = torch.zeros_like(ids)
    for i, prompt in enumerate(prompts):
        ids[i, length - len(prompt) :] = prompt
        mask[i, length - len(prompt) :] = 1
    clock = _Clock()
    output = model.generate(
        input_ids=ids,
        attention_mask=mask,
        min_new_tokens=new_tokens,
        max_new_tokens=new_tokens,
        do_sample=False,
        pad_token_id=PAD,
        use_cache=True,
        stopping_criteria=StoppingCriteriaList([clock]),
    )
    steps = [b - a for a, b in zip(clock.times, clock.times[1:])]
    return output[:, length:], steps


def prompts_of(config: DecodeBenchmarkConfig, count: int, vocabulary: int) -> list[Tensor]:
    """Random prompts, the first of ``prompt_tokens`` tokens, the others down to a quarter of it."""
    generator = torch.Generator().manual_seed(config.seed)
    longest = config.prompt_tokens
    shortest = max(1, longest // 4)
    lengths = [longest - i * (longest - shortest) // max(1, count - 1) for i in range(count)]
    return [torch.randint(1, vocabulary, (n,), generator=generator) for n in lengths]


def time_steps(
    config: DecodeBenchmarkConfig, entrants: Contestants, batch: int
) -> dict[str, list[float]]:
    """Seconds of a decode step (median of an answer) for each turn, contestants in turn."""
    equal = prompts_of(config, 1, entrants.vocabulary) * batch

    def run(model: PreTrainedModel) -> float:
        steps = generate(model, equal, config.new_tokens)[1]
        return statistics.median(steps[min(WARM_UP, len(steps) - 1) :])

    return _turns(config, entrants.models, run, f"decode, batch {batch}")


@torch.no_grad()
def time_layers(
    config: DecodeBenchmarkConfig, entrants: Contestants, batch: int
) -> dict[str, list[float]]:
    """Seconds of all quantized layers one after another, so that weights come from memory."""
    quantized = (PackedLinear, Int8Linear)
    served = next(model for name, model in entrants.models.items() if name != "bf16")
    names = [n for n, m in served.named_modules() if isinstance(m, quantized) and n != "lm_head"]
    generator = torch.Generator().manual_seed(config.seed)
    widths = {served.get_submodule(name).in_features for name in names}
    x = {k: torch.randn(batch, 1, k, generator=generator).to(torch.bfloat16) for k in widths}
    # copies: no layer profits from what another did with its input
    inputs = {name: x[served.get_submodule(name).in_features].clone() for name in names}

    def run(model: PreTrainedModel) -> float:
        layers = [(model.get_submodule(name), inputs[name]) for name in names]
        start = time.perf_counter()
        for layer, x in layers:
            layer(x)
        return time.perf_counter() - start

    return _turns(config, entrants.models, run, f"layers, batch {batch}")


def _turns(
    config: DecodeBenchmarkConfig,
    models: dict[str, PreTrainedModel],
    run: Callable[[PreTrainedModel], float],
    title: str,
) -> dict[str, list[float]]:
    seconds: dict[str, list[float]] = {name: [] for name in models}
    for turn in tqdm(range(config.repeats + 1), desc=title, leave=False):
        for name, model in models.items():
            taken = run(model)
            if turn:
                seconds[name].append(taken)
    return seconds


def equal_answers(config: DecodeBenchmarkConfig, entrants: Contestants) -> dict[str, int]:
    """How many greedy answers of a padded batch of `check_batch` equal those to single prompts."""
    prompts = prompts_of(config, config.check_batch, entrants.vocabulary)
    found = {}
    for name, model in tqdm(entrants.models.items(), desc="answers", leave=False):
        together = generate(model, prompts, config.new_tokens)[0]
        alone = torch.cat([generate(model, [p], config.new_tokens)[0] for p in prompts])
        found[name] = int((together == alone).all(1).sum())
    return found
