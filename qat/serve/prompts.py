"""From requests to token ids: the artifact's tokenizer and its chat template."""

import asyncio
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import TemplateError
from transformers import GenerationConfig, PreTrainedTokenizerFast

from qat.errors import UserError
from qat.models import load_tokenizer
from qat.runtime import read_artifact_config
from qat.serve.errors import ApiError
from qat.serve.protocol import Message
from qat.serve.text import CONTEXT_TOKENS, TokenTexts


@dataclass(frozen=True)
class Prompt:
    """A prompt in tokens."""

    ids: list[int]
    """At least one token."""
    text: str = ""
    """The same as text, where `echo` needs it."""
    context: tuple[int, ...] = ()
    """Tokens that the answer continues within a line, see `qat.serve.text.Detokenizer`."""


class Prompts:
    """Reads requests with the tokenizer of one artifact."""

    def __init__(self, artifact: Path) -> None:
        """Raises UserError when the artifact holds no config or no fast tokenizer."""
        config, _ = read_artifact_config(artifact)
        try:
            self.tokenizer = load_tokenizer(str(artifact))
            # a tokenizer is not made for two threads, and a long prompt takes a while: it is
            # encoded beside the event loop, which decodes
            self._encoder = load_tokenizer(str(artifact))
        except UserError as error:
            raise UserError(str(error).replace("model=", "artifact=", 1)) from error
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="encode")
        self.texts = TokenTexts(self.tokenizer)
        self.vocab_size: int = getattr(config, "vocab_size", None) or len(self.tokenizer)
        self.stop_token_ids = _stop_token_ids(artifact, self.tokenizer)

    @property
    def chat(self) -> bool:
        """Whether the artifact has a chat template."""
        return bool(self.tokenizer.chat_template)

    async def of_chat(self, messages: Sequence[Message]) -> Prompt:
        """The prompt of a chat, up to where the assistant begins.

        Raises:
            ApiError: 400, no chat template, or one that refuses these messages.
        """
        if not self.chat:
            raise ApiError(
                400,
                "this model has no chat template; send its text to /v1/completions",
                param="messages",
                code="no_chat_template",
            )
        turns = [{"role": message.role, "content": message.content} for message in messages]
        return Prompt(await self._run(self._encode_chat, turns))

    async def of_text(self, text: str) -> Prompt:
        """A text to continue.

        Raises:
            ApiError: 400, an empty text where the tokenizer has no token to start one.
        """
        ids = await self._run(self._encode_text, text)
        return Prompt(ids, text, tuple(ids[-CONTEXT_TOKENS:]))

    def of_ids(self, ids: list[int], echo: bool) -> Prompt:
        """Token ids to continue; their text is worked out for `echo` only.

        Raises:
            ApiError: 400, an id outside the vocabulary.
        """
        wrong = next((token for token in ids if not 0 <= token < self.vocab_size), None)
        if wrong is not None:
            raise ApiError(
                400,
                f"prompt: {wrong} is no token of this model, ids run from 0 to "
                f"{self.vocab_size - 1}",
                param="prompt",
                code="invalid_value",
            )
        text: Any = ""
        if echo:
            text = self.tokenizer.decode(
                ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
            )
        return Prompt(ids, str(text), tuple(ids[-CONTEXT_TOKENS:]))

    def close(self) -> None:
        """End the encoder's thread."""
        self._thread.shutdown(wait=False, cancel_futures=True)

    async def _run(self, function: Any, argument: Any) -> list[int]:
        loop = asyncio.get_running_loop()
        ids: list[int] = await loop.run_in_executor(self._thread, function, argument)
        return ids

    def _encode_chat(self, turns: list[dict[str, str]]) -> list[int]:
        try:
            text = self._encoder.apply_chat_template(
                turns, tokenize=False, add_generation_prompt=True
            )
        except (TemplateError, ValueError, TypeError) as error:
            raise ApiError(
                400,
                f"messages: the model's chat template refuses them: {error}",
                param="messages",
                code="invalid_value",
            ) from None
        # the template has written the special tokens
        ids: list[int] = self._encoder(text, add_special_tokens=False).input_ids
        return ids or self._encode_text("")

    def _encode_text(self, text: str) -> list[int]:
        ids: list[int] = self._encoder(text).input_ids
        if not ids and self._encoder.bos_token_id is not None:
            ids = [self._encoder.bos_token_id]
        if not ids:
            raise ApiError(
                400,
                "prompt: empty, and this model has no token to start a text with",
                param="prompt",
                code="invalid_value",
            )
        return ids


def _stop_token_ids(artifact: Path, tokenizer: PreTrainedTokenizerFast) -> tuple[int, ...]:
    """The end-of-text tokens that generation_config.json and the tokenizer name."""
    found: set[int] = set()
    if (artifact / "generation_config.json").is_file():
        end = GenerationConfig.from_pretrained(artifact).eos_token_id
        found |= set(end if isinstance(end, list) else [] if end is None else [end])
    if tokenizer.eos_token_id is not None:
        found.add(int(tokenizer.eos_token_id))
    return tuple(sorted(found))
