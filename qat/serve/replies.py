"""Answers in the shapes of OpenAI's API: whole, and as the chunks of a stream."""

import json
import time
import uuid
from abc import ABC, abstractmethod
from collections import defaultdict
from typing import Any, Protocol

from qat.serve.generation import Shown
from qat.serve.text import Token, TokenText, joined

Json = dict[str, Any]


def event(data: Json) -> bytes:
    """One server-sent event."""
    return (
        b"data: "
        + json.dumps(data, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode()
        + b"\n\n"
    )


DONE = b"data: [DONE]\n\n"
"""The last event of every stream."""


class Reply(Protocol):
    """How one request is answered."""

    include_usage: bool

    def opening(self, answers: int) -> list[Json]:
        """Chunks in front of the first piece."""

    def chunks(self, shown: Shown) -> list[Json]:
        """The chunks of one piece."""

    def usage_chunk(self, usage: Json) -> Json:
        """The last chunk, where the client asked for the token counts."""

    def whole(self, pieces: list[Shown], usage: Json) -> Json:
        """The answer in one."""


class _Reply(ABC):
    """What both shapes share."""

    prefix: str
    stream_object: str
    whole_object: str

    def __init__(self, model: str, fingerprint: str, logprobs: bool, include_usage: bool) -> None:
        self.logprobs, self.include_usage = logprobs, include_usage
        self._head = {
            "id": f"{self.prefix}-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": model,
            "system_fingerprint": fingerprint,
        }

    def _chunk(self, choices: list[Json]) -> Json:
        chunk = {**self._head, "object": self.stream_object, "choices": choices}
        return {**chunk, "usage": None} if self.include_usage else chunk

    def usage_chunk(self, usage: Json) -> Json:
        """The last chunk, where the client asked for the token counts."""
        return {**self._chunk([]), "usage": usage}

    def whole(self, pieces: list[Shown], usage: Json) -> Json:
        """The answer in one."""
        by_index: dict[int, list[Shown]] = defaultdict(list)
        for shown in pieces:
            by_index[shown.index].append(shown)
        choices = []
        for index in sorted(by_index):
            parts = by_index[index]
            piece = joined(shown.piece for shown in parts)
            choice = self._choice(index, piece.text, piece.tokens)
            choices.append({**choice, "finish_reason": parts[-1].finish_reason})
        return {**self._head, "object": self.whole_object, "choices": choices, "usage": usage}

    @abstractmethod
    def _choice(self, index: int, text: str, tokens: list[Token]) -> Json:
        """One whole answer, without its finish reason."""


class ChatReply(_Reply):
    """``chat.completion`` and its chunks."""

    prefix = "chatcmpl"
    stream_object = "chat.completion.chunk"
    whole_object = "chat.completion"

    def opening(self, answers: int) -> list[Json]:
        """One chunk for each answer that names the role."""
        delta = {"role": "assistant", "content": ""}
        return [self._chunk([self._delta(index, delta, None)]) for index in range(answers)]

    def chunks(self, shown: Shown) -> list[Json]:
        """Text in one chunk, the finish reason in one of its own."""
        found = []
        piece = shown.piece
        if piece.text or piece.tokens:
            logprobs = _chat_logprobs(piece.tokens) if self.logprobs else None
            delta = self._delta(shown.index, {"content": piece.text}, logprobs)
            found.append(self._chunk([delta]))
        if shown.finish_reason is not None:
            last = self._delta(shown.index, {}, None)
            found.append(self._chunk([{**last, "finish_reason": shown.finish_reason}]))
        return found

    @staticmethod
    def _delta(index: int, delta: Json, logprobs: Json | None) -> Json:
        return {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": None}

    def _choice(self, index: int, text: str, tokens: list[Token]) -> Json:
        logprobs = _chat_logprobs(tokens) if self.logprobs else None
        message = {"role": "assistant", "content": text, "refusal": None}
        return {"index": index, "message": message, "logprobs": logprobs}


def _chat_logprobs(tokens: list[Token]) -> Json:
    def one(text: TokenText, logprob: float) -> Json:
        data = None if text.bytes is None else list(text.bytes)
        return {"token": text.text, "logprob": logprob, "bytes": data}

    return {
        "content": [
            {
                **one(token.text, token.logprob),
                "top_logprobs": [one(text, logprob) for text, logprob in token.top],
            }
            for token in tokens
        ],
        "refusal": None,
    }


class CompletionReply(_Reply):
    """``text_completion``, the same object whole and streamed."""

    prefix = "cmpl"
    stream_object = "text_completion"
    whole_object = "text_completion"

    def __init__(
        self,
        model: str,
        fingerprint: str,
        logprobs: bool,
        include_usage: bool,
        echoes: list[str] | None = None,
    ) -> None:
        """Args: echoes: the text in front of each answer, None for none."""
        super().__init__(model, fingerprint, logprobs, include_usage)
        self._echoes = echoes

    def opening(self, answers: int) -> list[Json]:
        """The prompts, where they are to be echoed."""
        return [
            self._chunk([{**self._text(index, echo, []), "finish_reason": None}])
            for index, echo in enumerate(self._echoes or [])
        ]

    def chunks(self, shown: Shown) -> list[Json]:
        """One chunk."""
        choice = self._text(shown.index, shown.piece.text, shown.piece.tokens)
        return [self._chunk([{**choice, "finish_reason": shown.finish_reason}])]

    def _choice(self, index: int, text: str, tokens: list[Token]) -> Json:
        return self._text(index, self._echoes[index] + text if self._echoes else text, tokens)

    def _text(self, index: int, text: str, tokens: list[Token]) -> Json:
        logprobs = _completion_logprobs(tokens) if self.logprobs else None
        return {"index": index, "text": text, "logprobs": logprobs}


def _completion_logprobs(tokens: list[Token]) -> Json:
    top: list[dict[str, float]] = []
    for token in tokens:
        row: dict[str, float] = {}
        # the likelier of two tokens with the same text stays; the chosen one is always in it
        for text, logprob in (*token.top, (token.text, token.logprob)):
            row.setdefault(text.text, logprob)
        top.append(row)
    return {
        "tokens": [token.text.text for token in tokens],
        "token_logprobs": [token.logprob for token in tokens],
        "top_logprobs": top,
        "text_offset": [token.offset for token in tokens],
    }
