"""Packing documents into blocks, and the masks that keep them apart.

Block i holds the tokens ``i*S ... i*S + S - 1`` of the token store. A block may end in the middle
of a document; the rest continues in the next block with positions from 0 and without the earlier
context. Inside a block a token attends to earlier tokens of its own document only. Position ids
alone do not achieve that, and a boolean mask is wrong for some models, hence the additive mask.

Shapes: B blocks, S tokens of a block, T tokens of the store, D documents.
"""

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from qat import row_attention
from qat.errors import UserError
from qat.tokens import TokenStore

Batch = dict[str, Tensor]

IGNORE = -100
"""Label of a position without a target (torch's ``ignore_index``)."""

# Without `layer_types`, these attend through `sliding_window` in every layer when it is set.
_WINDOWED = frozenset(
    [
        "blt",
        "doge",
        "ministral3",
        "mistral",
        "mixtral",
        "phi3",
        "phi4_multimodal",
        "phimoe",
        "qwen3_moe",
        "starcoder2",
    ]
)

# State that runs along the sequence (recurrence, convolution): no mask stops it.
_RECURRENT = frozenset(
    [
        "bailing_hybrid",
        "bamba",
        "falcon_h1",
        "falcon_mamba",
        "granitemoehybrid",
        "jamba",
        "kimi_linear",
        "lfm2",
        "lfm2_moe",
        "lfm3",
        "mamba",
        "mamba2",
        "minimax",
        "nemotron_h",
        "olmo_hybrid",
        "qwen3_next",
        "recurrent_gemma",
        "rwkv",
        "xlstm",
        "zamba",
        "zamba2",
    ]
)

# Position biases that transformers derives from a 2-D mask of the whole row.
_ALIBI = frozenset(["bloom", "mpt"])


