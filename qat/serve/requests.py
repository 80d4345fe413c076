"""What passes between the HTTP layer and the engine: one request in tokens, and its events.

The HTTP layer (`qat.serve.app`) knows text, chat and JSON; the engine (`qat.serve.engine`) knows
token ids only. An engine yields one `TokenEvent` for each new token and then one `FinishEvent`.
"""

from dataclasses import dataclass
from typing import Literal, Protocol

FinishReason = Literal["stop", "length", "cancelled", "error"]


@dataclass(frozen=True)
class Sampling:
    """How one sequence is continued."""

    max_new_tokens: int
    """Most tokens to generate."""
    temperature: float = 0.0
    """0 takes the likeliest token each time."""
    top_p: float = 1.0
    """Sampling keeps the likeliest tokens that add up to this probability."""
    seed: int = 0
    """Seed of this sequence's own random stream: the same request and seed give the same tokens,
    whatever else runs beside it."""
    stop_token_ids: tuple[int, ...] = ()
    """Tokens that end the sequence (end-of-text tokens of the model, unless they are ignored)."""
    top_logprobs: int | None = None
    """None: no log-probabilities; else those of the chosen token and of so many likeliest ones."""


@dataclass(frozen=True)
class TokenEvent:
    """One new token."""

    token_id: int
    """The token."""
    logprob: float | None = None
    """Its log-probability under the model (before temperature and top_p), nats."""
    top: tuple[tuple[int, float], ...] = ()
    """The likeliest tokens at this position with their log-probabilities, likeliest first."""


@dataclass(frozen=True)
class FinishEvent:
    """The end of a sequence; nothing follows it."""

    reason: FinishReason
    """stop: a stop token (which was yielded as a `TokenEvent`); length: max_new_tokens."""
    message: str = ""
    """What went wrong, for reason=error."""


Event = TokenEvent | FinishEvent


@dataclass(frozen=True)
class EngineStats:
    """A snapshot for the metrics."""

    waiting: int
    """Sequences accepted and not yet in a batch."""
    running: int
    """Sequences that take part in the steps."""
    batch_tokens: int
    """Tokens of the last step (prompt pieces and one for each decoding sequence)."""
    cache_tokens_used: int
    """Key-value slots in use."""
    cache_tokens: int
    """Key-value slots in all."""


class Handle(Protocol):
    """A submitted sequence."""

    async def next_event(self) -> Event:
        """The next event; after a `FinishEvent` it must not be called again."""

    def cancel(self) -> None:
        """Stop generating and free the sequence's memory; safe to call at any time, twice too."""


class EngineProtocol(Protocol):
    """What the HTTP layer needs of an engine."""

    context: int
    """Most tokens of prompt and answer together."""

    @property
    def models(self) -> list[str]:
        """Names under which requests may ask for weights: the artifact's, then its adapters'."""

    def submit(self, prompt_ids: list[int], sampling: Sampling, model: str) -> Handle:
        """Accept a sequence. Must be called in a running event loop; returns at once.

        Raises:
            KeyError: no such model.
            ValueError: an empty prompt, or prompt and answer do not fit `context`.
            RuntimeError: the engine is stopping or has failed; the message says which.
        """

    def stats(self) -> EngineStats:
        """A snapshot, summed over all models; cheap, callable from any thread."""

    @property
    def failure(self) -> str | None:
        """Why the engine can no longer answer, or None while it can."""

    def close(self) -> None:
        """Stop after the current step; sequences still running end with reason=error."""
