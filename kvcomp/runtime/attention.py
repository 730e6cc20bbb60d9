"""The attention functions `kvcomp_sdpa`, `kvcomp_eager` and so on: the base implementation over a layer's slots, then
compression.

transformers calls them like any registered implementation. Keys that do not come from a compressed layer go to the
base function unchanged.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, AttentionInterface

from kvcomp.runtime import flash, flex
from kvcomp.runtime.fixed import LAYER_ATTRIBUTE, FixedSlots
from kvcomp.runtime.forward import Logits
from kvcomp.runtime.layer import PackedAttention
from kvcomp.runtime.packed import attend_packed

PREFIX = "kvcomp_"
SIGHT_ATTRIBUTE = "kvcomp_sight"  # how a layer that shares another's keys finds what that layer saw of them
BASES = ("sdpa", "eager", flex.NAME, flash.NAME)

AttentionFunction = Callable[..., tuple[Tensor, Tensor | None]]


class AttendedLayer(Protocol):
    """What the attention function asks of the layer that keys came from: one of the cache, or of a second pass."""

    arrived: int

    def packed(self, base: str, query: Tensor, mask: Tensor | None, logits: Logits) -> PackedAttention | None:
        """Return the slots as they lie in memory, and their masks, if attention is to run over them so."""

    def unpacked(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Return keys and values of all slots, given what `update()` returned."""

    def slot_mask(self, mask: Tensor | None, queries: Tensor, *, aligned: bool) -> Tensor | None:
        """Return the mask over slots, given transformers' mask over columns.

        Args:
            mask: over columns, `(batch or 1, 1, queries, columns)`, or None.
            queries: `(batch, heads, queries, head_dim)`.
            aligned: whether attention without a mask shows several queries every slot before them, as flash attention
                does, and not as many slots as there are queries.
        """

    def attended(
        self, module: nn.Module, queries: Tensor, mask: Tensor | None, slot_mask: Tensor | None, logits: Logits
    ) -> None:
        """Take note of what the attention saw of the new tokens."""


def supports(base: str) -> bool:
    """Return whether compressed caches work with an attention implementation."""
    return base in BASES or flash.is_flash(base)


def register(base: str) -> str:
    """Register kvcomp's attention and mask function for a base, and return their name. Doing it again changes nothing.

    >>> register("sdpa"), register("flash_attention_2")
    ('kvcomp_sdpa', 'kvcomp_fa_attention_2')
    """
    name = PREFIX + base.replace("flash", "fa").replace("/", "_")  # else transformers would look for a kernel
    mask_function = flex.block_mask_over_columns if base == flex.NAME else ALL_MASK_ATTENTION_FUNCTIONS[base]
    AttentionInterface.register(name, partial(attend, base))
    AttentionMaskInterface.register(name, mask_function)
    return name


def attend(
    base: str,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | BlockMask | None,
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
    layer: AttendedLayer | FixedSlots | None = getattr(key, LAYER_ATTRIBUTE, None)
    if isinstance(layer, FixedSlots):
        assert not isinstance(attention_mask, BlockMask)  # a session refuses flex and flash attention for them
        return layer.attend(base, query, attention_mask, _logits(query, kwargs), kwargs.get("dropout", 0.0))
    function = _base_function(base, module)
    if layer is None:
        return function(module, query, key, value, attention_mask, **kwargs)
    logits = _logits(query, kwargs)
    before: Sight | None = getattr(key, SIGHT_ATTRIBUTE, None)
    columns_mask = _over_columns(base, attention_mask, query)
    sight = _sight(base, layer, query, key, value, columns_mask, logits) if before is None else before
    if sight.packed is None:
        keys, values = (key, value) if sight.states is None else sight.states
        given = (module, query, keys, values, sight.mask)
        if base == flex.NAME:
            output = flex.attend_flex(function, *given, attention_mask, logits, **kwargs)
        elif flash.is_flash(base):
            assert not isinstance(attention_mask, BlockMask)
            output = flash.attend_flash(function, *given, attention_mask, logits, **kwargs)
        else:
            output = function(*given, **kwargs)
    else:
        slots, _, masks = sight.packed
        output = attend_packed(base, query, slots, masks, logits, kwargs.get("dropout", 0.0))
    if layer.arrived and before is None:
        with torch.no_grad():
            layer.attended(module, query, columns_mask, sight.mask, logits)
    return output


@dataclass(frozen=True, eq=False)
class Sight:
    """What attention sees of a layer in one forward, noted on the keys that `update()` returned.

    Later layers may share these keys (Gemma 3n, Gemma 4). By their turn the layer itself may be compressed already, and
    they must see what it saw.

    Attributes:
        packed: the slots as they lie in memory, if attention runs over them so.
        mask: over slots.
        states: keys and values where they are not those that `update()` returned, which would be a reference cycle.
    """

    packed: PackedAttention | None
    mask: Tensor | None
    states: tuple[Tensor, Tensor] | None


def _sight(
    base: str,
    layer: AttendedLayer,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    logits: Logits,
) -> Sight:
    packed = layer.packed(base, query, mask, logits)
    if packed is None:
        states = layer.unpacked(key, value)
        slot_mask = layer.slot_mask(mask, query, aligned=flash.is_flash(base))
        sight = Sight(None, slot_mask, None if states[0] is key else states)
    else:
        sight = Sight(packed, packed[1], None)
    setattr(key, SIGHT_ATTRIBUTE, sight)
    return sight


def _over_columns(base: str, mask: Tensor | BlockMask | None, query: Tensor) -> Tensor | None:
    """Return transformers' mask as `(batch or 1, 1, queries, columns)`, whatever form the base has it in."""
    if isinstance(mask, BlockMask):
        return flex.as_tensor(mask)
    return flash.as_tensor(mask, query.shape[2]) if flash.is_flash(base) else mask


def _base_function(base: str, module: nn.Module) -> AttentionFunction:
    """Return the implementation; `eager` is each family's own function, beside its attention module."""
    if base == "eager":
        return sys.modules[type(module).__module__].eager_attention_forward  # type: ignore[no-any-return]
    if flash.is_flash(base):
        return partial(flash.attend_as, base)
    return ALL_ATTENTION_FUNCTIONS[base]  # type: ignore[no-any-return]


def _logits(query: Tensor, kwargs: dict[str, Any]) -> Logits:
    scaling = kwargs.get("scaling")
    return Logits(query.shape[-1] ** -0.5 if scaling is None else scaling, kwargs.get("softcap"), kwargs.get("s_aux"))