class BlockSequence(Protocol):
    """Blocks by number: `Blocks` of contiguous text, `qat.bestfit.PackedBlocks` of whole rows."""

    @property
    def store(self) -> TokenStore:
        """The tokens."""

    @property
    def seq_len(self) -> int:
        """S."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Batch: ...

    def loss_tokens(self) -> NDArray[np.int64]:
        """Number of targets of each block, int64 [number of blocks]."""


def block(
    tokens: NDArray[np.int64], labels: NDArray[np.int64], starts: NDArray[np.int64], seq_len: int
) -> Batch:
    """One block, padded.

    Args:
        tokens: int64 [N], at most S.
        labels: int64 [N], already shifted; -100 where there is no target.
        starts: int64, where each document starts among the tokens; the first one is 0.
        seq_len: S.

    Returns:
        ``input_ids``, ``labels`` and ``position_ids`` int64 [S], positions counted within the
        document; ``segment_ids`` int32 [S], one number per document. The padding is a segment of
        its own, without labels.
    """
    places = np.arange(len(tokens))
    segments = np.searchsorted(starts, places, side="right") - 1
    padding = seq_len - len(tokens)
    positions = np.concatenate([places - starts[segments], np.arange(padding)])
    segments = np.pad(segments, (0, padding), constant_values=len(starts)).astype(np.int32)
    return {
        "input_ids": torch.from_numpy(np.pad(tokens, (0, padding))),
        "labels": torch.from_numpy(np.pad(labels, (0, padding), constant_values=IGNORE)),
        "position_ids": torch.from_numpy(positions),
        "segment_ids": torch.from_numpy(segments),
    }


class Blocks:
    """The blocks of a token store without targets: text, cut every S tokens.

    Args:
        store: the tokens.
        seq_len: S.
        keep_last: keep an incomplete last block, padded; else it is dropped.
    """

    def __init__(self, store: TokenStore, seq_len: int, keep_last: bool = False) -> None:
        assert store.targets is None
        self.store = store
        self.seq_len = seq_len
        total = len(store.tokens)
        self.num_blocks = -(-total // seq_len) if keep_last else total // seq_len

    def __len__(self) -> int:
        return self.num_blocks

    def __getitem__(self, index: int) -> Batch:
        """See `block`; a label is the token that follows, none at the end of a document."""
        if not 0 <= index < self.num_blocks:
            raise IndexError(f"block {index} of {self.num_blocks}")
        offsets, size = self.store.offsets, self.seq_len
        begin = index * size
        end = min(begin + size, len(self.store.tokens))
        # document of each token: the last one that starts at or before it
        first = int(np.searchsorted(offsets, begin, side="right")) - 1
        last = int(np.searchsorted(offsets, end, side="left"))
        starts = np.maximum(np.asarray(offsets[first:last]), begin) - begin
        window = np.asarray(self.store.tokens[begin : end + 1], dtype=np.int64)
        labels = np.full(end - begin, IGNORE, dtype=np.int64)
        labels[: len(window) - 1] = window[1:]
        document_ends = np.asarray(offsets[first + 1 : last + 1]) - 1 - begin
        labels[document_ends[document_ends < size]] = IGNORE
        return block(window[: end - begin], labels, starts, size)

    def loss_tokens(self) -> NDArray[np.int64]:
        """Number of targets of each block, int64 [number of blocks], without reading tokens."""
        size = self.seq_len
        counts = np.full(self.num_blocks, size, dtype=np.int64)
        if self.num_blocks * size > len(self.store.tokens):
            counts[-1] = len(self.store.tokens) - (self.num_blocks - 1) * size
        # every token predicts the next one, except the last one of each document
        ends = (np.asarray(self.store.offsets[1:]) - 1) // size
        return counts - np.bincount(ends, minlength=self.num_blocks)[: self.num_blocks]


def collate(blocks: Sequence[Batch], loss_tokens: int | None = None) -> Batch:
    """Stack blocks to [B, S] and add ``loss_tokens``, int64 scalar.

    Args:
        blocks: of equal length.
        loss_tokens: the number that losses are divided by; None counts the batch's targets.
    """
    batch = {name: torch.stack([block[name] for block in blocks]) for name in blocks[0]}
    if loss_tokens is None:
        loss_tokens = max(1, int((batch["labels"] != IGNORE).sum()))
    batch["loss_tokens"] = torch.tensor(loss_tokens, dtype=torch.int64)
    return batch


def batches(
    blocks: BlockSequence, batch_size: int, max_tokens: int | None = None, indices: Any = None
) -> list[Batch]:
    """Blocks in order, for evaluation and calibration.

    Args:
        blocks: where from.
        batch_size: blocks of one batch; the last one may be smaller.
        max_tokens: stop after the block that reaches so many tokens.
        indices: which blocks; None takes all, from the first.
    """
    chosen = list(range(len(blocks)) if indices is None else indices)
    if max_tokens is not None:
        chosen = chosen[: max(1, -(-max_tokens // blocks.seq_len))]
    groups = [chosen[i : i + batch_size] for i in range(0, len(chosen), batch_size)]
    return [collate([blocks[int(i)] for i in group]) for group in groups]


def attention_mask(
    segment_ids: Tensor, config: PreTrainedConfig, dtype: torch.dtype
) -> Tensor | dict[str, Tensor]:
    """The additive mask of packed blocks, for ``model(attention_mask=...)``.

    Args:
        segment_ids: integers [B, S].
        config: of the model; models that mix full and sliding-window layers get a dict with one
            mask per layer type, as their ``forward`` accepts it.
        dtype: floating point, of the model.

    Returns:
        [B, 1, S, S]: 0 where query (row) may see key (column): same segment, not later, within
        the window where the layer has one; else the smallest finite value of ``dtype``.

    Raises:
        UserError: the architecture would let documents see each other.
    """
    config = config.get_text_config()
    windows = _windows(config, segment_ids.shape[1])
    masks = {kind: _mask(segment_ids, window, dtype) for kind, window in windows.items()}
    return masks if len(masks) > 1 else next(iter(masks.values()))


def _mask(segment_ids: Tensor, window: int | None, dtype: torch.dtype) -> Tensor:
    place = torch.arange(segment_ids.shape[1], device=segment_ids.device)
    distance = place[:, None] - place[None, :]
    visible = distance >= 0
    if window is not None:
        visible &= distance < window
    visible = visible & (segment_ids[:, :, None] == segment_ids[:, None, :])
    hidden = torch.finfo(dtype).min
    mask = torch.zeros(visible.shape, dtype=dtype, device=segment_ids.device)
    return mask.masked_fill_(~visible, hidden)[:, None]


def _windows(config: PreTrainedConfig, seq_len: int) -> dict[str, int | None]:
    """The window of each layer type, None for none; one entry if all layers need the same mask."""
    _refuse(config)
    window = getattr(config, "sliding_window", None)
    types = set(getattr(config, "layer_types", None) or [])
    unknown = types - {"full_attention", "sliding_attention"}
    if unknown:
        raise _leaks(config, f"layers of type {', '.join(sorted(unknown))}")
    if window is None or window >= seq_len:
        return {"full_attention": None}
    if not types:
        if config.model_type not in _WINDOWED:
            raise _leaks(
                config, f"a sliding window of {window}, below text.seq_len, in unknown layers"
            )
        return {"sliding_attention": window}
    return {kind: window if kind == "sliding_attention" else None for kind in sorted(types)}


def _refuse(config: PreTrainedConfig) -> None:
    if config.model_type in _RECURRENT:
        raise _leaks(config, "a state that runs along the sequence")
    if config.model_type in _ALIBI or getattr(config, "alibi", False):
        raise _leaks(config, "ALiBi position biases")
    if getattr(config, "use_bidirectional_attention", False):
        raise _leaks(config, "bidirectional attention")
    implementation = getattr(config, "_attn_implementation", None)
    # served artifacts attend by row, which hands the masks made here to sdpa as they are
    if implementation not in (None, "eager", "sdpa", row_attention.NAME):
        raise _leaks(config, f"attention implementation '{implementation}' (use sdpa or eager)")


def _leaks(config: PreTrainedConfig, why: str) -> UserError:
    name = (getattr(config, "architectures", None) or [config.model_type])[0]
    return UserError(
        f"model: {name} has {why}; packed documents would see each other, so it cannot be trained "
        "here. Take a model with causal softmax attention"
    )


@torch.no_grad()
def check_packing(model: PreTrainedModel, seq_len: int) -> None:
    """Check on the model itself that packed documents do not see each other.

    Two short documents are packed; the second one's logits must be those that it gets alone,
    within the square root of the dtype's eps relative to their norm: rounding stays far below
    that, a leak does not. Costs two forward passes over at most 24 tokens.

    Raises:
        UserError: they do, or the model has fewer positions than a block has tokens.
    """
    config = model.config.get_text_config()
    positions = getattr(config, "max_position_embeddings", None)
    if isinstance(positions, int) and seq_len > positions:
        raise UserError(
            f"text.seq_len={seq_len}: the model has {positions} positions; at most that many"
        )
    _windows(config, seq_len)
    generator = torch.Generator().manual_seed(0)
    first, second = seq_len // 2 if seq_len < 24 else 12, min(12, seq_len - seq_len // 2)
    ids = torch.randint(config.vocab_size, (1, first + second), generator=generator)
    segments = torch.tensor([[0] * first + [1] * second], dtype=torch.int32)
    places = torch.cat([torch.arange(first), torch.arange(second)])[None]

    def logits(begin: int) -> Tensor:
        mask = attention_mask(segments[:, begin:].to(model.device), config, model.dtype)
        output = model(
            input_ids=ids[:, begin:].to(model.device),
            attention_mask=mask,
            position_ids=places[:, begin:].to(model.device),
            use_cache=False,
        )
        last: Tensor = output.logits[:, -second:].float()
        return last

    training = model.training
    model.eval()
    packed, alone = logits(0), logits(first)
    model.train(training)
    limit = torch.finfo(model.dtype).eps ** 0.5
    if not (packed - alone).norm() <= limit * alone.norm():
        raise _leaks(config, "layers that ignore the attention mask")
