"""The queries that a layer remembers between compressions, where it is compressed again while tokens are decoded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from typing import Any

import torch
from torch import Tensor

from kvcomp.core.interfaces import Observation
from kvcomp.runtime.forward import Forward, Logits, observe_forwards
from kvcomp.runtime.masks import visible_before, with_mass
from kvcomp.runtime.rotary import RotaryColumns
from kvcomp.runtime.slots import SlotTable

LATEST = ("vectors", "columns", "modality")
FOLD = 32  # decoded queries that wait for a compression before the sums that they add to are taken


@dataclass(frozen=True, eq=False)
class Queries:
    """Some queries of each row of the batch, aligned at the end.

    Attributes:
        vectors: `(batch, heads, rows, head_dim)`, after rotary embedding.
        columns: `(batch, rows)` int64, -1 where a row of the batch has fewer.
        modality: `(batch, rows)` int8.
    """

    vectors: Tensor
    columns: Tensor
    modality: Tensor

    @classmethod
    def of(cls, forward: Forward, count: int) -> Queries:
        """Return the last `count` valid queries of a forward, in memory of their own."""
        batch, _, tokens, _ = forward.queries.shape
        columns = forward.columns.expand(batch, -1)
        modality = columns.new_zeros(batch, tokens, dtype=torch.int8) if forward.modality is None else forward.modality
        if forward.valid is not None:
            columns = columns.masked_fill(~forward.valid, -1)
            return cls(forward.queries, columns, modality.to(torch.int8).expand(batch, -1)).last(count)
        last = forward.queries[:, :, -count:].clone()
        return cls(last, columns[:, -count:], modality.to(torch.int8).expand(batch, -1)[:, -count:].clone())

    def last(self, count: int) -> Queries:
        """Return the last `count` of each row."""
        order = (self.columns >= 0).to(torch.uint8).argsort(dim=-1, stable=True)[:, -count:]
        index = order[:, None, :, None].expand(-1, self.vectors.shape[1], -1, self.vectors.shape[3])
        return Queries(self.vectors.gather(2, index), self.columns.gather(1, order), self.modality.gather(1, order))

    def then(self, later: Queries) -> Queries:
        """Return these and later ones."""
        return Queries(
            torch.cat([self.vectors, later.vectors], dim=2),
            torch.cat([self.columns, later.columns], dim=1),
            torch.cat([self.modality, later.modality], dim=1),
        )

    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return what is held."""
        return self.vectors, self.columns, self.modality


