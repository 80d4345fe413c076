"""Transformers' continuous batching, with the parts that decide what a sequence may depend on.

`Manager` is its manager and loop; the classes beside it take its places for parts:

* `WholePieces` schedules prompts whole, or in pieces of one length, never in what happens to be
  left of a step; and admits a sequence when pages for its longest possible answer are free, so
  that none is ever put back and computed again.
* `Processor` tells the layers which pieces a step consists of.
* `Runner` samples outside of what may be captured, each sequence with its own `Sampler`.
* `Router` turns new tokens into events.
"""

import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedModel
from transformers.generation.configuration_utils import ContinuousBatchingConfig
from transformers.generation.continuous_batching.continuous_api import (
    ContinuousBatchingManager,
    ContinuousBatchProcessor,
    OutputRouter,
)
from transformers.generation.continuous_batching.initialization import (
    update_cb_config_after_cache_creation,
)
from transformers.generation.continuous_batching.model_runner import ModelRunner
from transformers.generation.continuous_batching.requests import (
    FutureRequestState,
    GenerationOutput,
    RequestState,
    RequestStatus,
)
from transformers.generation.continuous_batching.scheduler import FIFOScheduler

from qat.serve.engine_attention import PagedCache
from qat.serve.engine_rows import Piece, Step
from qat.serve.engine_sampling import Sampler, choose


class Turns:
    """A lock that is given in the order in which it is asked for.

    Models with threads of their own compute one after the other; with a plain lock a busy one could
    keep the others out.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._asked = self._served = 0

    def __enter__(self) -> None:
        with self._changed:
            mine = self._asked
            self._asked += 1
            self._changed.wait_for(lambda: self._served == mine)

    def __exit__(self, *error: object) -> None:
        with self._changed:
            self._served += 1
            self._changed.notify_all()


@dataclass
class Parts:
    """What a manager needs beyond transformers' own arguments."""

    step: Step
    """Shared with the model's layers."""
    alone: Callable[..., Any] | None
    """Attention of one sequence; see `qat.serve.engine_attention.attend_in_pages`. None leaves
    attention to transformers."""
    bits: int | None
    """Of the cached codes, or None."""
    prompt_tokens: int
    """Longest piece of a prompt."""
    max_sequences: int
    """Most sequences in a step."""
    turn: Turns
    """Held during a step: models on the same device take turns."""
    sampler_of: Callable[[str], Sampler | None]
    """The sampler of a request."""
    deliver: Callable[[list[GenerationOutput]], None]
    """Takes the outputs of a step."""
    stepped: Callable[["Processor"], None]
    """Called behind each step, and when there is nothing to do."""
    ended: Callable[[str], None]
    """Called once, when the generation thread ends, with the reason if it failed, else empty."""


