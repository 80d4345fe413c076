"""Which blocks a training step sees: a function of the seed and the step, and of nothing else.

Epoch e runs through the blocks in the permutation that (seed, e) gives; all epochs together are
one endless list, and step t takes its places ``t * G ... (t + 1) * G - 1``, G blocks of the global
batch. No state has to be saved: resuming at step t starts there. Devices and micro-batches only
divide the G blocks among themselves.
"""

from collections.abc import Iterator
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from qat.errors import UserError


class StepBatchSampler:
    """Endless batch sampler of one rank's micro-batches.

    Each item is a list of ``micro_batch_size`` pairs (block, loss tokens of the whole step, over
    all ranks and micro-batches, at least 1).

    Args:
        num_blocks: blocks to draw from.
        loss_tokens_per_block: int64 [num_blocks], number of targets of each.
        global_batch_size: blocks of one optimizer step; more than ``num_blocks`` is fine.
        micro_batch_size: blocks of one forward pass on one rank.
        world_size: number of ranks.
        rank: this one.
        seed: seed of the permutations.
        start_step: the optimizer step to begin with.

    Raises:
        UserError: the global batch is not a multiple of micro-batch x ranks.
    """

    def __init__(
        self,
        num_blocks: int,
        loss_tokens_per_block: NDArray[np.int64],
        global_batch_size: int,
        micro_batch_size: int,
        world_size: int = 1,
        rank: int = 0,
        seed: int = 0,
        start_step: int = 0,
    ) -> None:
        assert num_blocks == len(loss_tokens_per_block) > 0
        assert 0 <= rank < world_size
        per_pass = micro_batch_size * world_size
        if global_batch_size % per_pass:
            raise UserError(
                f"trainer.global_batch_size={global_batch_size}: must be a multiple of "
                f"trainer.micro_batch_size x devices = {micro_batch_size} x {world_size}. Take "
                f"{-(-global_batch_size // per_pass) * per_pass}, or lower "
                "trainer.micro_batch_size"
            )
        self.num_blocks = num_blocks
        self.loss_tokens_per_block = loss_tokens_per_block
        self.global_batch_size = global_batch_size
        self.micro_batch_size = micro_batch_size
        self.world_size = world_size
        self.rank = rank
        self.seed = seed
        self.start_step = start_step
        # a step touches few epochs; each permutation takes 8 bytes per block
        self._order = lru_cache(maxsize=2)(self._permutation)

    def _permutation(self, epoch: int) -> NDArray[np.int64]:
        return np.random.default_rng((self.seed, epoch)).permutation(self.num_blocks)

    def step_blocks(self, step: int) -> list[int]:
        """The blocks of an optimizer step, on all ranks."""
        first = step * self.global_batch_size
        places = range(first, first + self.global_batch_size)
        return [int(self._order(p // self.num_blocks)[p % self.num_blocks]) for p in places]

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        step = self.start_step
        size = self.micro_batch_size
        while True:
            blocks = self.step_blocks(step)
            targets = max(1, int(self.loss_tokens_per_block[blocks].sum()))
            mine = range(self.rank * size, self.global_batch_size, size * self.world_size)
            for begin in mine:
                yield [(block, targets) for block in blocks[begin : begin + size]]
            step += 1
