"""Attention that gives a sequence the same bits in every batch: padding is skipped, not masked.

A masked key has probability zero, but it shifts the others against the kernel's blocks and takes
part in its order of additions, and PyTorch takes another kernel where there is a mask. Here each
padded sequence is cut to what it may see and computed as if it were alone. Batches without padding
go to transformers' sdpa as they are.

Shapes: query [B, H, Q, D], key and value [B, H_kv, L, D], mask bool [B, 1, Q, L] (true: visible).
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

NAME = "sdpa_by_row"
"""Value of ``attn_implementation``."""


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Transformers' attention function: the output [B, Q, H, D], zero where a query sees nothing.

    ``options`` (scaling, dropout ...) go to transformers' own sdpa.
    """
    if attention_mask is None or attention_mask.dtype != torch.bool or attention_mask.shape[1] != 1:
        found: tuple[Tensor, None] = sdpa_attention_forward(
            module, query, key, value, attention_mask, **options
        )
        return found
    batch, heads, length, _ = query.shape
    output = query.new_zeros(batch, length, heads, value.shape[-1])
    # a mask of one row serves the whole batch
    for i, mask_QL in enumerate(attention_mask[:, 0].expand(batch, -1, -1)):
        q, k = _span(mask_QL.any(1)), _span(mask_QL.any(0))
        one = slice(i, i + 1)
        if q.stop == 0:
            continue
        output[one, q] = sdpa_attention_forward(
            module,
            query[one, :, q],
            key[one, :, k],
            value[one, :, k],
            _needed(mask_QL[q, k]),
            **options,
        )[0]
    return output, None


def _span(visible: Tensor) -> slice:
    """From the first to the last true entry of a bool vector."""
    places = visible.nonzero()
    if not len(places):
        return slice(0, 0)
    return slice(int(places[0]), int(places[-1]) + 1)


def _needed(mask_QL: Tensor) -> Tensor | None:
    """The mask [1, 1, Q, L], or None where it says what sdpa assumes without one."""
    q, k = mask_QL.shape
    assumed = torch.ones_like(mask_QL) if q == 1 else torch.ones_like(mask_QL).tril()
    if q in (1, k) and torch.equal(mask_QL, assumed):
        return None
    return mask_QL[None, None]


AttentionInterface.register(NAME, attend)
AttentionMaskInterface.register(NAME, sdpa_mask)


def attend_by_row(model: PreTrainedModel) -> None:
    """Switch a model from sdpa to this attention; other implementations are left as they are."""
    if model.config._attn_implementation == "sdpa" and model._can_set_attn_implementation():
        model.set_attn_implementation(NAME)
