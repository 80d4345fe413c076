"""Instruction data: conversations rendered, tokenized, and stored with a target for each token.

A conversation is rendered to one text (`qat.chat_templates`), the whole text is tokenized, and a
token is a target when at least one of its characters lies in an assistant span: the same rule by
which transformers makes ``assistant_tokens_mask``. So a token that straddles the border of a span
is trained on. A token of no characters (a sentencepiece prefix) counts with the character that
follows it, and every token of a character that was split into bytes counts with that character.

Rows that do not fit are left out, counted, and named with file and line; above
``chat.max_bad_rows`` they stop the run. The count is part of the stored file, so a run that finds
the tokens in the cache says the same.
"""

import json
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast

from qat.chat_config import ChatConfig, Format
from qat.chat_rows import Item, Message, RowError, read_conversations
from qat.chat_templates import ChatTemplate, NamedTemplate, Rendered, resolve_template
from qat.errors import UserError
from qat.text import TextConfig, cache_dir, hash_split, text_file
from qat.tokens import (
    NoTextError,
    StoreWriter,
    TokenStore,
    adds_bos,
    new_store,
    open_store,
    store_path,
)

_VERSION = 1  # raise it when the same rows would give other tokens or targets
_BATCH_CHARACTERS = 1 << 18
_SHOWN = 10
# Without a single usable row among so many, the file is of another kind; reading on is useless.
_HOPELESS = 1000


@dataclass(frozen=True)
class BadRows:
    """Rows of a source that could not be used."""

    source: str
    """As the user wrote it, with its key: ``data=chats.jsonl``."""
    rows: int
    """Rows read."""
    bad: int
    """Those among them that were left out."""
    first: tuple[str, ...]
    """Place and reason of the first ten."""

    def lines(self) -> list[str]:
        """What to show the user; nothing if all rows were good."""
        if not self.bad:
            return []
        shown = [f"{self.source}: {reason}" for reason in self.first]
        if self.bad > len(self.first):
            shown.append(f"{self.source}: ... and {self.bad - len(self.first)} more")
        return [f"{self.source}: {self.bad} of {self.rows} rows left out:", *shown]

    def check(self, config: ChatConfig) -> None:
        """Raise UserError when there are more than ``chat.max_bad_rows``."""
        if self.bad > config.max_bad_rows * self.rows:
            raise UserError(
                "\n".join(self.lines())
                + f"\nchat.max_bad_rows={config.max_bad_rows}: at most that share of the rows may "
                "be unusable. Correct them, or raise it"
            )


def chat_template(config: ChatConfig, tokenizer: PreTrainedTokenizerFast) -> ChatTemplate:
    """The template that ``chat.template`` names, ready for use.

    Raises:
        UserError: see `resolve_template` and `ChatTemplate`.
    """
    named: NamedTemplate = resolve_template(config.template, tokenizer, adds_bos(tokenizer))
    return ChatTemplate(named, tokenizer)


def bad_rows(store: TokenStore) -> BadRows:
    """What was left out while the store was built."""
    info = store.info
    return BadRows(info["source"], info["rows"], info["bad"], tuple(info["first"]))


@dataclass(frozen=True)
class Share:
    """A part of a source that gets its own store."""

    name: str
    max_tokens: int | None = None
    """Whole conversations up to so many tokens."""


