"""From tokens to text while they arrive: whole characters, no stop string, log-probabilities.

`OutputText` takes the tokens of one sequence and gives the text that can be shown. Joined, the
pieces are what decoding all tokens at once gives, cut in front of the first stop string.
"""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from transformers import PreTrainedTokenizerFast

from qat.serve.requests import TokenEvent

BROKEN = "\ufffd"
"""What decoders write for bytes that are no character (yet)."""
LONGEST_WAIT = 32
"""Tokens without a whole character at their end after which they are shown as they are."""
LONGEST_CHARACTER = 4
"""Bytes, hence tokens at most, of one character."""
CONTEXT_TOKENS = 6
"""Tokens of a prompt that is continued which decide whether the answer starts with a space."""
LEAST_LOGPROB = -9999.0
"""Stands for minus infinity, which JSON lacks; OpenAI's value."""


class Detokenizer:
    """Decodes tokens one by one; a character that is split over tokens comes out whole."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, context: Sequence[int] = ()) -> None:
        """Args: context: tokens in front of the first, whose text does not come out."""
        self._tokenizer = tokenizer
        self._special = set(tokenizer.all_special_ids)
        before = [token for token in context[-CONTEXT_TOKENS:] if token not in self._special]
        # a prompt of token ids may end within a character
        self._ids = [] if self._decode(before).endswith(BROKEN) else before
        self._shown = len(self._ids)

    def push(self, token_id: int) -> str:
        """The text that this token completes; empty inside a character."""
        if token_id in self._special:
            return ""
        self._ids.append(token_id)
        text = self._decode(self._ids)
        waiting = len(self._ids) - self._shown
        if not text.endswith(BROKEN):
            return self._show(len(self._ids), text)
        if waiting > LONGEST_WAIT:
            end = len(self._ids) - LONGEST_CHARACTER
            return self._show(end, self._decode(self._ids[:end]))
        return ""

    def flush(self) -> str:
        """What is left at the end, an incomplete character as U+FFFD."""
        return self._show(len(self._ids), self._decode(self._ids))

    def _show(self, end: int, text: str) -> str:
        """What `text`, all tokens before `end`, adds to what has been shown."""
        before = self._decode(self._ids[: self._shown])
        if end > self._shown:
            # the last shown ones stay: some decoders treat the first token apart
            self._ids = self._ids[self._shown :]
            self._shown = end - self._shown
        return text[len(before) :]

    def _decode(self, ids: Sequence[int]) -> str:
        text: Any = self._tokenizer.decode(
            list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        return str(text)


class StopStrings:
    """Lets text through up to the first stop string, and never a part of one."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops, self._held = tuple(stops), ""

    def push(self, text: str) -> tuple[str, bool]:
        """The text that may be shown, and whether a stop string has been met."""
        held = self._held + text
        found = [place for stop in self._stops if (place := held.find(stop)) >= 0]
        if found:
            self._held = ""
            return held[: min(found)], True
        keep = max((_overlap(held, stop) for stop in self._stops), default=0)
        self._held = held[len(held) - keep :]
        return held[: len(held) - keep], False

    def flush(self) -> str:
        """The beginning of a stop string that has not come about."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` with which `stop` begins, the whole of it apart."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)


@dataclass(frozen=True)
class TokenText:
    """One token as a client may read it."""

    text: str
    """Its text; ``bytes:\\xe2\\x98`` where it is only a part of a character."""
    bytes: tuple[int, ...] | None
    """Its bytes in UTF-8; None where the tokenizer does not tell."""


class TokenTexts:
    """The texts of single tokens, remembered."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self._tokenizer = tokenizer
        self._known: dict[int, TokenText] = {}

    def __getitem__(self, token_id: int) -> TokenText:
        if token_id not in self._known:
            self._known[token_id] = self._read(token_id)
        return self._known[token_id]

    @cached_property
    def _byte_level(self) -> dict[str, int] | None:
        """Character -> byte of the byte-level alphabet, None for another kind of tokenizer."""
        parts = json.loads(self._tokenizer.backend_tokenizer.to_str())
        return _alphabet() if '"ByteLevel"' in json.dumps(parts["decoder"]) else None

    def _read(self, token_id: int) -> TokenText:
        piece: Any = self._tokenizer.convert_ids_to_tokens(token_id)
        if piece is None:  # an embedding may have more rows than the tokenizer has tokens
            return TokenText(f"<{token_id}>", None)
        if token_id in self._tokenizer.added_tokens_decoder:
            return TokenText(piece, tuple(piece.encode()))
        if self._byte_level is not None and all(c in self._byte_level for c in piece):
            data = bytes(self._byte_level[c] for c in piece)
        elif len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">"):
            data = bytes([int(piece[3:5], 16)])
        else:
            data = piece.replace("\u2581", " ").encode()
        try:
            return TokenText(data.decode(), tuple(data))
        except UnicodeDecodeError:
            return TokenText("bytes:" + "".join(f"\\x{b:02x}" for b in data), tuple(data))


