"""Decoding on a static cache: the step of one token is a CUDA graph, or compiled, or plain.

At batch 1 a GPU finishes the kernels of a step before Python has launched the next ones; a CUDA
graph launches them all at once. A graph replays fixed addresses, so keys and values lie in
transformers' `StaticCache`, and token, position and mask are buffers that are written between
replays. At first use the replay is compared with the eager step on the same inputs; where a single
bit differs, or the capture fails, decoding goes on eagerly and a warning says so.

>>> decoding = StaticDecoding(model)                                      # doctest: +SKIP
>>> model.generate(**inputs, custom_generate=decoding)                    # doctest: +SKIP

Covered: decoders with full attention in every layer that transformers marks as fit for a static
cache (`covers`). Shapes: B sequences, T tokens of the prompt, C slots of the cache, V tokens of the
vocabulary.
"""

import logging
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessorList, PreTrainedModel, StoppingCriteriaList
from transformers.cache_utils import StaticCache, StaticLayer

from qat.row_attention import NAME as BY_ROW

log = logging.getLogger(__name__)

STEP = 256
"""The cache is allocated in multiples of this many slots, so that answers share a graph."""


def covers(model: PreTrainedModel) -> bool:
    """Whether the model decodes on a static cache without control flow that depends on data."""
    if model.config.is_encoder_decoder or not getattr(model, "_can_compile_fullgraph", False):
        return False
    return all(type(layer) is StaticLayer for layer in _cache(model, 1).layers)


def _cache(model: PreTrainedModel, capacity: int) -> StaticCache:
    return StaticCache(config=model.config, max_cache_len=capacity)


class _Step:
    """One token for B sequences on fixed buffers."""

    def __init__(self, model: PreTrainedModel, batch: int, capacity: int, compiled: bool) -> None:
        self.model, self.capacity = model, capacity
        self.cache = _cache(model, capacity)
        self.graph: torch.cuda.CUDAGraph | None = None
        self.logits: Tensor | None = None
        self.length = 0
        device = model.device
        self.ids = torch.zeros(batch, 1, dtype=torch.long, device=device)
        self.position = torch.zeros(batch, 1, dtype=torch.long, device=device)
        self.visible = torch.zeros(batch, 1, 1, capacity, dtype=torch.bool, device=device)
        self._forward = torch.compile(self._plain, dynamic=False) if compiled else self._plain
        self._checked = False

    def prefill(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Read prompts [B, T] with their mask (1: a token), eagerly; logits [B, V] of the last."""
        self.cache.reset()
        self.length = ids.shape[1]
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        self.visible.zero_()
        self.visible[:, 0, 0, : self.length] = mask.bool()
        self.position.copy_(positions[:, -1:])
        outputs = self.model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=1,
        )
        last: Tensor = outputs.logits[:, -1]
        return last

    def __call__(self, ids: Tensor, graphs: bool) -> Tensor:
        """Logits [B, V] after the tokens [B]; valid until the next call."""
        self.ids.copy_(ids[:, None])
        self.position.add_(1)
        self.visible[..., self.length] = True
        self.length += 1
        if not self._checked:
            self._checked = True
            return self._first(graphs)
        if self.graph is not None:
            self.graph.replay()
            assert self.logits is not None, "captured with the graph"
            return self.logits
        return self._forward()

    def _plain(self) -> Tensor:
        outputs = self.model(
            input_ids=self.ids,
            attention_mask=self.visible,
            position_ids=self.position,
            past_key_values=self.cache,
            use_cache=True,
        )
        last: Tensor = outputs.logits[:, -1]
        return last

    def _again(self) -> None:
        """Let the next forward pass write the same slot as the last one."""
        for layer in self.cache.layers:
            layer.cumulative_length.fill_(self.length - 1)

    def _first(self, graphs: bool) -> Tensor:
        """The first step: compile, capture, and compare the replay with it."""
        try:
            logits = self._forward()
        except RuntimeError as error:
            if self._forward == self._plain:
                raise
            first = str(error).strip().splitlines()[0]
            log.warning("compile: the step cannot be compiled (%s); decoding without", first)
            self._forward = self._plain
            self._again()
            logits = self._forward()
        if graphs:
            logits = logits.clone()
            if not self._capture(logits):
                log.warning("cuda_graphs: the replayed step is not the eager one; decoding eagerly")
                self.graph = None
                # keys and values of a step that went wrong are written again
                self._again()
                logits = self._forward()
        return logits

    def _capture(self, expected: Tensor) -> bool:
        """Capture the step; whether its replay computes exactly the expected logits."""
        try:
            # lazy allocations of libraries must not happen during the capture
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                for _ in range(2):
                    self._again()
                    self._forward()
            torch.cuda.current_stream().wait_stream(side)
            self._again()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                self.logits = self._forward()
            graph.replay()
            same = torch.equal(self.logits, expected)
        except RuntimeError as error:
            log.warning("cuda_graphs: %s", str(error).strip().splitlines()[0])
            return False
        self.graph = graph
        return same


class StaticDecoding:
    """Greedy decoding or sampling for ``model.generate(custom_generate=...)``.

    Caches and graphs are kept for each batch size, for the answers that follow.

    Args:
        model: one that `covers`, on its device.
        graphs: capture CUDA graphs; ignored on the CPU.
        compiled: compile the step by torch.compile. Attention then takes PyTorch's own kernel on
            the CPU, too, whose bits may depend on the batch.
    """

    def __init__(self, model: PreTrainedModel, graphs: bool = True, compiled: bool = False) -> None:
        self.graphs = graphs and model.device.type == "cuda"
        self.compiled = compiled
        self._steps: dict[int, _Step] = {}
        if compiled and model.config._attn_implementation == BY_ROW:
            # it looks at the mask's values, which a compiled step cannot
            model.set_attn_implementation("sdpa")

    def step_of(self, model: PreTrainedModel, batch: int, length: int) -> _Step:
        """The step for a batch size, with room for ``length`` tokens."""
        found = self._steps.get(batch)
        if found is None or found.capacity < length:
            capacity = -(-length // STEP) * STEP
            found = self._steps[batch] = _Step(model, batch, capacity, self.compiled)
        return found

    @torch.no_grad()
    def __call__(
        self,
        model: PreTrainedModel,
        input_ids: Tensor,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: Any,
        streamer: Any = None,
        **inputs: Any,
    ) -> Tensor:
        """Continue prompts [B, T], padded on the left; returns prompts and answers [B, T + new]."""
        mask = inputs.get("attention_mask")
        mask = torch.ones_like(input_ids) if mask is None else mask
        step = self.step_of(model, input_ids.shape[0], generation_config.max_length)
        pad = generation_config._pad_token_tensor
        running = torch.ones(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)
        logits = step.prefill(input_ids, mask)
        while True:
            scores = logits_processor(input_ids, logits.float())
            if generation_config.do_sample:
                tokens = torch.multinomial(scores.softmax(-1), 1)[:, 0]
            else:
                tokens = scores.argmax(-1)
            if pad is not None:
                tokens = tokens.where(running, pad.to(tokens.device))
            input_ids = torch.cat([input_ids, tokens[:, None]], -1)
            if streamer is not None:
                streamer.put(tokens.cpu())
            running &= ~stopping_criteria(input_ids, None)
            if not bool(running.any()):
                break
            logits = step(tokens, self.graphs)
        if streamer is not None:
            streamer.end()
        return input_ids
