"""One model with its generation thread, and the way from its tokens to an event loop."""

import asyncio
import itertools
import math
import queue
import threading
from collections.abc import Callable
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel
from transformers.generation.configuration_utils import ContinuousBatchingConfig
from transformers.generation.continuous_batching.requests import GenerationOutput

from qat.errors import UserError
from qat.serve.engine_attention import attend_in_pages
from qat.serve.engine_batching import Manager, Parts, Processor, Turns
from qat.serve.engine_rows import Step, compute_by_piece
from qat.serve.engine_sampling import Sampler
from qat.serve.requests import EngineStats, Event, FinishEvent, Sampling, TokenEvent

CLOSED = "the engine was closed before the answer was complete"
_CHECK_SECONDS = 600.0
"""A model that has not computed two tokens by then will not serve anybody."""


@dataclass(frozen=True)
class Sizes:
    """What a lane may take."""

    prompt_tokens: int
    """Prompt tokens of a step."""
    max_sequences: int
    """Sequences of a step."""
    cache_tokens: int
    """Key-value slots."""
    page: int
    """Slots of a page."""
    bits: int | None
    """Of cached codes."""
    cuda_graphs: bool = False
    """Replay captured steps."""
    compile: bool = False
    """Compile the model."""

    @property
    def captured(self) -> bool:
        """Whether steps are replayed or compiled: then nothing may loop over sequences."""
        return self.cuda_graphs or self.compile


Receiver = Callable[[list[Event]], None]
"""Takes new events of a sequence."""


class _Sequence:
    """A sequence as the generation thread sees it.

    Args:
        name: its request id.
        sampling: what the request asks for.
        device: where the logits are.
        receive: takes its events.
        loop: the event loop in which to call ``receive``; None: the generation thread.
    """

    def __init__(
        self,
        name: str,
        sampling: Sampling,
        device: torch.device,
        receive: Receiver,
        loop: asyncio.AbstractEventLoop | None,
    ) -> None:
        self.sampler = Sampler(sampling, device)
        self.stops = frozenset(sampling.stop_token_ids)
        self.name, self.receive, self.loop = name, receive, loop
        self.sent = 0

    def events(self, output: GenerationOutput) -> list[Event]:
        """What is new in an output of transformers."""
        if output.error is not None:
            return [FinishEvent("error", output.error)]
        new = output.generated_tokens[self.sent :]
        self.sent += len(new)
        events: list[Event] = [TokenEvent(token) for token in new]
        chosen = self.sampler.last
        if chosen is not None and new:
            events[-1] = TokenEvent(new[-1], chosen.logprob, chosen.top)
        if output.is_finished():
            stopped = bool(new) and new[-1] in self.stops
            events.append(FinishEvent("stop" if stopped else "length"))
        return events