class WholePieces(FIFOScheduler):  # type: ignore[misc,unused-ignore]
    """First come, first served; see the module.

    Args:
        cache: the paged cache.
        parts: sizes.
    """

    def __init__(self, cache: PagedCache, parts: Parts) -> None:
        super().__init__(cache, 0.0, parts.max_sequences)
        self.parts = parts

    def schedule_batch(
        self, token_budget: int, cache_budget: int
    ) -> tuple[list[FutureRequestState] | None, bool, int, int]:
        """The sequences of the next step; see transformers' scheduler."""
        active = list(self.active_requests.values())
        decoding = [s for s in active if s.status == RequestStatus.DECODING]
        prefilling = [s for s in active if s.status == RequestStatus.PREFILLING]
        done: set[str] = set()
        found: list[FutureRequestState] = []
        tokens = reads = 0
        if decoding:
            part, failed, _, tokens, reads = self._process_candidates(
                decoding, self.max_requests_per_batch, cache_budget, done
            )
            assert not failed, "pages were reserved for each"
            found.extend(part)
        left = self.parts.prompt_tokens
        for state in [*prefilling, *self._admitted()]:
            length = min(len(state.remaining_prefill_tokens), self.parts.prompt_tokens)
            if length > left:
                break
            part, failed, _, new, read = self._process_candidates(
                [state], length, cache_budget - reads, done
            )
            assert not failed, "pages were reserved for each"
            found.extend(part)
            tokens, reads, left = tokens + new, reads + read, left - new
        self._cleanup_waiting_queue(done)
        return found, False, tokens, reads

    def _admitted(self) -> list[RequestState]:
        """Waiting sequences that fit beside the active ones, in their order."""
        active = list(self.active_requests.values())
        free = self.capacity() - sum(self.need(state) for state in active)
        places = self.max_requests_per_batch - len(active)
        admitted = []
        for request_id in self.waiting_requests_order:
            state = self.waiting_requests[request_id]
            free, places = free - self.need(state), places - 1
            # nobody overtakes: a long one would wait forever
            if free < 0 or places < 0:
                break
            admitted.append(state)
        return admitted

    def need(self, state: RequestState) -> int:
        """Units of memory that a sequence can come to need."""
        limit = state.max_new_tokens
        assert limit is not None, "every request has one"
        return self.units(len(state.initial_tokens) + limit)

    def units(self, tokens: int) -> int:
        """Units of memory for so many tokens."""
        allocators = self.cache.cache_allocators.values()
        return sum(allocator._compute_blocks_needed(0, tokens, 0) for allocator in allocators)

    def capacity(self) -> int:
        """Units of memory: blocks of pages.

        With several kinds of layers a block can keep a sector from the other kinds, so sectors.
        """
        allocators = list(self.cache.cache_allocators.values())
        size: int = allocators[0].num_blocks if len(allocators) == 1 else self.cache.num_sectors
        return size


class Runner(ModelRunner):  # type: ignore[misc,unused-ignore]
    """Runs the model, then samples: outside of CUDA graphs, since requests differ."""

    scores: Tensor | None = None
    sampler_of: Callable[[str], Sampler | None]
    requests: Callable[[], list[FutureRequestState]]

    def _sample(self, scores: Tensor, output_ids: Tensor) -> None:
        """Keep the fp32 scores [1, N, V], at a fixed place where a graph may be captured."""
        if not self.pad_inputs:
            self.scores = scores[0]
            return
        if self.scores is None:
            rows = self.inputs_and_outputs.max_requests_per_batch
            self.scores = scores.new_empty(rows, scores.shape[-1])
        self.scores[: scores.shape[1]].copy_(scores[0])

    def compute_batch(self, model: nn.Module, batch_data: dict[str, Any]) -> None:
        """The forward pass and the next tokens."""
        super().compute_batch(model, batch_data)
        new = [r.state.request_id for r in self.requests() if r.has_new_token]
        if not new:
            return
        if self.inputs_and_outputs.compute_stream is not None:
            self.inputs_and_outputs.compute_stream.synchronize()
        assert self.scores is not None
        tokens = choose(self.scores[: len(new)], [self.sampler_of(name) for name in new])
        self.inputs_and_outputs.output_ids[0, : len(new)].copy_(tokens)


class Processor(ContinuousBatchProcessor):  # type: ignore[misc,unused-ignore]
    """Transformers' processor, which announces the pieces of each step."""

    def __init__(self, parts: Parts, **options: Any) -> None:
        super().__init__(**options)
        self.parts = parts
        self.batch_tokens = 0
        runner = Runner(
            logit_processor=self.logit_processor,
            cb_config=self.cb_config,
            cache=self.cache,
            inputs_and_outputs=self.inputs_and_outputs,
            do_sample=False,
            return_logprobs=False,
        )
        runner.sampler_of = parts.sampler_of
        runner.requests = lambda: self.inputs_and_outputs.requests_in_batch
        self.model_runner = runner

    def prepare_next_batch(self) -> bool:
        """Whether there is a step to compute."""
        found: bool = super().prepare_next_batch()
        if not found:
            self.batch_tokens = 0
            self.parts.stepped(self)
        return found

    def _generation_step(self, model: nn.Module) -> None:
        pieces = [
            Piece(r.state.request_id, r.state.position_offset - r.query_length, r.query_length)
            for r in self.inputs_and_outputs.requests_in_batch
        ]
        self.parts.step.begin(pieces)
        try:
            with self.parts.turn:
                super()._generation_step(model)
        finally:
            self.parts.step.end()
        self.batch_tokens = sum(piece.length for piece in pieces)

    def update_batch(self) -> None:
        """Take in the new tokens."""
        super().update_batch()
        self.parts.stepped(self)


