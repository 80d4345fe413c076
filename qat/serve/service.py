"""How a checked request becomes sequences in the engine, within the server's limits."""

import secrets
import time
from dataclasses import dataclass
from typing import Any

from qat.serve.errors import ApiError
from qat.serve.generation import Answer, Generation
from qat.serve.metrics import Clock, Metrics
from qat.serve.prompts import Prompt, Prompts
from qat.serve.protocol import GenerationRequest
from qat.serve.requests import EngineProtocol, Sampling
from qat.serve.text import OutputText
from qat.serve.transport import Lifecycle

GREEDY_BELOW = 1e-5
"""Temperatures below are 0: logits divided by them would overflow."""
SEEDS = 2**63
"""Seeds are taken modulo this, since generators take 64 bits."""
RETRY_SECONDS = 2
"""After how long a client whom the full queue turned away may come back."""


@dataclass(frozen=True)
class Settings:
    """Limits of the API and who may use it."""

    api_key: str | None = None
    """The key that clients must send, None for none."""
    fingerprint: str = "qat"
    """``system_fingerprint`` of every answer."""
    max_queued: int = 256
    """Most sequences that wait for a place in the batch."""
    max_answers: int = 64
    """Most sequences of one request: its prompts times ``n``."""
    max_tokens: int | None = None
    """Most tokens of one answer; None leaves it to the model's context."""
    max_body_bytes: int = 4 << 20
    """Largest body of a request."""
    cors_origins: tuple[str, ...] = ()
    """Origins of web pages that may call the API; a page of the server itself always may."""


class Service:
    """An engine with its tokenizer and what the routes share."""

    def __init__(self, engine: EngineProtocol, prompts: Prompts, settings: Settings) -> None:
        self.engine, self.prompts, self.settings = engine, prompts, settings
        self.metrics = Metrics(engine.stats)
        self.lifecycle = Lifecycle()
        self._created = int(time.time())

    def model_card(self, name: str) -> dict[str, Any]:
        """An entry of ``/v1/models``, with the context and whether it chats as extras."""
        return {
            "id": name,
            "object": "model",
            "created": self._created,
            "owned_by": "qat-lightning",
            "max_model_len": self.engine.context,
            "chat": self.prompts.chat,
        }

    def model_name(self, wanted: str | None) -> str:
        """The model to use; None takes the artifact's own.

        Raises:
            ApiError: 404, no such model.
        """
        names = self.engine.models
        if wanted is not None and wanted not in names:
            raise ApiError(
                404,
                f"model {wanted!r} is not here; there are: {', '.join(names)}",
                param="model",
                code="model_not_found",
            )
        return names[0] if wanted is None else wanted

    def start(
        self, request: GenerationRequest, model: str, prompts: list[Prompt], tokens: int | None
    ) -> Generation:
        """Hand all sequences of a request to the engine, or none.

        Args:
            request: the checked request.
            model: see `model_name`.
            prompts: each is answered ``n`` times.
            tokens: most tokens of an answer when the request does not say; None: the whole context.

        Raises:
            ApiError: 400, too many answers or tokens; 429, the queue is full; 503, the engine
                stopped or failed.
        """
        n = request.n or 1
        self._check_room(len(prompts) * n)
        lengths = [self._answer_tokens(request, len(prompt.ids), tokens) for prompt in prompts]
        seed = secrets.randbelow(SEEDS) if request.seed is None else request.seed
        answers: list[Answer] = []
        try:
            for prompt, length in zip(prompts, lengths, strict=True):
                for _ in range(n):
                    index = len(answers)
                    sampling = self._sampling(request, length, (seed + index) % SEEDS)
                    answers.append(self._submit(index, prompt, sampling, model, request.stop or []))
        except ApiError:
            for answer in answers:
                answer.cancel()
            raise
        generation = Generation(answers, sum(len(p.ids) for p in prompts), self.metrics)
        self.lifecycle.began(generation)
        return generation

    def check_count(self, answers: int) -> None:
        """Raises ApiError, 400, when a request asks for more answers than one may have."""
        if answers > self.settings.max_answers:
            raise ApiError(
                400,
                f"{answers} answers (prompts times n): at most {self.settings.max_answers} in one "
                "request; send several",
                param="n",
                code="invalid_value",
            )

    def _check_room(self, answers: int) -> None:
        self.check_count(answers)
        if self.engine.failure is not None:
            raise ApiError(503, f"the engine failed: {self.engine.failure}", code="engine_failed")
        waiting = self.engine.stats().waiting
        # an empty queue takes every request, so that none is refused for ever
        if waiting and waiting + answers > self.settings.max_queued:
            raise ApiError(
                429,
                f"{waiting} sequences are waiting already (at most {self.settings.max_queued}); "
                f"try again in {RETRY_SECONDS} s",
                code="rate_limit_exceeded",
                retry_after=RETRY_SECONDS,
            )

    def _answer_tokens(
        self, request: GenerationRequest, prompt_tokens: int, default: int | None
    ) -> int:
        """Most tokens to generate after a prompt; ApiError where they do not fit."""
        limit = self.settings.max_tokens
        wanted = request.token_limit
        if wanted is not None and limit is not None and wanted > limit:
            raise ApiError(
                400,
                f"max_tokens: {wanted}, but this server generates at most {limit} per answer",
                param="max_tokens",
                code="invalid_value",
            )
        room = self.engine.context - prompt_tokens
        if room < max(wanted or 1, 1):
            answer = f" and {wanted} for the answer" if wanted else ""
            raise ApiError(
                400,
                f"this model's maximum context length is {self.engine.context} tokens, but the "
                f"request has {prompt_tokens} tokens of prompt{answer}; shorten one of them",
                param="messages" if "messages" in type(request).model_fields else "prompt",
                code="context_length_exceeded",
            )
        if wanted is not None:
            return wanted
        return min(part for part in (room, limit, default) if part is not None)

    def _sampling(self, request: GenerationRequest, tokens: int, seed: int) -> Sampling:
        temperature = 1.0 if request.temperature is None else request.temperature
        return Sampling(
            max_new_tokens=tokens,
            temperature=0.0 if temperature < GREEDY_BELOW else temperature,
            top_p=1.0 if request.top_p is None else request.top_p,
            seed=seed,
            stop_token_ids=() if request.ignore_eos else self.prompts.stop_token_ids,
            top_logprobs=request.top_logprobs_wanted,
        )

    def _submit(
        self, index: int, prompt: Prompt, sampling: Sampling, model: str, stops: list[str]
    ) -> Answer:
        try:
            handle = self.engine.submit(prompt.ids, sampling, model)
        except ValueError as error:
            raise ApiError(400, str(error), code="context_length_exceeded") from None
        except RuntimeError as error:
            raise ApiError(503, str(error), code="engine_stopped") from None
        output = OutputText(self.prompts.tokenizer, self.prompts.texts, stops, prompt.context)
        clock = Clock(self.metrics)
        return Answer(index, handle, output, sampling.stop_token_ids, clock)