def chat_stores(
    source: str,
    items: Callable[[], Iterable[Item]],
    identity: list[Any],
    tokenizer: PreTrainedTokenizerFast,
    template: ChatTemplate,
    config: ChatConfig,
    folder: Path,
    shares: list[Share],
    share_of: Callable[[str], str],
) -> list[TokenStore]:
    """Tokenize conversations in one pass and constant memory, or open what an earlier call left.

    Args:
        source: named in messages, ``key=value``.
        items: the rows; asked for when the cache has nothing.
        identity: JSON values that name the rows and how they are shared out.
        tokenizer: a fast tokenizer.
        template: see `chat_template`.
        config: what is a target, and how many rows may be bad.
        folder: the cache.
        shares: the stores to return.
        share_of: name of the share of a conversation, from its canonical JSON; names that
            ``shares`` lacks are passed over.

    Raises:
        UserError: too many bad rows, or the folder cannot be written.
        NoTextError: a share is empty.
    """
    known = [_VERSION, identity, config.train_on, template.identity]
    limits = [[share.name, share.max_tokens] for share in shares]
    paths = [store_path(folder, [*known, share.name, limits], tokenizer) for share in shares]
    stores = [open_store(path) for path in paths]
    if any(store is None for store in stores):
        with ExitStack() as stack:
            # in this order, so that an empty share is found before any file gets its name
            writers = [
                stack.enter_context(new_store(path, len(tokenizer), targets=True)) for path in paths
            ]
            outputs = {share.name: (share, writer) for share, writer in zip(shares, writers)}
            encoder = _Encoder(tokenizer, template, config)
            _fill(source, items(), encoder, config, outputs, share_of)
            for share, writer in zip(shares, writers):
                if not writer.documents:
                    raise NoTextError(f"{source}: no conversation in the {share.name} share")
        stores = [open_store(path) for path in paths]
    found = [store for store in stores if store is not None]
    assert len(found) == len(shares)
    for store in found:
        bad_rows(store).check(config)
    return found


def file_stores(
    name: str,
    form: Format,
    tokenizer: PreTrainedTokenizerFast,
    template: ChatTemplate,
    config: ChatConfig,
    text: TextConfig,
    shares: list[Share],
    key: str = "data",
) -> list[TokenStore]:
    """The conversations of a file, as `chat_stores` has them.

    Args:
        name: path of the file.
        form: of its rows, from `qat.chat_rows.find_format`; not text.
        tokenizer: a fast tokenizer.
        template: see `chat_template`.
        config: columns, targets, and how many rows may be bad.
        text: the held-out share and the cache.
        shares: train and validation, by the hash of the conversation; or one share, ``all``.
        key: the configuration key of the file, for messages.

    Raises:
        UserError: see `chat_stores` and `qat.chat_rows.read_conversations`.
    """
    path = text_file(name, key)
    status = path.stat()
    columns = [config.messages_column, config.prompt_column, config.completion_column]
    identity = [str(path), status.st_size, status.st_mtime_ns, form, columns, config.system]
    whole = [share.name for share in shares] == ["all"]
    if not whole:
        identity.append(text.validation_fraction)
    source = f"{key}={name}"
    try:
        return chat_stores(
            source,
            lambda: read_conversations(path, form, config, key),
            identity,
            tokenizer,
            template,
            config,
            cache_dir(text),
            shares,
            lambda row: "all" if whole else hash_split(row, text),
        )
    except NoTextError as error:
        if whole:
            raise NoTextError(f"{source}: no conversation in it") from None
        raise NoTextError(
            f"{error}: too few to hold out text.validation_fraction={text.validation_fraction}. "
            "Give a separate file with text.validation=, or change text.validation_fraction"
        ) from None


class _Tally:
    """Rows and bad rows so far."""

    def __init__(self, source: str, config: ChatConfig) -> None:
        self.source = source
        self.config = config
        self.rows = self.bad = 0
        self.first: list[str] = []

    def result(self) -> BadRows:
        return BadRows(self.source, self.rows, self.bad, tuple(self.first))

    def count(self, item: Item, reason: str | None) -> None:
        self.rows += 1
        if reason is not None:
            self.bad += 1
            if len(self.first) < _SHOWN:
                self.first.append(f"{item.where}: {reason}")
        if self.rows == _HOPELESS == self.bad:
            self.result().check(self.config)


