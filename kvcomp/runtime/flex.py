"""Flex attention over the slots of a layer: from block masks over columns to tensors, and back over slots."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, create_mask
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

from kvcomp.runtime.forward import Logits
from kvcomp.runtime.grouped import attend_grouped

NAME = "flex_attention"
_COLUMNS = "kvcomp_columns"  # on a block mask: itself as a tensor, None where it is causal and hides nothing else


def block_mask_over_columns(**arguments: Any) -> BlockMask:
    """Return the block mask that transformers builds, which knows whether it is plainly causal."""
    mask: BlockMask = ALL_MASK_ATTENTION_FUNCTIONS[NAME](**arguments)
    padding = arguments.get("attention_mask")
    # transformers allows the skip exactly where nothing but the causal pattern and padding shapes the mask.
    if arguments.get("allow_is_causal_skip", False) and (padding is None or bool(padding.all())):
        setattr(mask, _COLUMNS, None)
    return mask


def as_tensor(mask: BlockMask | Tensor | None) -> Tensor | None:
    """Return a block mask over columns as `(batch, 1, queries, columns)` bool, None where it is plainly causal.

    It is computed once for all layers that share the block mask.
    """
    if not isinstance(mask, BlockMask):
        return mask
    if not hasattr(mask, _COLUMNS):
        batch, _, queries, columns = mask.shape
        dense = create_mask(mask.mask_mod, batch, 1, queries, columns, device=mask.kv_num_blocks.device)
        setattr(mask, _COLUMNS, dense)
    return getattr(mask, _COLUMNS)  # type: ignore[no-any-return]


def attend_flex(
    function: Callable[..., tuple[Tensor, Tensor | None]],
    module: nn.Module,
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    mask: Tensor | None,
    block_mask: BlockMask | Tensor | None,
    logits: Logits,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Return the attention output `(batch, queries, heads, head_dim)` over slots.

    Args:
        function: transformers' own flex attention.
        module: the attention module.
        query: `(batch, heads, queries, head_dim)`.
        keys: `(batch, kv_heads, slots, head_dim)`.
        values: likewise.
        mask: over slots, `(batch or 1, heads or 1, queries, slots)`; None where the block mask says all, or where one
            query sees every slot.
        block_mask: over columns, as the model gave it.
        logits: how logits are made.
        kwargs: whatever else the model passes.
    """
    if mask is not None and mask.dtype != torch.bool:  # a bias per slot: the weights in steps
        return attend_grouped("eager", query, keys, values, mask, logits, kwargs.get("dropout", 0.0))[0], None
    if isinstance(block_mask, BlockMask) and as_tensor(block_mask) is mask and block_mask.shape[3] == keys.shape[2]:
        return function(module, query, keys, values, block_mask, **kwargs)
    own = None if mask is None else _block_mask(mask)
    return function(module, query, keys, values, own, **kwargs)


def _block_mask(mask: Tensor) -> BlockMask:
    """Return a mask over slots, `(batch or 1, heads or 1, queries, slots)` bool, as a block mask."""
    batch, heads, queries, slots = mask.shape

    def visible(row: Tensor, head: Tensor, place: Tensor, slot: Tensor) -> Tensor:
        return mask[row, head, place, slot]

    return create_block_mask(
        visible,
        batch if batch > 1 else None,
        heads if heads > 1 else None,
        queries,
        slots,
        device=mask.device,
    )
