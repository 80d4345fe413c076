"""The Lightning data module: text or conversations in, packed blocks out.

Text is cut into blocks (`qat.packing.Blocks`), conversations are packed whole
(`qat.bestfit.PackedBlocks`, see `data.chat`). The order is one that resuming repeats.
"""

import hashlib
import sys
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning import LightningDataModule
from torch.utils.data import DataLoader, Dataset
from transformers import PreTrainedTokenizerFast

from data import corpus, instructions
from data.chat import DEMO, ChatData, rows_are_text
from data.sampler import StepBatchSampler
from qat.bestfit import PackedBlocks
from qat.chat_config import ChatConfig
from qat.errors import UserError
from qat.packing import Batch, Blocks, BlockSequence, batches, collate
from qat.rundir import is_rank_zero
from qat.text import TextConfig, cache_dir, text_file
from qat.tokens import TokenStore, token_store, tokenize_to_cache


def data_source(name: str) -> str:
    """``demo``, or the absolute path of a text file.

    Raises:
        UserError: neither; see `qat.text.text_file`.
    """
    return DEMO if name == DEMO else str(text_file(name))


class _Training(Dataset[tuple[Batch, int]]):
    """Blocks addressed by (block, loss tokens of its step)."""

    def __init__(self, blocks: BlockSequence) -> None:
        self.blocks = blocks

    def __getitem__(self, item: tuple[int, int]) -> tuple[Batch, int]:
        index, loss_tokens = item
        return self.blocks[index], loss_tokens


def _collate_training(items: Sequence[tuple[Batch, int]]) -> Batch:
    return collate([block for block, _ in items], items[0][1])


