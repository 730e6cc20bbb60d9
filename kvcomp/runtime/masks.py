"""From the mask over columns that transformers builds to the mask over slots that a compressed layer needs."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from kvcomp.runtime.slots import Places, SlotTable

_SHOWN = "kvcomp_shown"  # on a mask over columns: how many of them the last query of each row sees


def row_validity(mask: Tensor | None, batch: int, new: int) -> Tensor | None:
    """Return which of the new tokens are no padding, `(batch, new)` bool; None where all are.

    The last query of a causal mask sees every valid token, so its row of the mask is the padding mask.

    Args:
        mask: `(batch or 1, 1, queries, columns)`, bool or additive, or None.
        batch: rows of the batch.
        new: number of new tokens, the last columns of the mask.
    """
    if mask is None:
        return None
    valid = visible(mask[:, 0, -1, -new:]).expand(batch, new).clone()  # a view would keep the whole mask alive
    return None if bool(valid.all()) else valid  # one sync per layer, and only where transformers built a mask


def shown_columns(mask: Tensor) -> Tensor:
    """Return how many columns the last query of each row sees, `(batch or 1,)` int64 on the CPU.

    It is computed once for all layers that share the mask, with one sync; transformers builds one for a token that is
    decoded only where something is padded.

    Args:
        mask: over columns, `(batch or 1, 1, queries, columns)`, bool or additive.
    """
    if not hasattr(mask, _SHOWN):
        setattr(mask, _SHOWN, visible(mask[:, 0, -1]).sum(dim=-1).cpu())
    shown: Tensor = getattr(mask, _SHOWN)
    return shown


def visible(mask: Tensor) -> Tensor:
    """Return a bool or additive mask as bool."""
    return mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2


def additive(mask: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return a bool or additive mask as additive."""
    if mask.dtype != torch.bool:
        return mask.to(dtype)
    return torch.zeros((), dtype=dtype, device=mask.device).where(mask, torch.finfo(dtype).min)


def over_slots(mask: Tensor | None, table: SlotTable | Places, queries: int, seen: int, group: int) -> Tensor | None:
    """Return the mask over the slots of a layer, `(batch, heads, queries, slots)`; None where every query sees every
    slot.

    Args:
        mask: over columns, `(batch or 1, 1, queries, columns)`, bool or additive, or None for causal.
        table: where all slots lie, the new tokens included.
        queries: number of new tokens.
        seen: columns seen before them.
        group: query heads per KV head.
    """
    if mask is None and queries > 1:
        query_columns = torch.arange(seen, seen + queries, device=table.columns.device)
        return visible_before(table, query_columns[None], group)
    if mask is None:
        gathered = None if table.mask is None else table.mask[:, :, None]
    else:
        batch, kv_heads, slots = table.columns.shape
        columns = table.columns.clamp(min=0).long()[:, :, None].expand(batch, kv_heads, queries, slots)
        gathered = mask.expand(batch, kv_heads, -1, -1).gather(3, columns)
        if table.mask is not None:
            gathered = _hide(gathered, table.mask[:, :, None])
    return None if gathered is None else gathered.repeat_interleave(group, dim=1)


def over_filled(filled: Tensor, more: int, group: int, like: Tensor | None) -> Tensor:
    """Return the mask of one query that sees every filled slot, `(batch, heads, 1, slots + more)`.

    Args:
        filled: `(batch, kv_heads, slots)` bool.
        more: slots that every head has after these.
        group: query heads per KV head.
        like: a mask, bool or additive, whose dtype this one is to have; None for bool.
    """
    shown = F.pad(filled, (0, more), value=True)[:, :, None].repeat_interleave(group, dim=1)
    return shown if like is None or like.dtype == torch.bool else additive(shown, like.dtype)


def over_sequences(
    mask: Tensor | None,
    columns: Tensor,
    counts: Tensor | None,
    sizes: Sequence[int],
    kv_heads: int,
    tail: int,
    dtype: torch.dtype,
) -> list[Tensor]:
    """Return the mask of one query over the slots of each (row, KV head), `(1, 1, 1, slots)`.

    Args:
        mask: over columns, `(batch or 1, 1, 1, columns)`, bool or additive, or None where all are visible.
        columns: of the packed slots, `(slots of all,)`.
        counts: likewise, float32, where log(count) is to be added to a slot's logit; else None.
        sizes: how many of them belong to each (row, KV head), one after the other.
        kv_heads: KV heads of a row.
        tail: slots that every head has after them, one per column, the last columns of the mask.
        dtype: of the query.
    """
    rows = len(sizes) // kv_heads
    if mask is None:
        own = torch.ones_like(columns, dtype=torch.bool)
        last = own.new_ones(rows, tail)
    else:
        flat = mask[:, 0, 0].expand(rows, -1)
        per_row = [sum(sizes[row * kv_heads : (row + 1) * kv_heads]) for row in range(rows)]
        places = torch.split_with_sizes(columns, per_row)
        own = torch.cat([flat[row].index_select(0, places[row]) for row in range(rows)])
        last = flat[:, flat.shape[1] - tail :]
    if counts is not None:
        own = with_mass(own[None, None, None], counts[None, None], 1, dtype)[0, 0, 0]
        last = with_mass(last[:, None, None], last.new_ones(rows, 1, tail).float(), 1, dtype)[:, 0, 0]
    pieces = torch.split_with_sizes(own, list(sizes))
    return [torch.cat([piece, last[place // kv_heads]])[None, None, None] for place, piece in enumerate(pieces)]


def visible_before(table: SlotTable | Places, columns: Tensor, group: int) -> Tensor:
    """Return which slots lie at or before the columns of queries, `(batch, heads, queries, slots)` bool.

    Args:
        table: where all slots lie.
        columns: `(batch or 1, queries)`.
        group: query heads per KV head.
    """
    visible = (table.columns[:, :, None] <= columns[:, None, :, None]) & table.valid[:, :, None]
    return visible.repeat_interleave(group, dim=1)


def _hide(mask: Tensor, valid: Tensor) -> Tensor:
    return mask & valid if mask.dtype == torch.bool else mask.masked_fill(~valid, torch.finfo(mask.dtype).min)


def with_mass(mask: Tensor | None, counts: Tensor, group: int, dtype: torch.dtype) -> Tensor:
    """Return an additive mask that also adds log(count) to every slot's logit, so that it weighs as much as it stands
    for.

    Args:
        mask: over slots, `(batch, heads, queries, slots)`, bool or additive, or None.
        counts: `(batch, kv_heads, slots)` float32.
        group: query heads per KV head.
        dtype: of the queries.
    """
    bias = counts.clamp(min=1.0).log().repeat_interleave(group, dim=1)[:, :, None].to(dtype)
    if mask is None:
        return bias
    if mask.dtype == torch.bool:
        return torch.where(mask, bias, torch.finfo(dtype).min)
    return (mask + bias).clamp(min=torch.finfo(dtype).min)