@dataclass(frozen=True, eq=False)
class QueryLog:
    """What later compressions look at: every query since the last one, and the latest before.

    What a query of an earlier compression attends to is computed anew, over the slots that are held now: those at or
    before its column, weighed by their mass where that is preserved.

    Attributes:
        decoded: vectors of the tokens decoded since the last compression (or fold), `(batch, heads, 1, head_dim)` each.
        end: the column after the last of them.
        latest: the last queries before them.
        logits: how logits are made; None before the first.
    """

    decoded: tuple[Tensor, ...] = ()
    end: int = 0
    latest: Queries | None = None
    logits: Logits | None = None

    def add(self, vectors: Tensor, end: int, logits: Logits) -> QueryLog:
        """Return the log with the query of one decoded token."""
        return replace(self, decoded=(*self.decoded, vectors), end=end, logits=logits)

    def observe(
        self,
        forwards: Sequence[Forward],
        keys: Tensor,
        table: SlotTable,
        observations: Sequence[Observation],
        mass: bool,
        rotary: RotaryColumns | None = None,
    ) -> dict[Observation, Tensor]:
        """Return the observations over what was decoded since the last compression and the forwards after that; those
        of the latest queries also over earlier ones.

        Args:
            forwards: of more than one token, not yet compressed.
            keys: of all slots, `(batch, kv_heads, slots, head_dim)`.
            table: of all slots.
            observations: what is wanted.
            mass: whether the model sees slots weighed by their mass.
            rotary: of all columns, where an observation reads it.
        """
        since = [*self._decoded(table, mass), *forwards]
        earlier = self._earlier(table, mass)
        if not earlier:
            return observe_forwards(since, keys, table, observations, rotary)
        windows = [observation for observation in observations if observation.latest is not None]
        others = [observation for observation in observations if observation.latest is None]
        seen = observe_forwards([*earlier, *since], keys, table, windows, rotary)
        return seen | observe_forwards(since, keys, table, others, rotary)

    def keep(self, forwards: Sequence[Forward], count: int) -> QueryLog:
        """Return the log after a compression: the latest `count` queries of all."""
        kept = QueryLog(logits=forwards[-1].logits if forwards else self.logits)
        if not count:
            return kept
        since = [*([self._joined()] if self.decoded else []), *forwards]
        pieces = [*([] if self.latest is None else [self.latest]), *(Queries.of(forward, count) for forward in since)]
        return replace(kept, latest=reduce(Queries.then, pieces).last(count)) if pieces else kept

    def rows(self, rows: Tensor) -> QueryLog:
        """Return the log of these rows of the batch."""
        decoded = tuple(vectors.index_select(0, rows) for vectors in self.decoded)
        if self.latest is None:
            return replace(self, decoded=decoded)
        latest = Queries(*(entry.index_select(0, rows) for entry in self.latest.tensors()))
        return replace(self, decoded=decoded, latest=latest)

    def before(self, column: int) -> QueryLog:
        """Return the log of the tokens before a column."""
        stays = max(0, len(self.decoded) - max(0, self.end - column))
        latest = self.latest
        if latest is not None:
            latest = replace(latest, columns=latest.columns.masked_fill(latest.columns >= column, -1))
        return replace(self, decoded=self.decoded[:stays], end=min(self.end, column), latest=latest)

    def tensors(self) -> list[Tensor]:
        """Return every tensor that is held."""
        return [*self.decoded, *(() if self.latest is None else self.latest.tensors())]

    def dump(self) -> tuple[dict[str, Tensor | None], dict[str, Any]]:
        """Return what `load` needs, tensors by themselves."""
        latest = self.latest.tensors() if self.latest is not None else (None,) * len(LATEST)
        tensors: dict[str, Tensor | None] = dict(zip(LATEST, latest, strict=True))
        tensors["decoded"] = torch.cat(self.decoded, dim=2) if self.decoded else None
        logits = self.logits or Logits(1.0)
        tensors["sinks"] = logits.sinks
        return tensors, {"end": self.end, "scaling": logits.scaling, "softcap": logits.softcap}

    @classmethod
    def load(cls, tensors: Mapping[str, Tensor], numbers: Mapping[str, Any]) -> QueryLog:
        """Return the log that `dump` wrote."""
        decoded = tensors["decoded"].unbind(dim=2) if "decoded" in tensors else ()
        return cls(
            decoded=tuple(vectors.unsqueeze(2) for vectors in decoded),
            end=numbers["end"],
            latest=Queries(*(tensors[name] for name in LATEST)) if LATEST[0] in tensors else None,
            logits=Logits(numbers["scaling"], numbers["softcap"], tensors.get("sinks")),
        )

    def _joined(self) -> Forward:
        """Return what was decoded as one forward, every slot filled and none weighed."""
        assert self.logits is not None
        vectors = torch.cat(self.decoded, dim=2)
        columns = torch.arange(self.end - len(self.decoded), self.end, device=vectors.device)
        return Forward(vectors, None, columns, None, None, self.logits)

    def _decoded(self, table: SlotTable, mass: bool) -> list[Forward]:
        """Return what was decoded as one forward over these slots, none if nothing was."""
        if not self.decoded:
            return []
        forward = self._joined()
        plain = table.mask is None and not mass
        return [forward if plain else replace(forward, mask=_mask(table, forward.columns[None], forward.queries, mass))]

    def _earlier(self, table: SlotTable, mass: bool) -> list[Forward]:
        """Return the latest queries before as one forward, none if there are none."""
        if self.latest is None:
            return []
        assert self.logits is not None
        vectors, columns, modality = self.latest.tensors()
        return [Forward(vectors, _mask(table, columns, vectors, mass), columns, columns >= 0, modality, self.logits)]


def _mask(table: SlotTable, columns: Tensor, vectors: Tensor, mass: bool) -> Tensor:
    """Return what queries of these columns see of the slots, `(batch, heads, rows, slots)`."""
    group = vectors.shape[1] // table.indices.shape[1]
    mask = visible_before(table, columns, group)
    return with_mass(mask, table.counts, group, vectors.dtype) if mass else mask