class TextDataModule(LightningDataModule):
    """Packed blocks of one source, for training, validation and calibration.

    The batches are those of `qat.packing.collate`. ``loss_tokens`` of a training batch is the
    number of targets of its whole optimizer step, over all ranks and micro-batches. The trainer
    must run with ``use_distributed_sampler=False`` and be bounded by ``max_steps``: the training
    loader is endless, and begins at the trainer's ``global_step``, which Lightning restores from
    a checkpoint before it asks for the loader. Nothing here touches the global random state.

    Args:
        source: ``demo`` or a file, see `data_source`.
        tokenizer: of the model.
        text: reading and packing.
        global_batch_size: blocks of one optimizer step.
        micro_batch_size: blocks of one forward pass on one device.
        seed: of the data order.
        chat: rows are conversations, read and trained on so; None, and rows of ``chat.format``
            text, are text with a loss on all tokens.
    """

    def __init__(
        self,
        source: str,
        tokenizer: PreTrainedTokenizerFast,
        text: TextConfig,
        global_batch_size: int,
        micro_batch_size: int,
        seed: int,
        chat: ChatConfig | None = None,
    ) -> None:
        super().__init__()
        # a rank whose share of the validation blocks is empty takes part with nothing
        self.allow_zero_length_dataloader_with_multiple_devices = True
        self.source = data_source(source)
        if text.validation:
            text_file(text.validation, "text.validation")
        self.tokenizer = tokenizer
        self.text = text
        self.global_batch_size = global_batch_size
        self.micro_batch_size = micro_batch_size
        self.seed = seed
        self.chat: ChatData | None = None
        """The conversations, their template and bad rows; None for text."""
        if chat is not None and not rows_are_text(self.source, chat, text):
            self.chat = ChatData(self.source, tokenizer, text, chat)
        self._told = False

    def prepare_data(self) -> None:
        """Fill the token caches, on one process of each machine."""
        if self.chat is not None:
            _ = self.chat.stores
            return
        self._train_store()
        self._validation_store()

    def setup(self, stage: str | None = None) -> None:
        """Open the token caches; once, say on stderr what became of the conversations."""
        train, held_out = self.train_blocks, self.held_out_blocks
        if self.chat is not None and not self._told and is_rank_zero():
            assert isinstance(train, PackedBlocks)
            assert isinstance(held_out, PackedBlocks)
            print("\n".join(self.chat.lines(train, held_out)), file=sys.stderr)
        self._told = True

    def chat_summary(self) -> dict[str, Any] | None:
        """JSON values for the report, see `ChatData.summary`; None for text."""
        train, held_out = self.train_blocks, self.held_out_blocks
        if isinstance(train, PackedBlocks) and isinstance(held_out, PackedBlocks):
            assert self.chat is not None
            return self.chat.summary(train, held_out)
        return None

    @cached_property
    def train_blocks(self) -> BlockSequence:
        """The training blocks; of text, an incomplete last one is dropped.

        Raises:
            UserError: the source is shorter than one block, or unreadable, or its rows are bad.
        """
        if self.chat is not None:
            return self.chat.blocks("train")
        store = self._train_store()
        blocks = Blocks(store, self.text.seq_len)
        if not len(blocks):
            raise UserError(
                f"data={self.source}: {len(store.tokens)} training tokens do not fill one block "
                f"of text.seq_len={self.text.seq_len}. Give more text or lower text.seq_len"
            )
        return blocks

    @cached_property
    def held_out_blocks(self) -> BlockSequence:
        """The validation blocks; an incomplete last one is padded."""
        if self.chat is not None:
            return self.chat.blocks("validation")
        return Blocks(self._validation_store(), self.text.seq_len, keep_last=True)

    def _train_store(self) -> TokenStore:
        if self.source == DEMO:
            return self._demo_store("train", self.text.max_train_tokens)
        split = None if self.text.validation else "train"
        limit = self.text.max_train_tokens
        return token_store(self.source, self.tokenizer, self.text, split, max_tokens=limit)

    def _validation_store(self) -> TokenStore:
        limit = self.text.max_validation_tokens
        if self.source == DEMO and not self.text.validation:
            return self._demo_store("validation", limit)
        name, split, key = self.source, "validation", "data"
        if self.text.validation:
            name, split, key = self.text.validation, None, "text.validation"
        return token_store(name, self.tokenizer, self.text, split, key, limit)

    def _demo_store(self, split: corpus.Split, limit: int | None) -> TokenStore:
        return tokenize_to_cache(
            corpus.documents(split),
            self.tokenizer,
            [DEMO, corpus.fingerprint(), split],
            cache_dir(self.text),
            limit,
            DEMO,
        )

    def train_dataloader(self) -> DataLoader[Any]:
        """Endless micro-batches of this rank, from the trainer's step on."""
        trainer = self.trainer
        sampler = StepBatchSampler(
            num_blocks=len(self.train_blocks),
            loss_tokens_per_block=self.train_blocks.loss_tokens(),
            global_batch_size=self.global_batch_size,
            micro_batch_size=self.micro_batch_size,
            world_size=trainer.world_size if trainer else 1,
            rank=trainer.global_rank if trainer else 0,
            seed=self.seed,
            start_step=trainer.global_step if trainer else 0,
        )
        return DataLoader(
            _Training(self.train_blocks),
            batch_sampler=sampler,  # type: ignore[arg-type]  # only iterated, it has no length
            collate_fn=_collate_training,
            generator=torch.Generator(),  # else each iterator draws from the global state
        )

    def val_dataloader(self) -> DataLoader[Any]:
        """The rank's share of the validation blocks, in order."""
        trainer = self.trainer
        world_size, rank = (trainer.world_size, trainer.global_rank) if trainer else (1, 0)
        share = range(rank, len(self.held_out_blocks), world_size)
        return DataLoader(
            self.held_out_blocks,  # type: ignore[arg-type]  # a sequence, which is enough
            batch_sampler=_Groups(share, self.micro_batch_size),
            collate_fn=collate,
            generator=torch.Generator(),
        )

    def validation_blocks(self, max_tokens: int, batch_size: int = 8) -> list[Batch]:
        """The first validation blocks, up to ``max_tokens`` tokens, for offline evaluation."""
        return batches(self.held_out_blocks, batch_size, max_tokens)

    def calibration_blocks(self, count: int, batch_size: int | None = None) -> list[Batch]:
        """Batches of ``count`` blocks (fewer if the text has fewer) for observers.

        Spread evenly over the demo's calibration split, or over the training blocks.
        """
        blocks = self.train_blocks
        if self.source == DEMO and self.chat is not None:
            blocks = self.chat.blocks("calibration")
        elif self.source == DEMO:
            blocks = Blocks(self._demo_store("calibration", None), self.text.seq_len)
        count = min(count, len(blocks))
        spread = np.arange(count) * len(blocks) // count
        return batches(blocks, batch_size or self.micro_batch_size, indices=spread)

    def fingerprint(self) -> str:
        """Sha256 (hex) of the texts: the built-in set's own, or of the files' bytes."""
        if self.source == DEMO:
            texts = [instructions.fingerprint() if self.chat else corpus.fingerprint()]
        else:
            texts = [_sha256(Path(self.source))]
        if self.text.validation:
            texts.append(_sha256(text_file(self.text.validation, "text.validation")))
        return texts[0] if len(texts) == 1 else hashlib.sha256("".join(texts).encode()).hexdigest()


class _Groups:
    """Batch sampler: consecutive groups of the given indices."""

    def __init__(self, indices: range, size: int) -> None:
        self.indices = indices
        self.size = size

    def __len__(self) -> int:
        return -(-len(self.indices) // self.size)

    def __iter__(self) -> Iterator[list[int]]:
        for begin in range(0, len(self.indices), self.size):
            yield list(self.indices[begin : begin + self.size])


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