class Router(OutputRouter):  # type: ignore[misc,unused-ignore]
    """Gives outputs to the engine instead of to queues."""

    def __init__(self, deliver: Callable[[list[GenerationOutput]], None]) -> None:
        super().__init__()
        self._deliver = deliver

    def deliver(self, output: GenerationOutput) -> None:
        """One output."""
        self._deliver([output])

    def deliver_batch(self, outputs: list[GenerationOutput]) -> None:
        """The outputs of a step."""
        self._deliver(outputs)


class Manager(ContinuousBatchingManager):  # type: ignore[misc,unused-ignore]
    """Transformers' manager around the parts above.

    Args:
        model: with its attention and its layers switched (`attend_in_pages`, `compute_by_piece`).
        config: sizes.
        parts: see `Parts`.
    """

    def __init__(
        self, model: PreTrainedModel, config: ContinuousBatchingConfig, parts: Parts
    ) -> None:
        self.parts = parts
        # sampling and stop tokens are the requests' own
        plain = GenerationConfig(do_sample=False, eos_token_id=-1, max_new_tokens=1)
        super().__init__(model, plain, config)
        self.output_router = Router(parts.deliver)
        # here and not in the thread: what does not fit into memory is the caller's to know
        self.batch_processor: Processor = self._create_batch_processor()

    def switch_to_cb_friendly_attn(self, model: Any, auto_switch_to_flash: bool = True) -> None:
        """Leave the model's attention, where it has been switched."""
        if self.parts.alone is None:
            super().switch_to_cb_friendly_attn(model, auto_switch_to_flash)

    def start(self) -> None:
        """Start the generation thread."""
        self.background_thread_status.clear()
        # a daemon, so that a program which forgot to close ends nevertheless
        self._generation_thread = threading.Thread(
            target=self._run_generation_loop, name="generation", daemon=True
        )
        self._generation_thread.start()

    def _run_generation_loop(self) -> None:
        try:
            super()._run_generation_loop()
        finally:
            error = self.background_thread_status.fatal_error
            self.parts.ended("" if error is None else f"{type(error).__name__}: {error}")

    def _create_batch_processor(self) -> Processor:
        existing = getattr(self, "batch_processor", None)
        if isinstance(existing, Processor):
            return existing
        keep = getattr(self.model, "_supports_logits_to_keep", None)
        config = self.model.config.get_text_config()
        cache = PagedCache(
            config,
            self.parts.step,
            self.parts.alone,
            self.model.dtype,
            self.parts.bits,
            continuous_batching_config=self.continuous_batching_config,
            device=self.model.device,
            distributed_helper=self.distributed_helper,
            model_supports_logits_to_keep=callable(keep) and keep(),
        )
        update_cb_config_after_cache_creation(
            self.continuous_batching_config, cache.num_blocks, cache.max_batch_tokens
        )
        return Processor(
            self.parts,
            cache=cache,
            config=config,
            generation_config=self.generation_config,
            continuous_batching_config=self.continuous_batching_config,
            logit_processor=self.logit_processor,
            input_queue=self.input_queue,
            cancel_queue=self.cancel_queue,
            output_router=self.output_router,
            background_thread_status=self.background_thread_status,
            model_device=self.model.device,
            model_dtype=self.model.dtype,
            scheduler=WholePieces(cache, self.parts),
            distributed_helper=self.distributed_helper,
        )
