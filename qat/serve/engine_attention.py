"""Paged attention in which each sequence is computed as if it were alone, and its cache.

Transformers' continuous batching gives attention the new tokens of all sequences in one row and
keeps keys and values in pages. Its own sdpa then masks a matrix of all new tokens by all cached
ones; a sequence's bits depend on the others. `attend` cuts keys and values into sequences and calls
for each the attention function that the model had before, with the arguments that ``generate``
would give it: no mask for a new token or a whole prompt, a mask for the later parts of a prompt
that is computed in pieces, and for what a sliding window hides.

`PagedCache` is transformers' paged cache, which for ``kv_cache=int8|int4`` holds the bytes of
`qat_kernels.kv_cache_numerics`: per token and head the codes and two bytes of scale. They are
dequantized one sequence at a time.

Shapes: query [1, H, T, D], key and value [1, H_kv, T, D], one piece of them [1, ., t, D]; a mask
[1, 1, t, past + t].
"""

import copy
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.generation.continuous_batching.cache import PagedAttentionCache
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from qat.errors import UserError
from qat.serve.engine_rows import Piece, Step
from qat_kernels.kv_cache_numerics import check_bits, dequantize, quantize

NAME = "qat_paged"
"""Value of ``attn_implementation``. It has no mask function: the model makes no mask."""
_BATCH = (
    *("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "block_table"),
    *("write_index", "read_index", "logits_indices", "logits_processor_args", "is_causal"),
    *("logits_to_keep", "position_ids", "use_cache"),
)
"""Arguments of a step that are not the attention function's."""
_SCALE_BYTES = 2


class PagedCache(PagedAttentionCache):
    """Keys and values of all sequences in pages, in the model's dtype or in codes.

    Args:
        config: the text model's configuration.
        step: the pieces of the step, shared with the layers.
        alone: the attention function for one sequence.
        dtype: of the activations.
        bits: 8 or 4, or None to hold ``dtype``.
        options: as for transformers' cache.
    """

    def __init__(
        self,
        config: Any,
        step: Step,
        alone: Callable[..., Any] | None,
        dtype: torch.dtype,
        bits: int | None = None,
        **options: Any,
    ) -> None:
        self.step, self.alone, self.bits = step, alone, bits
        if bits is not None:
            check_bits(bits)
            # a head of bytes: its codes, then its scale
            size = getattr(config, "head_dim", None)
            size = size or config.hidden_size // config.num_attention_heads
            config, dtype = copy.copy(config), torch.uint8
            config.head_dim = size * bits // 8 + _SCALE_BYTES
        super().__init__(config, dtype=dtype, **options)

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, kwargs: dict[str, Any]
    ) -> tuple[Tensor, Tensor]:
        """Write the new keys and values; returns those of all pieces, one after the other.

        In codes they are uint8 [1, H_kv, S, bytes], see `read`.
        """
        if self.bits is not None:
            key_states, value_states = (
                _to_bytes(*quantize(x, self.bits)) for x in (key_states, value_states)
            )
        found: tuple[Tensor, Tensor] = super().update(key_states, value_states, layer_idx, kwargs)
        return found

    def read(self, stored: Tensor, dtype: torch.dtype) -> Tensor:
        """One sequence [1, H_kv, S, D] of what `update` returned, in ``dtype``."""
        if self.bits is None:
            return stored
        codes, scale = stored[..., :-_SCALE_BYTES], stored[..., -_SCALE_BYTES:].contiguous()
        codes = codes.contiguous().view(torch.int8 if self.bits == 8 else torch.uint8)
        return dequantize(codes, scale.view(torch.bfloat16).squeeze(-1), dtype)

    def window(self, layer_idx: int) -> int | None:
        """The sliding window of a layer, or None."""
        allocator = self.layer_to_allocator[layer_idx]
        size: int | None = getattr(allocator, "sliding_window", None)
        return size

    def tokens_in_use(self) -> int:
        """Slots of the pages that sequences hold, of the kind of layer that holds most."""
        used: int = max(
            sum(len(pages) for pages in allocator.block_table.values()) * allocator.tokens_per_page
            for allocator in self.cache_allocators.values()
        )
        return used

    @property
    def tokens(self) -> int:
        """Slots in all."""
        size: int = self.max_tokens_read
        return size


