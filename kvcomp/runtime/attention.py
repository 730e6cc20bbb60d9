"""The attention functions `kvcomp_sdpa` and `kvcomp_eager`: the base implementation over a layer's slots, then
compression.

transformers calls them like any registered implementation. Keys that do not come from a compressed layer go to the
base function unchanged.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, AttentionInterface

from kvcomp.runtime.forward import Logits
from kvcomp.runtime.layer import LAYER_ATTRIBUTE, CompressedCacheLayer
from kvcomp.runtime.packed import attend_packed, can_attend, own_slots

PREFIX = "kvcomp_"
BASES = ("sdpa", "eager")

AttentionFunction = Callable[..., tuple[Tensor, Tensor | None]]


def register() -> None:
    """Register the attention and mask function of every base. Registering again changes nothing."""
    for base in BASES:
        AttentionInterface.register(PREFIX + base, partial(attend, base))
        AttentionMaskInterface.register(PREFIX + base, ALL_MASK_ATTENTION_FUNCTIONS[base])


def attend(
    base: str,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Return the attention output over the slots of the layer that the keys came from.

    Args:
        base: name of the implementation that computes it.
        module: the attention module.
        query: `(batch, heads, tokens, head_dim)`, after rotary embedding.
        key: `(batch, kv_heads, slots, head_dim)`, as `update()` of the layer returned it.
        value: `(batch, kv_heads, slots, head_dim)`.
        attention_mask: over columns, as the base's mask function built it.
        kwargs: whatever else the model passes.
    """
    function = _base_function(base, module)
    layer: CompressedCacheLayer | None = getattr(key, LAYER_ATTRIBUTE, None)
    if layer is None:
        return function(module, query, key, value, attention_mask, **kwargs)
    logits = _logits(query, kwargs)
    packed = layer.storage.packed()
    if packed is not None and not can_attend(base, query, packed, layer.only_causal(attention_mask)):
        packed, (key, value) = None, layer.storage.read()
    mask = None
    if packed is None or query.shape[2] > 1 or layer.holds_padding:
        mask = layer.slot_mask(attention_mask, query)
    if packed is None:
        output = function(module, query, key, value, mask, **kwargs)
    else:
        masks = layer.head_masks(attention_mask, packed, query) if mask is None else own_slots(mask, packed)
        output = attend_packed(base, query, packed, masks, logits, kwargs.get("dropout", 0.0))
    if layer.arrived:
        with torch.no_grad():
            layer.attended(query, attention_mask, mask, logits)
    return output


def _base_function(base: str, module: nn.Module) -> AttentionFunction:
    """Return the implementation; `eager` is each family's own function, beside its attention module."""
    if base == "eager":
        return sys.modules[type(module).__module__].eager_attention_forward  # type: ignore[no-any-return]
    return ALL_ATTENTION_FUNCTIONS[base]  # type: ignore[no-any-return]


def _logits(query: Tensor, kwargs: dict[str, Any]) -> Logits:
    scaling = kwargs.get("scaling")
    return Logits(query.shape[-1] ** -0.5 if scaling is None else scaling, kwargs.get("softcap"), kwargs.get("s_aux"))
