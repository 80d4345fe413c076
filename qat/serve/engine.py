"""The engine of ``qat serve``: sequences of token ids in, events out, many at a time.

Scheduling, paging and the loop are transformers' continuous batching (`qat.serve.engine_batching`);
the model is that of `qat.runtime.load_packed`. On the CPU a greedy answer has the same bits whether
it is computed alone or beside others, because attention is computed sequence by sequence
(`qat.serve.engine_attention`) and layers do not depend on the number of rows
(`qat.serve.engine_rows`); prompts are computed whole, or in pieces of ``max_batch_tokens`` tokens.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import psutil
import torch
from transformers import PreTrainedModel

from qat.errors import UserError
from qat.generate import find_device
from qat.kv_cache import KVCacheName, QuantizedKVCache
from qat.runtime import load_packed
from qat.serve.engine_adapters import load_adapted
from qat.serve.engine_batching import Turns
from qat.serve.engine_lane import CLOSED, AsyncHandle, Lane, Sizes
from qat.serve.requests import EngineStats, Handle, Sampling
from qat_kernels.kv_cache_numerics import bytes_per_token

_PAGE = 16
"""Key-value slots of a page: what a sequence's last page wastes is half of it on average."""
_CACHE_SHARE = 0.25
"""Part of the free memory that the key-value cache may take where no size is given."""
_NESTED = ("artifact", "nf4")
"""Directories of a run that say nothing about the model: its name is their parent's."""


@dataclass(frozen=True)
class EngineOptions:
    """Options of the engine."""

    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Dtype of activations and kept weights; float32 computes what plain transformers computes."""
    device: str | None = None
    """Device such as cpu or cuda:0; null takes the first GPU, else the CPU."""
    kv_cache: KVCacheName = "none"
    """Keys and values in codes of 8 or 4 bits: less memory; none keeps them in ``dtype``."""
    max_sequences: int = 64
    """Most sequences that are continued at a time; further ones wait."""
    max_batch_tokens: int = 512
    """Prompt tokens of one step; longer prompts are computed in pieces of so many."""
    cache_tokens: int | None = None
    """Key-value slots for all sequences of a model together; null: for ``max_sequences`` of full
    length, but at most a quarter of the free memory."""
    max_context: int | None = None
    """Most tokens of prompt and answer together; null takes the model's."""
    name: str | None = None
    """Name under which requests ask for the model; null takes that of its directory."""
    adapters: dict[str, str] = field(default_factory=dict)
    """Further LoRA adapters for the base of an nf4/ directory: their names and directories."""
    cuda_graphs: bool = False
    """On a GPU: replay captured steps, with transformers' own attention. Faster for small models;
    answers may then depend on what else is computed. Without effect on the CPU."""
    compile: bool = False
    """On a GPU: torch.compile the model, with the same reservation."""

    def __post_init__(self) -> None:
        """Raise ValueError for a value outside its range."""
        if self.kv_cache not in ("none", "int8", "int4"):
            raise ValueError(f"kv_cache={self.kv_cache}: none, int8 or int4")
        if self.dtype not in ("bfloat16", "float32"):
            raise ValueError(f"dtype={self.dtype}: bfloat16 or float32")
        for name in ("max_sequences", "max_batch_tokens", "cache_tokens", "max_context"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}={value}: at least 1")