def _to_bytes(codes: Tensor, scale: Tensor) -> Tensor:
    """uint8 [..., D * bits / 8 + 2]."""
    stored = (codes.view(torch.uint8), scale.unsqueeze(-1).contiguous().view(torch.uint8))
    return torch.cat(stored, -1)


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Transformers' attention function: the output [1, T, H, D] of a flat batch.

    Raises:
        RuntimeError: outside of a step, or the model does not pass the cache on.
    """
    cache = options.pop("cache", None)
    if not isinstance(cache, PagedCache):
        raise RuntimeError("this model hands its attention no paged cache")
    layer = int(module.layer_idx)  # type: ignore[arg-type]
    assert cache.alone is not None, "attention was switched"
    arguments = {name: options.pop(name) for name in _BATCH if name in options}
    keys, values = cache.update(key, value, layer, arguments)
    window = cache.window(layer)
    parts, start, place = [], 0, 0
    for piece in cache.step.pieces:
        seen = piece.past if window is None else min(piece.past, window - 1)
        total = seen + piece.length
        k, v = (cache.read(x[:, :, place : place + total], query.dtype) for x in (keys, values))
        mask = _mask(piece, seen, window, query.device)
        q = query[:, :, start : start + piece.length]
        parts.append(cache.alone(module, q, k, v, mask, **options)[0])
        start, place = start + piece.length, place + total
    if start != query.shape[2]:
        raise RuntimeError(f"a step of {query.shape[2]} tokens, of which {start} are known")
    return (parts[0] if len(parts) == 1 else torch.cat(parts, 1)), None


def _mask(piece: Piece, seen: int, window: int | None, device: torch.device) -> Tensor | None:
    """Bool [1, 1, t, seen + t] (true: visible), or None where causal attention says as much."""
    # as in generate: from the window's length on, though the first such mask hides nothing
    windowed = window is not None and seen + piece.length >= window
    if not windowed and (piece.length == 1 or seen == 0):
        return None
    q = torch.arange(piece.length, device=device)[:, None] + seen
    k = torch.arange(seen + piece.length, device=device)
    visible = k <= q
    if window is not None:
        visible &= k > q - window
    return visible[None, None]


AttentionInterface.register(NAME, attend)


def attention_of(model: PreTrainedModel) -> Callable[..., Any]:
    """The function with which a model attends to one sequence.

    Raises:
        UserError: an implementation that continuous batching cannot use.
    """
    name = model.config._attn_implementation
    found: Callable[..., Any] | None
    if name == "sdpa":
        found = sdpa_attention_forward
        return found
    if name == "eager":
        layer = next(m for m in model.modules() if type(m).__name__.endswith("Attention"))
        plain = vars(sys.modules[type(layer).__module__]).get("eager_attention_forward")
        if plain is not None:
            return _with_float_mask(plain)
        name = "eager, of another kind,"
    found = ALL_ATTENTION_FUNCTIONS._global_mapping.get(name)
    if found is None:
        raise UserError(
            f"attention {name} of {model.config.model_type}: cannot be served in batches; use "
            "qat generate"
        )
    return found


def _with_float_mask(plain: Callable[..., Any]) -> Callable[..., Any]:
    """Eager attention adds its mask and knows no other way to be causal."""

    def eager(
        module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, **options: Any
    ) -> Any:
        if mask is None:
            mask = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).tril()
            mask = mask[None, None] if q.shape[2] > 1 else mask.new_ones(1, 1, 1, k.shape[2])
        low = torch.finfo(q.dtype).min
        added = torch.zeros(mask.shape, dtype=q.dtype, device=q.device).masked_fill(~mask, low)
        return plain(module, q, k, v, added, **options)

    return eager


def attend_in_pages(model: PreTrainedModel) -> Callable[..., Any]:
    """Switch a model to `attend`; returns the function it had for one sequence.

    Raises:
        UserError: the model's attention cannot be replaced.
    """
    alone = attention_of(model)
    if not (model._supports_attention_backend and model._can_set_attn_implementation()):
        raise UserError(
            f"{model.config.model_type}: its attention cannot be replaced by a paged one; use "
            "qat generate"
        )
    model.set_attn_implementation(NAME)
    return alone