def _alphabet() -> dict[str, int]:
    """GPT-2's spelling of bytes: printable ones as themselves, the rest from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    letters = {chr(byte): byte for byte in printable}
    rest = (byte for byte in range(256) if byte not in set(printable))
    return letters | {chr(0x100 + i): byte for i, byte in enumerate(rest)}


@dataclass(frozen=True)
class Token:
    """A token of the answer with its log-probabilities."""

    offset: int
    """Characters of the answer in front of it."""
    text: TokenText
    logprob: float
    """Nats, at least `LEAST_LOGPROB`."""
    top: tuple[tuple[TokenText, float], ...]
    """The likeliest tokens at this place, likeliest first."""


@dataclass
class Piece:
    """What can be shown after a token, or at the end."""

    text: str = ""
    tokens: list[Token] = field(default_factory=list)
    """The tokens that begin in this text; empty when no log-probabilities were asked for."""
    stopped: bool = False
    """A stop string has been met; nothing follows."""


class OutputText:
    """The answer of one sequence as text."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerFast,
        texts: TokenTexts,
        stops: Sequence[str] = (),
        context: Sequence[int] = (),
    ) -> None:
        """Args: texts: shared by all sequences; context: see `Detokenizer`."""
        self._detokenizer = Detokenizer(tokenizer, context)
        self._stops = StopStrings(stops)
        self._texts = texts
        self._decoded = self._shown = 0
        self._waiting: list[Token] = []

    def add(self, event: TokenEvent) -> Piece:
        """Take one token (not one that ends the sequence)."""
        if event.logprob is not None:
            top = tuple((self._texts[token], _finite(value)) for token, value in event.top)
            self._waiting.append(
                Token(self._decoded, self._texts[event.token_id], _finite(event.logprob), top)
            )
        return self._piece(self._detokenizer.push(event.token_id))

    def finish(self) -> Piece:
        """What was held back, at the end of the sequence."""
        piece = self._piece(self._detokenizer.flush())
        if not piece.stopped:
            rest = self._stops.flush()
            self._shown += len(rest)
            piece.text += rest
            piece.tokens += self._waiting
            self._waiting = []
        return piece

    def _piece(self, text: str) -> Piece:
        self._decoded += len(text)
        shown, stopped = self._stops.push(text)
        self._shown += len(shown)
        ready = [token for token in self._waiting if token.offset < self._shown]
        self._waiting = self._waiting[len(ready) :]
        return Piece(shown, ready, stopped)


def _finite(value: float) -> float:
    return max(value, LEAST_LOGPROB)


def joined(pieces: Iterable[Piece]) -> Piece:
    """All pieces of an answer as one."""
    whole = Piece()
    for piece in pieces:
        whole.text += piece.text
        whole.tokens += piece.tokens
        whole.stopped = piece.stopped
    return whole