def _fill(
    source: str,
    items: Iterable[Item],
    encoder: "_Encoder",
    config: ChatConfig,
    outputs: dict[str, tuple[Share, StoreWriter]],
    share_of: Callable[[str], str],
) -> None:
    tally = _Tally(source, config)
    full: set[str] = set()
    with tqdm(desc=f"tokenize {source}", unit="row", unit_scale=True, delay=2, leave=False) as bar:
        for batch in _batches(_rendered(items, encoder.template, tally, share_of)):
            bar.update(tally.rows - bar.n)
            wanted = [(name, text) for name, text in batch if name in outputs and name not in full]
            encoded = encoder([text for _, text in wanted])
            for (name, _), (ids, targets) in zip(wanted, encoded):
                if name in full:
                    continue
                share, writer = outputs[name]
                limit = share.max_tokens
                # a conversation is not cut, but the first one is taken whatever its length
                if limit is not None and writer.total and writer.total + len(ids) > limit:
                    full.add(name)
                    continue
                writer.add(ids, targets)
                writer.end_document()
            if len(full) == len(outputs):
                break
    tally.result().check(config)
    for _, writer in outputs.values():
        writer.info = {
            "source": source,
            "rows": tally.rows,
            "bad": tally.bad,
            "first": tally.first,
            "template": encoder.template.name,
            "notes": list(encoder.template.notes.values()),
        }


def _rendered(
    items: Iterable[Item],
    template: ChatTemplate,
    tally: _Tally,
    share_of: Callable[[str], str],
) -> Iterator[tuple[str, Rendered]]:
    """Share and text of each good row; the bad ones are counted."""
    for item in items:
        if item.messages is None:
            tally.count(item, item.reason)
            continue
        try:
            text = template.rendered(item.messages)
        except RowError as error:
            tally.count(item, str(error))
            continue
        tally.count(item, None)
        yield share_of(canonical(item.messages)), text


def canonical(messages: list[Message]) -> str:
    """A conversation as one string, equal for equal conversations."""
    return json.dumps([[message["role"], message["content"]] for message in messages])


def _batches(items: Iterator[tuple[str, Rendered]]) -> Iterator[list[tuple[str, Rendered]]]:
    batch: list[tuple[str, Rendered]] = []
    size = 0
    for item in items:
        batch.append(item)
        size += len(item[1].text)
        if size >= _BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


class _Encoder:
    """Texts with spans to tokens with targets."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerFast, template: ChatTemplate, config: ChatConfig
    ) -> None:
        self.template = template
        self.train_on = config.train_on
        state = json.loads(tokenizer.backend_tokenizer.to_str())
        # set by calls, not part of the tokenizer
        state["truncation"] = state["padding"] = None
        _keep_spaces(state["post_processor"])
        self.backend = Tokenizer.from_str(json.dumps(state))

    def __call__(self, texts: list[Rendered]) -> Iterator[tuple[list[int], NDArray[np.uint8]]]:
        # templates write their special tokens themselves
        encodings = self.backend.encode_batch([t.text for t in texts], add_special_tokens=False)
        for text, encoding in zip(texts, encodings):
            ids = encoding.ids
            if self.train_on == "all":
                yield ids, np.ones(len(ids), dtype=np.uint8)
            else:
                offsets = np.asarray(encoding.offsets, dtype=np.int64).reshape(-1, 2)
                yield ids, token_targets(offsets, text.spans)


def _keep_spaces(processor: Any) -> None:
    """Let a byte-level post-processor report a token's leading space as part of it."""
    if isinstance(processor, dict):
        if "trim_offsets" in processor:
            processor["trim_offsets"] = False
        for value in processor.values():
            _keep_spaces(value)
    elif isinstance(processor, list):
        for value in processor:
            _keep_spaces(value)


def token_targets(offsets: NDArray[np.int64], spans: list[tuple[int, int]]) -> NDArray[np.uint8]:
    """Which tokens have a character in a span.

    Args:
        offsets: int64 [T, 2], first character of each token and the one behind its last.
        spans: disjoint, in order, none empty.

    Returns:
        uint8 [T]; a token of no characters counts with the character at its place.

    >>> token_targets(np.array([[0, 2], [2, 4], [4, 4], [4, 6]]), [(3, 5)]).tolist()
    [0, 1, 1, 1]
    """
    begins, ends = np.asarray(spans, dtype=np.int64).reshape(-1, 2).T
    first = offsets[:, 0]
    last = np.maximum(offsets[:, 1], first + 1)
    # the first span that ends behind the token's first character, if there is one
    span = np.searchsorted(ends, first, side="right")
    begin = np.append(begins, np.iinfo(np.int64).max)[span]
    return (begin < last).astype(np.uint8)
