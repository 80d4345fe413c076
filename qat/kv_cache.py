"""A KV cache of int8 or int4 codes for transformers models.

>>> cache = QuantizedKVCache(model.config, bits=8)                        # doctest: +SKIP
>>> model.generate(**inputs, past_key_values=cache)                       # doctest: +SKIP

`QuantizedKVCache` quantizes keys and values when they are written (numbers and layout:
`qat_kernels.kv_cache_numerics`) and holds codes and scales, nothing wider. The attention of any
model then gets them dequantized. The tokens of a prompt attend to the dequantized values too, those
of their own forward pass included: so a prompt in one pass, in pieces, or token by token reads the
same numbers, and the loss of one forward pass with such a cache is the loss of generating with it.

On CUDA, models of plain attention (`PLAIN`) can attend to the codes directly, one new token at a
time: `attend_to_codes(model)` switches it on. The cache then returns placeholders of NaN in place
of dequantized keys and values, and the attention function registered here as ``qat_kv_cache``
finds the layer's codes through them. What the kernel does not cover (masks with holes, softcaps,
several query tokens) is dequantized.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicCache, DynamicLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from qat.errors import UserError
from qat_kernels import kv_cache as kernels

KVCacheName = Literal["none", "int8", "int4"]
"""Values of ``kv_cache=``: the model's own 16-bit cache, or codes of 8 or 4 bits."""
ATTENTION = "qat_kv_cache"
"""Name of the attention function in transformers' registry."""
PLAIN = (
    *("llama", "mistral", "mixtral", "qwen2", "qwen3", "qwen3_moe", "gemma", "phi", "phi3"),
    *("gpt_neox", "opt", "stablelm"),
)
"""Model types whose attention hands what the cache returns to the attention function untouched."""
GROWTH = 256
"""Tokens by which a cache without a given capacity grows."""
_LAYER = "_qat_layer"


@dataclass
class _Step:
    """What the layers of one cache share in one decoding step: the span of each sequence."""

    mask: Tensor | None = None
    key: tuple[int, int, torch.device, int] | None = None
    span: Tensor | None = None