class Lane:
    """A model that continues sequences in its own thread.

    Args:
        model: from `qat.runtime.load_packed`; its attention and layers are replaced.
        sizes: see `Sizes`.
        turn: held during each step.

    Raises:
        UserError: the model cannot be served in batches, or its cache does not fit into memory.
    """

    def __init__(self, model: PreTrainedModel, sizes: Sizes, turn: Turns) -> None:
        self.vocabulary: int = model.get_input_embeddings().weight.shape[0]
        self._device = model.device
        self._lock = threading.Lock()
        self._sequences: dict[str, _Sequence] = {}
        self._names = itertools.count()
        self._end: str | None = None
        step = Step()
        parts = Parts(
            step=step,
            alone=None if sizes.captured else attend_in_pages(model),
            bits=sizes.bits,
            prompt_tokens=sizes.prompt_tokens,
            max_sequences=sizes.max_sequences,
            turn=turn,
            sampler_of=self._sampler_of,
            deliver=self._deliver,
            stepped=self._stepped,
            ended=self._ended,
        )
        if not sizes.captured:
            compute_by_piece(model, step, model.device)
        try:
            self._manager = Manager(model, _config(sizes), parts)
        except (MemoryError, ValueError, RuntimeError) as error:
            raise UserError(
                f"cache_tokens={sizes.cache_tokens}: no key-value cache of this size for this "
                f"model ({error}); ask for fewer"
            ) from error
        processor = self._manager.batch_processor
        self._scheduler = processor.scheduler
        self._stats = EngineStats(0, 0, 0, 0, processor.cache.tokens)
        self._manager.start()
        self._check()

    def fits(self, tokens: int) -> bool:
        """Whether a sequence of so many tokens fits into the whole cache."""
        needed: int = self._scheduler.units(tokens)
        capacity: int = self._scheduler.capacity()
        return needed <= capacity

    def submit(
        self,
        prompt_ids: list[int],
        sampling: Sampling,
        receive: Receiver,
        loop: asyncio.AbstractEventLoop | None = None,
    ) -> str:
        """Accept a sequence; ``receive`` gets its events, in ``loop`` or the generation thread.

        Raises:
            RuntimeError: the lane has ended; the message says why.
        """
        name = f"sequence-{next(self._names)}"
        sequence = _Sequence(name, sampling, self._device, receive, loop)
        with self._lock:
            if self._end is not None:
                raise RuntimeError(self._end)
            self._sequences[name] = sequence
        accepted = self._manager.add_request(
            prompt_ids,
            request_id=name,
            max_new_tokens=sampling.max_new_tokens,
            streaming=True,
            # -1 is nobody's token: an empty list would ask for the default
            eos_token_id=[*sampling.stop_token_ids, -1],
        )
        if accepted is None and self._take(name) is not None:
            raise RuntimeError(self._end or "the engine is stopping")
        return name

    def cancel(self, name: str) -> None:
        """Stop a sequence and free its memory before the next step."""
        if self._take(name) is not None:
            self._manager.cancel_request(name)

    def stats(self) -> EngineStats:
        """Counts as of the last step."""
        found, accepted = self._stats, len(self._sequences)
        waiting = max(0, accepted - found.running)
        return EngineStats(
            waiting, found.running, found.batch_tokens, found.cache_tokens_used, found.cache_tokens
        )

    @property
    def failure(self) -> str | None:
        """Why the generation thread died, or None."""
        return None if self._end in (None, CLOSED) else self._end

    def close(self) -> None:
        """Stop after the current step."""
        if self._manager.is_running():
            self._manager.stop(block=True, hard_stop=True)

    # ------------------------------------------------------------ in the generation thread

    def _sampler_of(self, name: str) -> Sampler | None:
        sequence = self._sequences.get(name)
        return None if sequence is None else sequence.sampler

    def _deliver(self, outputs: list[GenerationOutput]) -> None:
        news = []
        for output in outputs:
            sequence = self._sequences.get(output.request_id)
            if sequence is None:
                # cancelled. Once more: transformers forgets a cancellation that it reads before
                # the request, when both come between its looks at the two queues
                if not output.is_finished():
                    self._manager.cancel_request(output.request_id)
                continue
            news.append((sequence, sequence.events(output)))
            if output.is_finished():
                self._take(output.request_id)
        for sequence in _send(news):
            self.cancel(sequence.name)

    def _stepped(self, processor: Processor) -> None:
        self._stats = EngineStats(
            waiting=0,
            running=len(processor.scheduler.active_requests),
            batch_tokens=processor.batch_tokens,
            cache_tokens_used=processor.cache.tokens_in_use(),
            cache_tokens=processor.cache.tokens,
        )

    def _ended(self, reason: str) -> None:
        with self._lock:
            self._end = f"the generation thread failed: {reason}" if reason else CLOSED
            left = list(self._sequences.values())
            self._sequences.clear()
        _send([(sequence, [FinishEvent("error", self._end)]) for sequence in left])

    # -------------------------------------------------------------------------------------

    def _take(self, name: str) -> _Sequence | None:
        with self._lock:
            return self._sequences.pop(name, None)

    def _check(self) -> None:
        """Compute two tokens, so that a model which cannot be served says so at the start."""
        events: queue.SimpleQueue[Event] = queue.SimpleQueue()

        def receive(new: list[Event]) -> None:
            for event in new:
                events.put(event)

        self.submit([0, 0], Sampling(max_new_tokens=2), receive)
        event: Event = TokenEvent(0)
        try:
            while isinstance(event, TokenEvent):
                event = events.get(timeout=_CHECK_SECONDS)
        except queue.Empty:
            event = FinishEvent("error", f"two tokens took more than {_CHECK_SECONDS:.0f} s")
        if event.reason == "error":
            self.close()
            raise UserError(
                f"this model cannot be served in batches ({event.message}); use qat generate"
            )


_News = list[tuple[_Sequence, list[Event]]]


def _send(news: _News) -> list[_Sequence]:
    """Hand events over, with one call for each event loop: each call costs a change of threads.

    Returns:
        Sequences whose event loop is closed.
    """
    loops: dict[asyncio.AbstractEventLoop, _News] = {}
    for sequence, events in news:
        if sequence.loop is None:
            sequence.receive(events)
        else:
            loops.setdefault(sequence.loop, []).append((sequence, events))
    gone: list[_Sequence] = []
    for loop, calls in loops.items():
        try:
            loop.call_soon_threadsafe(_receive_all, calls)
        except RuntimeError:
            gone.extend(sequence for sequence, _ in calls)
    return gone


def _receive_all(calls: _News) -> None:
    for sequence, events in calls:
        sequence.receive(events)


def _config(sizes: Sizes) -> ContinuousBatchingConfig:
    return ContinuousBatchingConfig(
        page_size=sizes.page,
        num_blocks=math.ceil(sizes.cache_tokens / sizes.page),
        max_batch_tokens=sizes.prompt_tokens + sizes.max_sequences,
        max_requests_per_batch=sizes.max_sequences,
        max_blocks_per_request=0,
        allow_block_sharing=False,
        use_async_batching=False,
        use_cuda_graph=sizes.cuda_graphs,
        default_compile_level=int(sizes.compile),
        auto_switch_to_flash=False,
        # transformers' estimate counts attention masks, which are not made here
        max_memory_percent=1000.0,
        seed=0,
    )


class AsyncHandle:
    """A submitted sequence in an event loop; see `qat.serve.requests.Handle`."""

    def __init__(self, lane: Lane, prompt_ids: list[int], sampling: Sampling) -> None:
        self._events: asyncio.Queue[Event] = asyncio.Queue()
        self._finished = False
        self._lane, loop = lane, asyncio.get_running_loop()
        self._name = lane.submit(prompt_ids, sampling, self._receive, loop)

    def _receive(self, events: list[Event]) -> None:
        for event in events:
            if self._finished:
                return
            self._events.put_nowait(event)
            self._finished = isinstance(event, FinishEvent)

    async def next_event(self) -> Event:
        """The next event; after a `FinishEvent` it must not be called again."""
        return await self._events.get()

    def cancel(self) -> None:
        """Stop generating and free the sequence's memory; safe to call at any time, twice too."""
        if self._finished:
            return
        self._lane.cancel(self._name)
        self._receive([FinishEvent("cancelled")])
