"""What each slot of a layer stands for: the bookkeeping beside keys and values."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from kvcomp.core.types import CompressedLayer, Pivots


@dataclass(frozen=True, eq=False)
class Places:
    """In which column of the attention mask each slot lies: all that a mask over slots is made of.

    Attributes:
        columns: `(batch, kv_heads, slots)` int32.
        mask: `(batch, kv_heads, slots)` bool, false where empty; None where every slot is filled.
    """

    columns: Tensor
    mask: Tensor | None = None

    @property
    def valid(self) -> Tensor:
        """Return `(batch, kv_heads, slots)` bool, expanded where every slot is filled."""
        return _filled(self.columns) if self.mask is None else self.mask

    def then(self, start: int, tokens: int) -> Places:
        """Return these places and those of so many tokens from a column on, one slot each in every head."""
        if not tokens:
            return self
        later = torch.arange(start, start + tokens, dtype=self.columns.dtype, device=self.columns.device)
        columns = torch.cat([self.columns, later.expand(*self.columns.shape[:2], -1)], dim=2)
        return Places(columns, None if self.mask is None else F.pad(self.mask, (0, tokens), value=True))


@dataclass(frozen=True, eq=False)
class SlotTable:
    """One entry per slot, each `(batch, kv_heads, slots)`; expanded views as long as the heads agree.

    Attributes:
        indices: int32, logical position in the row (padding not counted), -1 where empty.
        columns: int32, column in the attention mask (padding counted); the indices themselves where nothing is padded.
        counts: float32, how many prompt tokens the slot stands for.
        modality: int8.
        positions: `(axes, batch, kv_heads, slots)` int32, what the rotary embedding saw.
        mask: bool, false where empty; None where every slot is filled.
    """

    indices: Tensor
    columns: Tensor
    counts: Tensor
    modality: Tensor
    positions: Tensor
    mask: Tensor | None = None

    @property
    def slots(self) -> int:
        """Return the number of slots of the longest head."""
        return self.indices.shape[2]

    @property
    def valid(self) -> Tensor:
        """Return `(batch, kv_heads, slots)` bool, expanded where every slot is filled."""
        return _filled(self.indices) if self.mask is None else self.mask

    @property
    def places(self) -> Places:
        """Return where the slots lie."""
        return Places(self.columns, self.mask)

    @classmethod
    def of(cls, layer: CompressedLayer, columns: Tensor | None) -> SlotTable:
        """Return the table of a compressed layer; `columns` is None where nothing was padded."""
        columns = layer.indices if columns is None else columns
        return cls(layer.indices, columns, layer.counts, layer.modality, layer.positions, layer.mask)

    def map(self, change: Callable[[Tensor], Tensor]) -> SlotTable:
        """Return the table with a change of the batch or slot axis applied to every entry."""
        columns = change(self.columns)
        return SlotTable(
            indices=columns if self.columns is self.indices else change(self.indices),
            columns=columns,
            counts=change(self.counts),
            modality=change(self.modality),
            positions=torch.stack([change(axis) for axis in self.positions]),
            mask=None if self.mask is None else change(self.mask),
        )

    def extend(self, other: SlotTable) -> SlotTable:
        """Return this table with the slots of another after its own."""
        mask = None
        if self.mask is not None or other.mask is not None:
            mask = torch.cat([self.valid, other.valid], dim=2)
        indices = torch.cat([self.indices, other.indices], dim=2)
        same = self.columns is self.indices and other.columns is other.indices
        return SlotTable(
            indices=indices,
            columns=indices if same else torch.cat([self.columns, other.columns], dim=2),
            counts=torch.cat([self.counts, other.counts], dim=2),
            modality=torch.cat([self.modality, other.modality], dim=2),
            positions=torch.cat(_same_axes(self.positions, other.positions), dim=3),
            mask=mask,
        )

    def masked(self, stays: Tensor) -> SlotTable:
        """Return the table with the slots outside `stays` `(batch, kv_heads, slots)` empty."""
        indices = self.indices.masked_fill(~stays, -1)
        columns = indices if self.columns is self.indices else self.columns.masked_fill(~stays, -1)
        counts = self.counts.masked_fill(~stays, 0.0)
        return SlotTable(indices, columns, counts, self.modality, self.positions, stays)

    def together(self, per_slot: Tensor, empty: int) -> Tensor:
        """Return `(batch, kv_heads, slots, ...)` with the empty slots of each head at its end, set to `empty`."""
        if self.mask is None:
            return per_slot
        slots = int(self.mask.sum(dim=-1).max())
        order = Pivots((~self.mask).to(torch.uint8).argsort(dim=-1, stable=True)[..., :slots])
        filled = order.gather(self.mask)
        return order.gather(per_slot).masked_fill(~(filled if per_slot.dim() == 3 else filled[..., None]), empty)

    def positions_at(self, column: int) -> Tensor:
        """Return the position of a text token in this column, `(axes, batch)`; what is gone before counts as text."""
        held = self.positions.masked_fill(~self.valid, -1).amax(dim=(0, 2, 3))
        last = self.columns.masked_fill(~self.valid, -1).amax(dim=(1, 2))
        return (held + column - last).expand(self.positions.shape[0], -1)

    def tensors(self) -> tuple[Tensor, ...]:
        """Return the tensors that hold the table."""
        entries = (self.indices, self.columns, self.counts, self.modality, self.positions)
        return entries if self.mask is None else (*entries, self.mask)


@dataclass(frozen=True, eq=False)
class PackedTable:
    """The table of heads that keep different numbers of slots, without the empty ones: how it is held between uses.

    Attributes:
        indices, columns, counts, modality: `(filled slots,)` each, heads one after the other.
        positions: one such tensor per axis.
        mask: `(batch, kv_heads, slots)` bool, where they belong.
    """

    indices: Tensor
    columns: Tensor
    counts: Tensor
    modality: Tensor
    positions: tuple[Tensor, ...]
    mask: Tensor

    @property
    def slots(self) -> int:
        """Return the number of slots of the longest head."""
        return self.mask.shape[2]

    @classmethod
    def of(cls, table: SlotTable) -> PackedTable:
        """Return a table whose mask is not None, packed."""
        assert table.mask is not None
        filled = table.mask.flatten().nonzero()[:, 0]

        def pack(entry: Tensor) -> Tensor:
            return entry.flatten()[filled]

        indices = pack(table.indices)
        columns = indices if table.columns is table.indices else pack(table.columns)
        positions = tuple(pack(axis) for axis in table.positions)
        return cls(indices, columns, pack(table.counts), pack(table.modality), positions, table.mask)

    @property
    def places(self) -> Places:
        """Return where the slots lie, the empty ones in column -1."""
        return Places(self._spread(self.columns, -1), self.mask)

    def unpacked(self) -> SlotTable:
        """Return the table with its empty slots: index and column -1, everything else 0."""
        indices = self._spread(self.indices, -1)
        return SlotTable(
            indices=indices,
            columns=indices if self.columns is self.indices else self._spread(self.columns, -1),
            counts=self._spread(self.counts),
            modality=self._spread(self.modality),
            positions=torch.stack([self._spread(axis) for axis in self.positions]),
            mask=self.mask,
        )

    def _spread(self, packed: Tensor, empty: int = 0) -> Tensor:
        entry = torch.full(self.mask.shape, empty, dtype=packed.dtype, device=packed.device)
        return entry.masked_scatter_(self.mask, packed)

    def tensors(self) -> tuple[Tensor, ...]:
        """Return the tensors that hold the table."""
        return self.indices, self.columns, self.counts, self.modality, *self.positions, self.mask


def new_tokens(
    shape: tuple[int, int, int],
    seen: int,
    before: Tensor,
    *,
    device: torch.device,
    valid: Tensor | None = None,
    modality: Tensor | None = None,
    positions: Tensor | None = None,
) -> SlotTable:
    """Return the table of tokens that just arrived: one slot each, the same for every head.

    Args:
        shape: `(batch, kv_heads, tokens)`.
        seen: columns seen before.
        before: valid tokens seen before by each row, `(batch,)` int64 on the CPU.
        device: where the table lives.
        valid: `(batch, tokens)` bool, or None where none is padding.
        modality: `(batch, tokens)` int8, or None for text.
        positions: `(axes, batch, tokens)`, or None for the columns.
    """
    batch, kv_heads, tokens = shape
    per_head = _per_head(shape)
    columns = torch.arange(seen, seen + tokens, dtype=torch.int32, device=device).expand(batch, tokens)
    indices = columns
    if padded := valid is not None or bool((before != seen).any()):
        places = torch.arange(tokens, device=device) if valid is None else valid.cumsum(dim=1) - 1
        indices = (before.to(device)[:, None] + places).int().expand(batch, tokens)
        indices = indices if valid is None else indices.masked_fill(~valid, -1)
    wide = per_head(indices)
    positions = columns[None] if positions is None else positions.int()
    return SlotTable(
        indices=wide,
        columns=per_head(columns) if padded else wide,
        counts=per_head(torch.ones((), device=device) if valid is None else valid.float()),
        modality=per_head(torch.zeros((), dtype=torch.int8, device=device) if modality is None else modality),
        positions=positions[:, :, None].expand(-1, batch, kv_heads, -1),
        mask=None if valid is None else per_head(valid),
    )


def _filled(like: Tensor) -> Tensor:
    return like.new_ones((), dtype=torch.bool).expand(like.shape)


def _per_head(shape: tuple[int, int, int]) -> Callable[[Tensor], Tensor]:
    return lambda entry: entry.expand(shape) if entry.dim() == 0 else entry[:, None].expand(shape)


def _same_axes(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """Return positions with the same number of axes: where text came alone, its one position stands for all three."""
    axes = max(first.shape[0], second.shape[0])
    return first.expand(axes, -1, -1, -1), second.expand(axes, -1, -1, -1)


def gather_heads(per_head: Tensor, slots: Pivots) -> Tensor:
    """Return what `(batch, heads, tokens)` holds at the slots of each head's KV head, `(batch, heads, slots)`; 0 where
    a slot is empty.
    """
    grouped = rearrange(per_head, "b (kv group) t -> b kv t group", kv=slots.indices.shape[1])
    gathered = slots.gather(grouped)
    if slots.mask is not None:
        gathered = gathered.masked_fill(~slots.mask[..., None], 0)
    return rearrange(gathered, "b kv t group -> b (kv group) t")


def padded(sums: Tensor, slots: int) -> Tensor:
    """Return `(batch, heads, slots)` with zeros for the slots that came later."""
    return F.pad(sums, (0, slots - sums.shape[-1]))


def positions_after(positions: Tensor, batch: int) -> Tensor:
    """Return the position of the token that follows, `(axes, batch)`: one more than the largest of any axis."""
    largest = positions.expand(-1, batch, -1).amax(dim=(0, 2))
    return (largest + 1).expand(positions.shape[0], -1)