class QuantizedKVLayer(CacheLayerMixin):  # type: ignore[misc,unused-ignore]
    """Keys and values of one attention layer in codes; made by `QuantizedKVCache`."""

    is_compileable = False
    is_sliding = False
    is_croppable = True

    def __init__(
        self, bits: int, capacity: int | None, fused: bool | None, config: Any, step: _Step
    ) -> None:
        super().__init__()
        self.bits = bits
        self.buffers: kernels.Buffers | None = None
        self.length = 0
        self._capacity, self._fused, self._config, self._step = capacity, fused, config, step

    def __repr__(self) -> str:
        return f"QuantizedKVLayer(bits={self.bits}, length={self.length})"

    @property
    def batch_size(self) -> int:
        """Sequences held. Raises AttributeError before the first update, as transformers asks."""
        if self.buffers is None:
            raise AttributeError("batch_size")
        return self.buffers.k_codes.shape[0]

    @property
    def nbytes(self) -> int:
        """Bytes held: codes and scales, unused slots included."""
        return 0 if self.buffers is None else self.buffers.nbytes

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Allocate for the shapes, dtype and device of [B, H, T, D] tensors."""
        if key_states.shape != value_states.shape:
            raise UserError(
                f"kv_cache=int{self.bits}: keys {tuple(key_states.shape)} and values "
                f"{tuple(value_states.shape)} differ in shape, which a quantized cache does not "
                "hold; use kv_cache=none"
            )
        self.dtype, self.device = key_states.dtype, key_states.device
        b, h, t, d = key_states.shape
        capacity = max(self._capacity or -(-t // GROWTH) * GROWTH, t, 1)
        self.buffers = kernels.allocate(b, h, capacity, d, self.bits, self.device, self.dtype)
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Quantize and keep [B, H, T, D]; returns all keys and values, dequantized, in that dtype.

        With the kernel on, one new token returns placeholders instead (see the module).
        """
        if self.buffers is None:
            self.lazy_initialization(key_states, value_states)
        assert self.buffers is not None
        new = key_states.shape[2]
        self._reserve(self.length + new)
        kernels.write(self.buffers, key_states, value_states, self.length)
        self.length += new
        if new == 1 and self._attends_to_codes():
            b, h = key_states.shape[:2]
            nothing = key_states.new_full((), torch.nan)
            handle = nothing.expand(b, h, self.length, self.buffers.head_size)
            setattr(handle, _LAYER, self)
            return handle, handle
        return self.read(key_states.dtype)

    def read(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """All keys and values [B, H, length, D], dequantized."""
        assert self.buffers is not None
        return kernels.read(self.buffers, self.length, dtype)

    def _attends_to_codes(self) -> bool:
        assert self.buffers is not None
        # the models' attention looks the implementation up at each call, and so does this
        if getattr(self._config, "_attn_implementation", None) != ATTENTION:
            return False
        return self.buffers.path == "triton" if self._fused is None else self._fused

    def span(self, mask: Tensor | None) -> Tensor | None:
        """int32 [2, B] of what each sequence sees; None where a mask is more than left padding.

        Args:
            mask: None, or bool [B or 1, 1, 1, length].
        """
        assert self.buffers is not None
        b, step, device = self.batch_size, self._step, self.buffers.k_codes.device
        if mask is not None and mask.is_inference():
            # it has no version by which a change would be noticed
            return _span_of(mask, b, self.length)
        key = (b, self.length, device, -1 if mask is None else mask._version)
        if step.key == key and step.mask is mask:
            return step.span
        step.mask, step.key = mask, key
        if mask is None:
            step.span = torch.zeros(2, b, dtype=torch.int32, device=device)
            step.span[1] = self.length
        else:
            step.span = _span_of(mask, b, self.length)
        return step.span

    def _reserve(self, length: int) -> None:
        """Make room for ``length`` tokens, by copying into larger buffers where need be."""
        assert self.buffers is not None
        if length <= self.buffers.capacity:
            return
        more = -(-length // GROWTH) * GROWTH
        shapes = [(*t.shape[:2], more, *t.shape[3:]) for t in self.buffers.tensors]
        larger = [t.new_empty(s) for t, s in zip(self.buffers.tensors, shapes)]
        for new, old in zip(larger, self.buffers.tensors):
            new[:, :, : self.length] = old[:, :, : self.length]
        self._hold(*larger)

    def _hold(self, k_codes: Tensor, k_scale: Tensor, v_codes: Tensor, v_scale: Tensor) -> None:
        assert self.buffers is not None
        bits, path = self.buffers.bits, self.buffers.path
        self.buffers = kernels.Buffers(k_codes, k_scale, v_codes, v_scale, bits, path)
        self._step.key = None

    def get_seq_length(self) -> int:
        """Tokens held."""
        return self.length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """(tokens that ``query_length`` new ones see, offset of the first)."""
        return self.length + query_length, 0

    def get_max_length(self) -> int:
        """-1: it grows."""
        return -1

    # its name before transformers 5.2x
    get_max_cache_shape = get_max_length

    def reset(self) -> None:
        """Forget everything; the next update may have another batch size."""
        self.buffers, self.length, self.is_initialized = None, 0, False

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last -n tokens; a positive n keeps the first n (transformers before 5.2x)."""
        n = tokens_to_remove
        self.length = min(n, self.length) if n > 0 else max(self.length + n, 0)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Take the sequences ``beam_idx`` [B'] (int64), in that order."""
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Take the sequences ``indices`` [B'] (int64, or bool [B])."""
        if self.buffers is not None:
            indices = indices.to(self.buffers.k_codes.device)
            self._hold(*(tensor[indices] for tensor in self.buffers.tensors))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each sequence ``repeats`` times, neighbours staying together."""
        if self.buffers is not None:
            self._hold(*(t.repeat_interleave(repeats, dim=0) for t in self.buffers.tensors))

    def offload(self) -> None:
        """Move codes and scales to the CPU."""
        if self.buffers is not None:
            self._hold(*(t.to("cpu", non_blocking=True) for t in self.buffers.tensors))

    def prefetch(self) -> None:
        """Move codes and scales back to where they were written."""
        if self.buffers is not None:
            self._hold(*(t.to(self.device, non_blocking=True) for t in self.buffers.tensors))


class QuantizedKVCache(Cache):  # type: ignore[misc,unused-ignore]
    """Quantized keys and values of all layers: pass it as ``past_key_values``.

    Args:
        config: the model's configuration.
        bits: 8 or 4.
        capacity: tokens for which memory is taken at once; None grows by 256 at a time.
        fused: None attends to the codes where kernel and model allow it (see the module); False
            never does; True does so wherever the attention function is set, on the CPU through
            the reference.

    Raises:
        UserError: other bits, a capacity below 1, or a model with other than full attention.
    """

    def __init__(
        self, config: Any, bits: int = 8, capacity: int | None = None, fused: bool | None = None
    ) -> None:
        if bits not in kernels.BITS:
            raise UserError(f"bits={bits}: a KV cache has 8 or 4 bits")
        if capacity is not None and capacity < 1:
            raise UserError(f"capacity={capacity}: at least 1 token")
        count = _full_attention_layers(config, bits)
        decoder, step = config.get_text_config(decoder=True), _Step()
        layers = [QuantizedKVLayer(bits, capacity, fused, decoder, step) for _ in range(count)]
        super().__init__(layers=layers)
        self.bits = bits

    @property
    def nbytes(self) -> int:
        """Bytes held: codes and scales of all layers, unused slots included."""
        return sum(layer.nbytes for layer in self.layers)


def _full_attention_layers(config: Any, bits: int) -> int:
    """How many layers the model has. Raises UserError if one of them is not full attention."""
    name = f"kv_cache=int{bits}"
    if getattr(config, "is_encoder_decoder", False):
        raise UserError(
            f"{name}: {config.model_type} is an encoder-decoder, only decoders are covered; use "
            "kv_cache=none"
        )
    layers = DynamicCache(config=config).layers
    for i, layer in enumerate(layers):
        if type(layer) is DynamicLayer:
            continue
        window = getattr(layer, "sliding_window", None)
        kind = type(layer).__name__ if window is None else f"a sliding window of {window}"
        hint = "" if window is None else f" (or, for texts below {window} tokens, switch it off)"
        raise UserError(
            f"{name}: layer {i} of {len(layers)} of this {config.model_type} model has {kind}, "
            f"and only full attention is cached in low bits; use kv_cache=none{hint}"
        )
    return len(layers)


def _span_of(mask: Tensor, batch: int, length: int) -> Tensor | None:
    """int32 [2, batch] for a mask of left padding only, else None. Waits for the device."""
    if mask.dtype != torch.bool or mask.shape[1:3] != (1, 1) or mask.shape[3] < length:
        return None
    seen = mask[:, 0, 0, :length].expand(batch, length)
    if bool(mask[..., length:].any()):
        return None
    start = seen.to(torch.int8).argmax(-1)
    # where nothing is seen, argmax says 0 and the sums differ
    if not bool((seen.sum(-1) == length - start).all()):
        return None
    return torch.stack((start, torch.full_like(start, length))).to(torch.int32)


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention to the codes of a `QuantizedKVCache`; everything else by torch's own attention.

    query [B, H * G, T, D]; key, value [B, H, L, D], or the placeholders that the cache returned.
    Returns [B, T, H * G, D] and None.
    """
    layer: QuantizedKVLayer | None = getattr(key, _LAYER, None)
    if layer is not None:
        special = ("softcap", "sliding_window", "s_aux", "position_bias")
        plain = query.shape[2] == 1 and dropout == 0 and all(kwargs.get(x) is None for x in special)
        span = layer.span(attention_mask) if plain else None
        if span is not None and layer.buffers is not None:
            out = kernels.attention(query[:, :, 0], layer.buffers, span, scaling)
            return out.unsqueeze(1), None
        key, value = layer.read(query.dtype)
    result: tuple[Tensor, None] = sdpa_attention_forward(
        module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
    )
    return result


AttentionInterface.register(ATTENTION, attention_forward)
AttentionMaskInterface.register(ATTENTION, sdpa_mask)


def attend_to_codes(model: PreTrainedModel) -> bool:
    """Let the model's attention read the codes of a `QuantizedKVCache`; whether it can.

    With other caches, and for all but single new tokens, it then computes what ``sdpa`` computes.
    """
    plain = model.config.model_type in PLAIN
    if plain:
        model.set_attn_implementation(ATTENTION)
    return plain


def make_cache(model: PreTrainedModel, name: KVCacheName, capacity: int) -> dict[str, Any]:
    """Arguments for ``model.generate``: empty for ``none``, else ``past_key_values``.

    Args:
        model: the model, on its device.
        name: none, int8 or int4.
        capacity: tokens of prompt and answer together.

    Raises:
        UserError: the model has other than full attention, or no such name.
    """
    if name == "none":
        return {}
    if name not in ("int8", "int4"):
        raise UserError(f"kv_cache={name}: none, int8 or int4")
    cache = QuantizedKVCache(model.config, int(name.removeprefix("int")), capacity)
    if model.device.type == "cuda":
        attend_to_codes(model)
    return {"past_key_values": cache}
