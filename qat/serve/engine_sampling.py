"""The next token of each sequence, from its own random stream.

Greedy is the argmax of the fp32 logits. Sampling divides the logits by the temperature, keeps the
likeliest tokens up to ``top_p`` and draws, as ``generate`` does with one sequence and the same
seed: the same processors of transformers, the same generator, the same number of draws. So a
sequence gets the same tokens whatever runs beside it, and on the CPU those of ``qat generate``.

Shapes: scores [N, V], N sequences, V tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import LogitsProcessorList, TemperatureLogitsWarper, TopPLogitsWarper

from qat.serve.requests import Sampling


@dataclass(frozen=True)
class Chosen:
    """Log-probabilities of one new token, under the model's distribution."""

    logprob: float
    """Of the token, nats."""
    top: tuple[tuple[int, float], ...]
    """The likeliest tokens with theirs, likeliest first."""


class Sampler:
    """How one sequence goes on; holds its random stream.

    Args:
        sampling: what the request asks for.
        device: where the logits are.
    """

    def __init__(self, sampling: Sampling, device: torch.device) -> None:
        self.top_logprobs = sampling.top_logprobs
        self.greedy = sampling.temperature == 0
        self.last: Chosen | None = None
        """Log-probabilities of the last token, where they were asked for."""
        if self.greedy:
            return
        self._generator = torch.Generator(device).manual_seed(sampling.seed % 2**63)
        self._warpers = LogitsProcessorList()
        if sampling.temperature != 1:
            self._warpers.append(TemperatureLogitsWarper(float(sampling.temperature)))
        if sampling.top_p < 1:
            self._warpers.append(TopPLogitsWarper(float(sampling.top_p)))

    def draw(self, scores: Tensor) -> Tensor:
        """One token, int64 [1], from fp32 scores [1, V]."""
        ids = torch.empty(1, 0, dtype=torch.int64, device=scores.device)
        warped = self._warpers(ids, scores)
        drawn = torch.multinomial(torch.softmax(warped, -1), 1, generator=self._generator)
        return drawn[:, 0]

    def describe(self, scores: Tensor, token: int) -> None:
        """Keep the log-probabilities of a token, from fp32 scores [V]."""
        if self.top_logprobs is None:
            return
        logprobs = torch.log_softmax(scores, -1)
        best = torch.topk(logprobs, min(self.top_logprobs, logprobs.numel()))
        top = tuple(zip(best.indices.tolist(), best.values.tolist()))
        self.last = Chosen(float(logprobs[token]), top)


def choose(scores: Tensor, samplers: Sequence[Sampler | None]) -> Tensor:
    """The next tokens, int64 [N], from fp32 scores [N, V]; a sequence without sampler is greedy."""
    tokens = torch.argmax(scores, -1)
    for i, sampler in enumerate(samplers):
        if sampler is None:
            continue
        if not sampler.greedy:
            tokens[i : i + 1] = sampler.draw(scores[i : i + 1])
        if sampler.top_logprobs is not None:
            sampler.describe(scores[i], int(tokens[i]))
    return tokens
