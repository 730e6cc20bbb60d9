"""Slots at fixed addresses: what a decode step that is compiled once sees of a layer, as long as there is room.

Everything that changes from token to token is a number on the device. What Python knows of the layer is brought up to
date when somebody asks (`LayerState.catch_up`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from kvcomp.core.errors import InputError, UnsupportedModelError, UnsupportedUseError
from kvcomp.core.packed import PackedSlots
from kvcomp.core.storage import SlotStorage, SteadyStorage
from kvcomp.core.strategy import Strategy
from kvcomp.runtime.forward import Logits
from kvcomp.runtime.grouped import attend_grouped
from kvcomp.runtime.packed import attend_packed, can_attend, own_slots
from kvcomp.runtime.slots import SlotTable

LAYER_ATTRIBUTE = "kvcomp_layer"  # how the attention function finds the layer that its keys came from
STEP = 64  # capacities are multiples of it, so that requests of similar length share a graph


def rounded(slots: int) -> int:
    """Return the capacity for so many slots.

    >>> rounded(100), rounded(128)
    (128, 128)
    """
    return -(-slots // STEP) * STEP


class FixedSlots:
    """The slots of one layer in memory that does not move, with room for the tokens to come.

    A mask over columns says what a token sees. Each slot knows its column, and what holds nothing has a column that is
    never seen.

    Args:
        memory: keys and values `(batch, kv_heads, capacity, head_dim)`, or where heads are packed their places.
        table: of the slots that are filled.
        seen: columns seen.
        causal: whether no slot is that of a padding token.

    Attributes:
        columns: `(batch, kv_heads or 1, capacity)` int64, of the slots and of the room after them.
        bias: log(count) of each slot, `(batch, kv_heads or 1, 1, capacity)`, where it is added to the logits; or None.
        appended: tokens that were appended, 0-d int64 on the device.
        seen: columns seen, likewise.
        width: of the mask over columns.
        room: tokens that may be appended.
    """

    def __init__(
        self, memory: PackedSlots | tuple[Tensor, Tensor], table: SlotTable, seen: int, *, causal: bool
    ) -> None:
        self.packed: PackedSlots | None = None
        self.slots = table.slots  # those of the longest head
        if isinstance(memory, PackedSlots):
            self.packed = replace(memory, appended=memory.layout.room)  # its sequences reach to the end of the room
            self.before = memory.appended
            self.keys, self.values = memory.keys, memory.values
            capacity = memory.layout.width + memory.layout.room
        else:
            self.keys, self.values = memory
            capacity = self.keys.shape[2]
        self.room = capacity - self.slots
        self.width = rounded(seen + self.room + 1)
        self.columns = _columns(table, seen, capacity, never=self.width - 1)
        self.bias: Tensor | None = None
        self.appended = torch.zeros((), dtype=torch.long, device=self.keys.device)
        self.seen = torch.full((), seen, dtype=torch.long, device=self.keys.device)
        self.counted = 0  # appended tokens that Python knows of
        self.places: Tensor | None = None  # (batch, kv_heads, capacity), where attention needs padded heads
        if self.packed is not None and not can_attend("sdpa", self.packed, Logits(1.0), causal):
            self.places = _places(self.packed, capacity)

    def weigh(self, counts: Tensor, dtype: torch.dtype) -> None:
        """Add log(count) to the logits of slots from now on, given `(batch, kv_heads, slots)` float32."""
        counts = counts[:, : self.columns.shape[1]]
        bias = F.pad(counts.clamp(min=1.0).log(), (0, self.columns.shape[2] - counts.shape[2]))
        self.bias = bias[:, :, None].to(dtype)
        if self.packed is not None and self.keys.device.type != "cpu":
            self.places = _places(self.packed, self.columns.shape[2])

    def tensors(self) -> list[Tensor]:
        """Return what is held beside keys and values."""
        return [self.columns, self.appended, self.seen, *(t for t in (self.bias, self.places) if t is not None)]

    def pin(self) -> None:
        """Tell torch.compile that nothing of this moves, so that CUDA graphs need not copy it."""
        for tensor in (self.keys, self.values, *self.tensors()):
            torch._dynamo.mark_static_address(tensor)

    def news(self) -> tuple[int, int]:
        """Return how many tokens were appended since the last time, and how many in all found no room."""
        total = int(self.appended)  # waits for the device
        new = min(total, self.room) - self.counted
        self.counted += new
        return new, max(0, total - self.room)

    # --- what a decode step calls ---

    def update(self, key_states: Tensor, value_states: Tensor) -> tuple[Tensor, Tensor]:
        """Take in one token, `(batch, kv_heads, 1, head_dim)`, and return the memory of keys and values."""
        place = self.appended.clamp(max=self.room - 1)  # a device cannot raise; `news` tells what found no room
        if self.packed is None:
            self.keys.index_copy_(2, (place + self.slots)[None], key_states)
            self.values.index_copy_(2, (place + self.slots)[None], value_states)
        else:
            places = self.packed.layout.ends + (place + self.before)
            self.keys.index_copy_(0, places, key_states.reshape(-1, key_states.shape[3]))
            self.values.index_copy_(0, places, value_states.reshape(-1, value_states.shape[3]))
        self.appended.add_(1)
        self.seen.add_(1)
        keys = self.keys[:]  # a fresh view, as in CompressedCacheLayer.update
        setattr(keys, LAYER_ATTRIBUTE, self)
        return keys, self.values

    def attend(
        self, base: str, query: Tensor, mask: Tensor | None, logits: Logits, dropout: float
    ) -> tuple[Tensor, Tensor | None]:
        """Return the attention output `(batch, 1, heads, head_dim)` of one token, and for `eager` the weights.

        Args:
            base: `sdpa` or `eager`.
            query: `(batch, heads, 1, head_dim)`.
            mask: over columns, `(batch or 1, 1, 1, width)`, bool or additive, or None where all are visible.
            logits: how logits are made.
            dropout: probability that a weight is dropped.
        """
        slots = self.packed
        if slots is None:
            return attend_grouped(base, query, self.keys, self.values, self.mask(mask, query.dtype), logits, dropout)
        if self.places is not None and base == "sdpa":
            keys, values = (F.embedding(self.places, memory) for memory in (self.keys, self.values))
            return attend_grouped(base, query, keys, values, self.mask(mask, query.dtype), logits, dropout)
        masks: Sequence[Tensor] = ()  # variable-length attention needs none
        if base == "eager" or query.device.type == "cpu":
            heads = (query.shape[0], slots.layout.kv_heads, 1, -1)
            masks = own_slots(self.mask(mask, query.dtype).expand(heads), slots)
        return attend_packed(base, query, slots, masks, logits, dropout, self.appended + self.before)

    def mask(self, mask: Tensor | None, dtype: torch.dtype) -> Tensor:
        """Return the mask over slots and room, `(batch, kv_heads or 1, 1, capacity)`, given that over columns."""
        columns = self.columns[:, :, None]
        if mask is None:
            visible = columns < self.seen
        else:
            visible = mask.expand(columns.shape[0], columns.shape[1], 1, -1).gather(3, columns)
        if self.bias is None:
            return visible
        lowest = torch.finfo(dtype).min
        if visible.dtype == torch.bool:
            return torch.where(visible, self.bias, lowest)
        return (visible + self.bias).clamp(min=lowest)


def _columns(table: SlotTable, seen: int, capacity: int, never: int) -> Tensor:
    """Return the column of every slot and of the room, `(batch, kv_heads or 1, capacity)` int64."""
    columns = table.columns if table.mask is None else table.columns.masked_fill(~table.mask, never)
    if columns.stride(1) == 0:  # all heads hold the same
        columns = columns[:, :1]
    room = torch.arange(seen, seen + capacity - table.slots, device=columns.device)
    return torch.cat([columns.long(), room.expand(*columns.shape[:2], -1)], dim=2)


def _places(slots: PackedSlots, capacity: int) -> Tensor:
    """Return where each slot lies in the buffer, `(batch, kv_heads, capacity)` int64; empty ones share the first."""
    layout, device = slots.layout, slots.keys.device
    starts = torch.tensor(layout.starts, device=device)[:, None]
    lengths = torch.tensor(layout.lengths, device=device)[:, None]
    axis = torch.arange(capacity, device=device)
    places = torch.where(axis < layout.width, axis, axis - layout.width + lengths)
    places = torch.where((axis >= lengths) & (axis < layout.width), 0, places) + starts
    return places.view(-1, layout.kv_heads, capacity)


def check_reserve(reserve: int | None, *, compiled: bool) -> None:
    """Raise where `reserve` cannot be taken as room for tokens to come.

    Raises:
        InputError: it is no whole number of at least 1, or missing where slots lie at fixed addresses.
    """
    if reserve is not None and (type(reserve) is not int or reserve < 1):
        raise InputError(f"reserve must be a whole number of slots, at least 1, got {reserve!r}")
    if compiled and reserve is None:
        raise InputError("compiled=True needs reserve, the number of tokens to decode at most, got reserve=None")


def check_steady(strategy: Strategy, storages: Sequence[SlotStorage], others: int, *, defer: bool) -> None:
    """Raise where slots would not stay at fixed addresses while tokens are decoded, with every reason.

    Args:
        strategy: what compresses.
        storages: of its layers.
        others: layers that are not compressed.
        defer: whether the compression waits.

    Raises:
        UnsupportedModelError: the model has layers that are not compressed.
        UnsupportedUseError: the strategy or a setting moves slots.
    """
    if others:
        raise UnsupportedModelError(
            f"compiled=True needs full attention in every layer: {others} layers have sliding windows or linear "
            "attention, and their caches grow. Decode without it"
        )
    reasons = []
    if not all(isinstance(storage, SteadyStorage) for storage in storages):
        reasons.append(f"store {strategy.store.use!r} rewrites slots while tokens are appended; use dense or ragged")
    if strategy.recompresses:
        reasons.append(f"trigger {strategy.trigger} compresses while tokens are decoded; use prefill-end")
    if strategy.reads_rotary and strategy.turns == "recompress":
        reasons.append("keys are turned back in later turns by the rotary embeddings of all tokens; use turns: append")
    if defer:
        reasons.append("defer=True compresses at the first decoded token; leave it out")
    if reasons:
        raise UnsupportedUseError(
            f"compiled=True needs slots that stay where they are, and with recipe {strategy.name!r} they do not: "
            + "; ".join(reasons)
        )
