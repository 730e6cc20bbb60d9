"""What one layer's attention saw in one forward: all that scoring needs once the forward has moved on."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from kvcomp.core.attention import AttentionInputs, observe
from kvcomp.core.interfaces import Observation
from kvcomp.runtime.masks import additive
from kvcomp.runtime.rotary import RotaryColumns
from kvcomp.runtime.slots import SlotTable


@dataclass(frozen=True, eq=False)
class Logits:
    """How a model turns queries and keys into logits: scaling, softcap, and sinks `(heads,)` that take probability."""

    scaling: float
    softcap: float | None = None
    sinks: Tensor | None = None

    @property
    def plain(self) -> bool:
        """Return whether logits are scaled products and nothing else."""
        return self.softcap is None and self.sinks is None


@dataclass(frozen=True, eq=False)
class Forward:
    """The queries of one forward, or of several, as one layer saw them.

    Attributes:
        queries: `(batch, heads, tokens, head_dim)`.
        mask: over the slots of that moment, `(batch or 1, heads or 1, tokens, slots)`, or None for causal.
        columns: of the queries, `(tokens,)` or `(batch, tokens)` int64.
        valid: `(batch, tokens)` bool, or None where none is padding.
        modality: `(batch, tokens)` int8, or None for text.
        logits: how logits are made.
    """

    queries: Tensor
    mask: Tensor | None
    columns: Tensor
    valid: Tensor | None
    modality: Tensor | None
    logits: Logits


def observe_forwards(
    forwards: Sequence[Forward],
    keys: Tensor,
    table: SlotTable,
    observations: Iterable[Observation],
    rotary: RotaryColumns | None = None,
) -> dict[Observation, Tensor]:
    """Return the observations over one or several forwards (chunks that were deferred) as if they had been one.

    Args:
        forwards: what is looked at.
        keys: of all slots, `(batch, kv_heads, slots, head_dim)`.
        table: of all slots.
        observations: what is wanted.
        rotary: of all columns, where an observation reads it.
    """
    if not forwards:
        return {}
    queries = torch.cat([forward.queries for forward in forwards], dim=2) if len(forwards) > 1 else forwards[0].queries
    batch, _, tokens, _ = queries.shape
    filled = torch.ones(batch, tokens, dtype=torch.bool, device=queries.device)
    columns = torch.cat([forward.columns.expand(batch, -1) for forward in forwards], dim=1)
    inputs = AttentionInputs(
        queries=queries,
        keys=keys,
        query_columns=columns,
        key_columns=_narrow(table.columns).long(),
        query_modality=_joined([forward.modality for forward in forwards], forwards, filled.to(torch.int8) * 0),
        query_valid=_joined([forward.valid for forward in forwards], forwards, filled),
        modality=table.modality,
        valid=table.valid,
        mask=_joined_mask(forwards, table),
        scaling=forwards[0].logits.scaling,
        softcap=forwards[0].logits.softcap,
        sinks=forwards[0].logits.sinks,
        rotary=None if rotary is None else rotary.at(columns[:, None]),
    )
    return observe(inputs, observations)


def _narrow(columns: Tensor) -> Tensor:
    """Return `(1, 1, slots)` where all rows and heads agree, so that a comparison is made once."""
    return columns[:1, :1] if columns.stride()[:2] == (0, 0) else columns


def _joined(parts: Sequence[Tensor | None], forwards: Sequence[Forward], default: Tensor) -> Tensor:
    """Return `(batch, tokens)` of all forwards, with the default where a forward has none."""
    if all(part is None for part in parts):
        return default
    widths = [forward.queries.shape[2] for forward in forwards]
    pairs = zip(parts, torch.split(default, widths, dim=1), strict=True)
    return torch.cat([fallback if part is None else part.to(fallback.dtype) for part, fallback in pairs], dim=1)


def _joined_mask(forwards: Sequence[Forward], table: SlotTable) -> Tensor | None:
    """Return the mask over all slots for the queries of all forwards; None where all were causal and nothing is
    empty.
    """
    if all(forward.mask is None for forward in forwards):
        return None
    if len(forwards) == 1:
        return forwards[0].mask
    masks = [_widened(forward, table) for forward in forwards]
    if any(mask.dtype != torch.bool for mask in masks):  # the mass of a slot is in its mask
        masks = [additive(mask) for mask in masks]
    heads = max(mask.shape[1] for mask in masks)
    return torch.cat([mask.expand(-1, heads, -1, -1) for mask in masks], dim=2)


def _widened(forward: Forward, table: SlotTable) -> Tensor:
    """Return a forward's mask over the slots of now; what came after it was not visible."""
    batch = table.columns.shape[0]
    if forward.mask is None:
        return table.columns[:, :1, None] <= forward.columns.expand(batch, -1)[:, None, :, None]
    mask, later = forward.mask.expand(batch, -1, -1, -1), table.slots - forward.mask.shape[-1]
    hidden = False if mask.dtype == torch.bool else torch.finfo(mask.dtype).min
    return F.pad(mask, (0, later), value=hidden)
