"""What the engine's tests share: artifacts, prompts, and answers with their log-probabilities."""

import asyncio
import copy
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedModel

from qat.kv_cache import KVCacheName, make_cache
from qat.runtime import load_packed
from qat.serve.engine import Engine
from qat.serve.requests import FinishEvent, Handle, Sampling
from qat_kernels.numerics import QuantSpec
from tests.qat.test_runtime import INT4, int8_input, write_artifact
from tests.tiny import CONFIGS, VOCAB

KINDS = ("w4a16", "w8a8", "w4a16_channel")
W8 = QuantSpec(bits=8, granularity="channel", grid="absmax")


def artifact(directory: Path, kind: str = "w4a16", family: str = "llama") -> Path:
    """A random tiny model, quantized, with a context of 256."""
    config = copy.deepcopy(CONFIGS[family])
    config.max_position_embeddings = 256
    channel = QuantSpec(granularity="channel", grid="absmax")
    spec = {"w4a16": INT4, "w8a8": W8, "w4a16_channel": channel}[kind]
    write_artifact(directory, config, spec, int8_input(True) if kind == "w8a8" else None)
    return directory


def prompts(lengths: list[int], seed: int = 0) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, VOCAB, (n,), generator=generator).tolist() for n in lengths]


@dataclass
class Answer:
    tokens: list[int]
    logprobs: list[float | None]
    top: list[tuple[tuple[int, float], ...]]
    finish: FinishEvent

    @property
    def content(self) -> tuple[list[int], list[float | None]]:
        return self.tokens, self.logprobs


async def collect(handle: Handle) -> Answer:
    answer = Answer([], [], [], FinishEvent("error"))
    while True:
        event = await asyncio.wait_for(handle.next_event(), 60)
        if isinstance(event, FinishEvent):
            answer.finish = event
            return answer
        answer.tokens.append(event.token_id)
        answer.logprobs.append(event.logprob)
        answer.top.append(event.top)


Job = tuple[list[int], Sampling]


def ask_alone(engine: Engine, jobs: list[Job], model: str | None = None) -> list[Answer]:
    """One after the other."""

    async def run() -> list[Answer]:
        name = model or engine.models[0]
        return [await collect(engine.submit(p, s, name)) for p, s in jobs]

    return asyncio.run(run())


def ask_together(engine: Engine, jobs: list[Job], model: str | None = None) -> list[Answer]:
    """Arriving at different moments, while others run."""

    async def one(i: int, job: Job) -> Answer:
        await asyncio.sleep(0.004 * (i % 5))
        return await collect(engine.submit(*job, model or engine.models[0]))

    async def run() -> list[Answer]:
        return list(await asyncio.gather(*(one(i, job) for i, job in enumerate(jobs))))

    return asyncio.run(run())


def generated(
    path: Path, dtype: str, jobs: list[Job], kv_cache: KVCacheName = "none"
) -> list[tuple[list[int], list[float]]]:
    """Tokens of ``generate``, as `qat.generate` calls it, with their log-probabilities."""
    return generated_by(load_packed(path, getattr(torch, dtype)), jobs, kv_cache)


@torch.no_grad()
def generated_by(
    model: PreTrainedModel, jobs: list[Job], kv_cache: KVCacheName = "none"
) -> list[tuple[list[int], list[float]]]:
    found = []
    for prompt, sampling in jobs:
        ids = torch.tensor([prompt])
        draws = sampling.temperature > 0
        options = {"temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": 0}
        with torch.random.fork_rng():
            torch.manual_seed(sampling.seed)
            output = model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=sampling.max_new_tokens,
                eos_token_id=None,
                pad_token_id=0,
                do_sample=draws,
                output_logits=True,
                return_dict_in_generate=True,
                **(options if draws else dict.fromkeys(options)),
                **make_cache(model, kv_cache, len(prompt) + sampling.max_new_tokens),
            )
        tokens = output.sequences[0, len(prompt) :].tolist()
        rows = torch.cat(output.logits).float()
        logprobs = [float(row.log_softmax(-1)[token]) for row, token in zip(rows, tokens)]
        found.append((tokens, logprobs))
    return found
