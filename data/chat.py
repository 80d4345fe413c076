"""Instruction data of a run: the built-in set or files, tokenized and packed whole."""

from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerFast

from data import corpus, instructions
from qat.bestfit import PackedBlocks
from qat.chat import BadRows, Share, bad_rows, chat_stores, chat_template, file_stores
from qat.chat_config import ChatConfig, Format
from qat.chat_rows import Item, find_format
from qat.errors import UserError
from qat.text import TextConfig, cache_dir
from qat.tokens import TokenStore

DEMO = "demo"


def rows_are_text(source: str, chat: ChatConfig, text: TextConfig) -> bool:
    """Whether ``chat.format`` makes a source plain text, which is read as without a chat section.

    Raises:
        UserError: see `find_format`.
    """
    if source == DEMO:
        return chat.format == "text"
    return find_format(Path(source), chat, text.column) == "text"


class ChatData:
    """The conversations of one run.

    Args:
        source: ``demo`` for the built-in set, or the path of a file.
        tokenizer: of the model, with the run's new tokens already added.
        text: length of a block, held-out share or validation file, limits, cache.
        chat: rows, template and targets.

    Raises:
        UserError: rows of no known form, or a template that cannot be used.
    """

    def __init__(
        self, source: str, tokenizer: PreTrainedTokenizerFast, text: TextConfig, chat: ChatConfig
    ) -> None:
        self.source = source
        self.tokenizer = tokenizer
        self.text = text
        self.chat = chat
        path = text.validation if source == DEMO else source
        # the built-in set has the form of messages, a validation file beside it its own
        self.form: Format = "messages"
        if path:
            key = "text.validation" if source == DEMO else "data"
            self.form = find_format(Path(path), chat, text.column, key)
        self.template = chat_template(chat, tokenizer)

    @cached_property
    def stores(self) -> dict[str, TokenStore]:
        """Stores by split: train, validation, and of the built-in set calibration.

        Raises:
            UserError: too many bad rows, or too few good ones.
        """
        train = Share("train", self.text.max_train_tokens)
        validation = Share("validation", self.text.max_validation_tokens)
        if self.source == DEMO:
            shares = [train, validation, Share("calibration")]
            stores = dict(zip([share.name for share in shares], self._demo(shares)))
        elif self.text.validation:
            whole = Share("all", train.max_tokens)
            stores = {"train": self._file(self.source, [whole], "data")[0]}
        else:
            both = self._file(self.source, [train, validation], "data")
            stores = dict(zip(["train", "validation"], both))
        if self.text.validation:
            whole = Share("all", validation.max_tokens)
            held_out = self._file(self.text.validation, [whole], "text.validation")
            stores["validation"] = held_out[0]
        return stores

    def _file(self, name: str, shares: list[Share], key: str) -> list[TokenStore]:
        return file_stores(
            name, self.form, self.tokenizer, self.template, self.chat, self.text, shares, key
        )

    def _demo(self, shares: list[Share]) -> list[TokenStore]:
        stores = []
        for share in shares:
            # the split is that of the object in question, not a hash of the row
            stores += chat_stores(
                f"data={DEMO}",
                lambda split=share.name: _demo_items(split, self.chat),  # type: ignore[misc]
                [DEMO, instructions.fingerprint(), share.name, self.chat.system],
                self.tokenizer,
                self.template,
                self.chat,
                cache_dir(self.text),
                [share],
                lambda _, name=share.name: name,  # type: ignore[misc]
            )
        return stores

    def blocks(self, split: str) -> PackedBlocks:
        """The best-fit blocks of a split.

        Raises:
            UserError: no conversation has a target within ``text.seq_len`` tokens.
        """
        store = self.stores[split]
        blocks = PackedBlocks(store, self.text.seq_len)
        if not len(blocks):
            raise UserError(
                f"text.seq_len={self.text.seq_len}: none of the {store.documents} {split} "
                f"conversations of {store.info['source']} reaches the assistant's text within so "
                "many tokens. Raise it"
            )
        return blocks

    @property
    def bad_rows(self) -> list[BadRows]:
        """Rows left out, one entry for each file that was read."""
        found = {store.info["source"]: bad_rows(store) for store in self.stores.values()}
        return [found[source] for source in found if source != f"data={DEMO}"]

    def summary(self, train: PackedBlocks, validation: PackedBlocks) -> dict[str, Any]:
        """JSON values for the report: what was read, left out, packed and trained on."""
        return {
            "format": self.form,
            "template": self.template.name,
            "train_on": self.chat.train_on,
            "bad_rows": [
                {"source": b.source, "rows": b.rows, "bad": b.bad, "first": list(b.first)}
                for b in self.bad_rows
            ],
            "notes": self._notes(),
            "train": _packed(train),
            "validation": _packed(validation),
        }

    def _notes(self) -> list[str]:
        notes = dict.fromkeys(self.template.notes.values())
        for store in self.stores.values():
            notes |= dict.fromkeys(store.info["notes"])
        return list(notes)

    def lines(self, train: PackedBlocks, validation: PackedBlocks) -> list[str]:
        """What to show the user once: the choices made, bad rows, cut conversations."""
        lines = [f"data={self.source}: chat.format={self.form}, template: {self.template.name}"]
        lines += self._notes()
        for bad in self.bad_rows:
            lines += bad.lines()
        for split, blocks in (("training", train), ("validation", validation)):
            if blocks.cut or blocks.dropped:
                lines.append(
                    f"text.seq_len={self.text.seq_len}: of {blocks.store.documents} {split} "
                    f"conversations {blocks.cut} lost their end and {blocks.dropped} were left "
                    "out, because the assistant's text begins later"
                )
        return lines


def _packed(blocks: PackedBlocks) -> dict[str, Any]:
    return {
        "conversations": blocks.conversations,
        "blocks": len(blocks),
        "efficiency": blocks.efficiency,
        "loss_tokens": int(blocks.loss_tokens().sum()),
        "cut": blocks.cut,
        "dropped": blocks.dropped,
    }


def _demo_items(split: corpus.Split, chat: ChatConfig) -> Iterator[Item]:
    for index, messages in enumerate(instructions.conversations(split)):
        if chat.system is not None:
            messages = [{"role": "system", "content": chat.system}, *messages]
        yield Item(f"conversation {index}", messages)