class Engine:
    """Serves an artifact; implements `qat.serve.requests.EngineProtocol`.

    Args:
        artifact: the ``artifact/`` directory of a run, or the ``nf4/`` of an adapter run.
        options: see `EngineOptions`; None takes its defaults.

    Raises:
        UserError: not a whole artifact, a device that is not there, a model that cannot be served
            in batches, or a cache that does not fit.
    """

    def __init__(self, artifact: Path, options: EngineOptions | None = None) -> None:
        options = options or EngineOptions()
        device = find_device(options.device)
        _check_captured(options, device)
        self._closed = False
        self._lanes: dict[str, Lane] = {}
        models = _load(Path(artifact), options, device)
        first = next(iter(models.values()))
        config: Any = first.config.get_text_config()
        longest = getattr(config, "max_position_embeddings", None)
        limits = [limit for limit in (longest, options.max_context) if limit is not None]
        if not limits:
            raise UserError("max_context=null: this model names no context; give a number")
        sizes = _sizes(first, options, min(limits), len(models))
        turn = Turns()
        try:
            for name, model in models.items():
                self._lanes[name] = Lane(model, sizes, turn)
        except BaseException:
            self.close()
            raise
        lane = next(iter(self._lanes.values()))
        self.context = min(limits)
        while not lane.fits(self.context):
            self.context -= 1

    @property
    def models(self) -> list[str]:
        """Names under which requests may ask for weights: the artifact's, then its adapters'."""
        return list(self._lanes)

    def submit(self, prompt_ids: list[int], sampling: Sampling, model: str) -> Handle:
        """Accept a sequence. Must be called in a running event loop; returns at once.

        Raises:
            KeyError: no such model.
            ValueError: an empty prompt, a token that is none, or prompt and answer do not fit
                `context`.
            RuntimeError: the engine is stopping or has failed; the message says which.
        """
        lane = self._lanes[model]
        if self._closed:
            raise RuntimeError(CLOSED)
        if self.failure is not None:
            raise RuntimeError(self.failure)
        if not prompt_ids or sampling.max_new_tokens < 1:
            raise ValueError("the prompt is empty" if not prompt_ids else "no token is asked for")
        if min(prompt_ids) < 0 or max(prompt_ids) >= lane.vocabulary:
            raise ValueError(f"token ids of this model are 0 to {lane.vocabulary - 1}")
        total = len(prompt_ids) + sampling.max_new_tokens
        if total > self.context:
            raise ValueError(
                f"{len(prompt_ids)} tokens of prompt and {sampling.max_new_tokens} to generate "
                f"pass the context of {self.context}"
            )
        return AsyncHandle(lane, prompt_ids, sampling)

    def stats(self) -> EngineStats:
        """A snapshot, summed over all models; cheap, callable from any thread."""
        found = [lane.stats() for lane in self._lanes.values()]
        return EngineStats(
            waiting=sum(s.waiting for s in found),
            running=sum(s.running for s in found),
            batch_tokens=sum(s.batch_tokens for s in found),
            cache_tokens_used=sum(s.cache_tokens_used for s in found),
            cache_tokens=sum(s.cache_tokens for s in found),
        )

    @property
    def failure(self) -> str | None:
        """Why the engine can no longer answer, or None while it can."""
        return next((lane.failure for lane in self._lanes.values() if lane.failure), None)

    def close(self) -> None:
        """Stop after the current step; sequences still running end with reason=error."""
        self._closed = True
        for lane in self._lanes.values():
            lane.close()


def _check_captured(options: EngineOptions, device: torch.device) -> None:
    if options.compile and device.type == "cpu":
        raise UserError(
            "compile=true: on the CPU sequences are computed one by one where that decides their "
            "bits, which cannot be compiled; leave it out, or serve on a GPU"
        )
    if (options.compile or options.cuda_graphs) and options.kv_cache != "none":
        raise UserError(
            f"kv_cache={options.kv_cache}: not beside cuda_graphs or compile, which take "
            "transformers' own attention; leave out one of them"
        )


def _load(path: Path, options: EngineOptions, device: torch.device) -> dict[str, PreTrainedModel]:
    """The models by name."""
    dtype = getattr(torch, options.dtype)
    folder = path.resolve()
    name = options.name or (folder.parent.name if folder.name in _NESTED else folder.name)
    if not (path / "adapter").is_dir():
        if options.adapters:
            raise UserError(
                f"adapters: {path} is no nf4/ directory of an adapter run, and adapters need the "
                "4-bit base that they were trained on"
            )
        return {name: load_packed(path, dtype, device)}
    return load_adapted(path, name, options.adapters, dtype, device)


def _sizes(model: PreTrainedModel, options: EngineOptions, context: int, lanes: int) -> Sizes:
    """Sizes of one lane's cache and steps."""
    config: Any = model.config.get_text_config()
    bits = None
    if options.kv_cache != "none":
        bits = int(options.kv_cache.removeprefix("int"))
        # raises for other than full attention
        QuantizedKVCache(model.config, bits)
    tokens = options.cache_tokens
    if tokens is None:
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        size = getattr(config, "head_dim", None)
        size = size or config.hidden_size // config.num_attention_heads
        wide = 2 * heads * size * model.dtype.itemsize
        each = config.num_hidden_layers * (bytes_per_token(heads, size, bits) if bits else wide)
        affordable = int(_CACHE_SHARE * _free_memory(model.device) / lanes / each)
        tokens = max(_PAGE, min(options.max_sequences * context, affordable))
    return Sizes(
        prompt_tokens=options.max_batch_tokens,
        max_sequences=options.max_sequences,
        cache_tokens=tokens,
        page=_PAGE,
        bits=bits,
        cuda_graphs=options.cuda_graphs and model.device.type == "cuda",
        compile=options.compile,
    )


def _free_memory(device: torch.device) -> int:
    """Bytes."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return int(psutil.virtual_memory().available)
