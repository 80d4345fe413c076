"""Best-fit packing: whole conversations in blocks of S tokens, with little padding.

Ding et al., "Fewer Truncations Improve Language Modeling" (arXiv:2404.10830): in order of falling
length, each conversation goes into the block whose free space fits it best, or into a new one.
Nothing is split: a conversation longer than S is cut at S, and one without a target among its
first S tokens is dropped; both are counted. A token attends within its own conversation only (see
`qat.packing`).

Shapes: D conversations of the store, N of them packed, B blocks.
"""

import numpy as np
from numpy.typing import NDArray

from qat.packing import IGNORE, Batch, block
from qat.tokens import TokenStore

_PART = 1 << 14


def best_fit(lengths: NDArray[np.int64], seq_len: int) -> NDArray[np.int64]:
    """Assign items to blocks by best-fit-decreasing.

    Blocks are numbered by the first item in them, so their order follows that of the items. Time
    is that of sorting, plus, for each item, one search in a set of S bits.

    Args:
        lengths: int64 [N], each from 1 to S.
        seq_len: S.

    Returns:
        int64 [N], the block of each item.

    >>> best_fit(np.array([3, 6, 2, 5]), 8).tolist()
    [0, 1, 1, 0]
    """
    count = len(lengths)
    assert count == 0 or 1 <= lengths.min() <= lengths.max() <= seq_len
    blocks = np.empty(count, dtype=np.int64)
    with_space: list[list[int]] = [[] for _ in range(seq_len)]
    # bit s is set when some block has s free tokens
    spaces = 0
    opened = 0
    order = np.argsort(-lengths, kind="stable")
    for item, length in zip(order.tolist(), lengths[order].tolist()):
        fitting = spaces >> length
        if fitting:
            space = length + (fitting & -fitting).bit_length() - 1
            place = with_space[space].pop()
            if not with_space[space]:
                spaces &= ~(1 << space)
        else:
            space, place = seq_len, opened
            opened += 1
        blocks[item] = place
        if space > length:
            with_space[space - length].append(place)
            spaces |= 1 << (space - length)
    # the first item of each block, in the order of items, gives the block its number
    _, first, inverse = np.unique(blocks, return_index=True, return_inverse=True)
    rank = np.empty(len(first), dtype=np.int64)
    rank[np.argsort(first)] = np.arange(len(first))
    return rank[inverse]


class PackedBlocks:
    """Best-fit blocks of a store of conversations; the interface of `qat.packing.Blocks`.

    Args:
        store: the conversations; each is a document.
        seq_len: S.
    """

    def __init__(self, store: TokenStore, seq_len: int) -> None:
        self.store = store
        self.seq_len = seq_len
        lengths = np.diff(np.asarray(store.offsets))
        kept = np.minimum(lengths, seq_len)
        targets = _targets(store, kept)
        chosen = np.flatnonzero(targets > 0)
        self.cut = int(np.count_nonzero((lengths > seq_len) & (targets > 0)))
        """Conversations that lost their end."""
        self.dropped = len(lengths) - len(chosen)
        """Conversations without a target in their first S tokens, which are left out."""
        places = best_fit(kept[chosen], seq_len)
        order = np.argsort(places, kind="stable")
        self._members = chosen[order]
        self._lengths = kept[self._members]
        # the members of block b are those from _begins[b] to _begins[b + 1]
        self._begins = np.concatenate([[0], np.cumsum(np.bincount(places))]).astype(np.int64)
        self._loss_tokens = np.bincount(places, weights=targets[chosen]).astype(np.int64)

    def __len__(self) -> int:
        return len(self._begins) - 1

    def __getitem__(self, index: int) -> Batch:
        """See `qat.packing.block`; a label is the token that follows where it is a target."""
        if not 0 <= index < len(self):
            raise IndexError(f"block {index} of {len(self)}")
        begin, end = self._begins[index], self._begins[index + 1]
        tokens, labels = [], []
        for member, length in zip(self._members[begin:end], self._lengths[begin:end]):
            at = slice(self.store.offsets[member], self.store.offsets[member] + length)
            ids = np.asarray(self.store.tokens[at], dtype=np.int64)
            following = np.full(length, IGNORE, dtype=np.int64)
            following[:-1] = ids[1:]
            if self.store.targets is not None:
                following[:-1][self.store.targets[at][1:] == 0] = IGNORE
            tokens.append(ids)
            labels.append(following)
        ends = np.cumsum(self._lengths[begin:end])
        starts = np.concatenate([[0], ends[:-1]])
        return block(np.concatenate(tokens), np.concatenate(labels), starts, self.seq_len)

    def loss_tokens(self) -> NDArray[np.int64]:
        """Number of targets of each block, int64 [B]."""
        return self._loss_tokens

    @property
    def conversations(self) -> int:
        """Number of packed conversations, N."""
        return len(self._members)

    @property
    def efficiency(self) -> float:
        """Share of the blocks' places that hold tokens and not padding."""
        return float(self._lengths.sum() / max(1, len(self) * self.seq_len))


def _targets(store: TokenStore, kept: NDArray[np.int64]) -> NDArray[np.int64]:
    """Targets among the first ``kept`` tokens of each conversation, int64 [D].

    Its first token follows nothing and is none.
    """
    if store.targets is None:
        return np.maximum(kept - 1, 0)
    result = np.zeros(len(kept), dtype=np.int64)
    # by parts, because reduceat makes an int64 copy of what it sums
    for first in range(0, len(kept), _PART):
        last = min(first + _PART, len(kept))
        several = np.flatnonzero(kept[first:last] > 1) + first
        if len(several):
            base = int(store.offsets[first])
            flags = np.asarray(store.targets[base : int(store.offsets[last])])
            begins = np.asarray(store.offsets[several]) - base + 1
            bounds = np.stack([begins, begins + kept[several] - 1], axis=1).ravel()
            # Sums of [begin, end), and between them of what is not asked for. An end of the
            # whole array is not allowed, and the last sum runs to there anyway.
            bounds = bounds[:-1] if bounds[-1] == len(flags) else bounds
            result[several] = np.add.reduceat(flags, bounds, dtype=np.int64)[::2]
    return result
