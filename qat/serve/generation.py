"""One request's sequences in the engine: started together, read as pieces of text, cancelled."""

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass

from qat.serve.errors import ApiError, draining
from qat.serve.metrics import Clock, Metrics
from qat.serve.requests import FinishEvent, Handle
from qat.serve.text import OutputText, Piece


@dataclass(frozen=True)
class Shown:
    """A piece of one of the answers."""

    index: int
    """Which answer."""
    piece: Piece
    finish_reason: str | None = None
    """``stop`` or ``length`` in the last piece of an answer, else None."""


class Answer:
    """One sequence: its events as pieces of text."""

    def __init__(
        self,
        index: int,
        handle: Handle,
        output: OutputText,
        stop_token_ids: tuple[int, ...],
        clock: Clock,
    ) -> None:
        self.index, self._handle, self._output = index, handle, output
        self._stop_token_ids, self._clock = stop_token_ids, clock
        self.tokens = 0
        """Tokens generated so far, an end-of-text token too."""

    async def pieces(self) -> AsyncGenerator[Shown, None]:
        """Pieces with some text, and a last one with the finish reason.

        Raises:
            ApiError: 500, the engine failed; 503, it stopped for a shutdown.
        """
        reason = "cancelled"
        try:
            while True:
                event = await self._handle.next_event()
                if isinstance(event, FinishEvent):
                    reason = event.reason
                    yield Shown(self.index, *self._end(event))
                    return
                self.tokens += 1
                self._clock.token()
                if event.token_id in self._stop_token_ids:
                    continue  # its FinishEvent follows
                piece = self._output.add(event)
                if piece.stopped:
                    reason = "stop"
                    yield Shown(self.index, piece, reason)
                    return
                if piece.text:
                    yield Shown(self.index, piece)
        finally:
            self.cancel()
            self._clock.finish(reason)

    def _end(self, event: FinishEvent) -> tuple[Piece, str]:
        if event.reason == "cancelled":
            raise draining()
        if event.reason == "error":
            raise ApiError(500, f"the engine failed: {event.message}", code="engine_failed")
        piece = self._output.finish()
        return piece, "stop" if piece.stopped else event.reason

    def cancel(self) -> None:
        """Give the sequence's place in the engine back."""
        self._handle.cancel()


class Generation:
    """All answers of one request."""

    def __init__(self, answers: list[Answer], prompt_tokens: int, metrics: Metrics) -> None:
        self._answers, self._prompt_tokens = answers, prompt_tokens
        self._queue: asyncio.Queue[Shown | Exception | None] = asyncio.Queue()
        metrics.prompt_tokens.inc(prompt_tokens)

    @property
    def usage(self) -> dict[str, int]:
        """OpenAI's counts; each prompt counts once, whatever ``n``."""
        generated = sum(answer.tokens for answer in self._answers)
        return {
            "prompt_tokens": self._prompt_tokens,
            "completion_tokens": generated,
            "total_tokens": self._prompt_tokens + generated,
        }

    async def pieces(self) -> AsyncGenerator[Shown, None]:
        """The pieces of all answers as they come; closing the iterator cancels the rest.

        Raises:
            ApiError: see `Answer.pieces`; the other answers are cancelled.
        """
        queue = self._queue

        async def read(answer: Answer) -> None:
            try:
                async with aclosing(answer.pieces()) as pieces:
                    async for shown in pieces:
                        queue.put_nowait(shown)
                queue.put_nowait(None)
            except Exception as error:
                queue.put_nowait(error)

        tasks = [asyncio.create_task(read(answer)) for answer in self._answers]
        open_answers = len(tasks)
        try:
            while open_answers:
                item = await queue.get()
                if isinstance(item, Exception):
                    raise item
                if item is None:
                    open_answers -= 1
                else:
                    yield item
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            self.cancel()

    def cancel(self) -> None:
        """Give all places in the engine back; safe at any time, also before `pieces` began."""
        for answer in self._answers:
            answer.cancel()

    def cut_off(self) -> None:
        """Let `pieces` raise after what it already holds: the time to finish is over."""
        self._queue.put_nowait(draining())
