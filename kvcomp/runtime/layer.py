"""One layer of a compressed cache: its slots, what they stand for, and when they are compressed."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer

from kvcomp.core.errors import UnsupportedUseError
from kvcomp.core.interfaces import Observation
from kvcomp.core.strategy import Strategy
from kvcomp.core.types import LayerView, Pivots, Scores
from kvcomp.runtime.forward import Forward, Logits, observe_forwards
from kvcomp.runtime.masks import over_slots, row_validity, with_mass
from kvcomp.runtime.slots import SlotTable, gather_heads, new_tokens, padded, positions_after

LAYER_ATTRIBUTE = "kvcomp_layer"  # how the attention function finds the layer that its keys came from


class Request(Protocol):
    """What a layer asks of the cache that it belongs to."""

    strategy: Strategy
    defer: bool
    reserve: int | None

    def check_in_use(self) -> None:
        """Raise where the cache may not be written to."""

    def arriving(self) -> tuple[Tensor | None, Tensor | None]:
        """Return modality `(batch, tokens)` and positions `(axes, batch, tokens)` of the tokens of this forward."""

    def compress_after(self, layer: CompressedCacheLayer) -> None:
        """Compress a layer whose attention has run, or all layers if it is the last and the budget spans the model."""

    def finish(self) -> None:
        """Compress everything that was deferred."""


class CompressedCacheLayer(DynamicLayer):  # type: ignore[no-untyped-call]
    """A cache layer that reports the tokens it has *seen* while it holds fewer slots.

    With logical lengths everywhere, `generate()` computes positions, feeds only new tokens and builds masks as for a
    stock cache. Keys and values are in `storage`, what each slot stands for in `table`; tokens decoded one by one
    since the table was made are the `tail`, whose entries follow from their number.
    """

    def __init__(self, request: Request, number: int, layers: int) -> None:
        # CacheLayerMixin.__init__ would assign `keys` and `values`, which are read from the storage here.
        self.request = request
        self.number = number  # among the compressed layers
        self.layers = layers
        self.reset()

    def reset(self) -> None:
        """Forget everything."""
        self.storage = self.request.strategy.store.open(self.request.reserve)
        self.is_initialized = False
        self.dtype, self.device = torch.float32, torch.device("cpu")  # until the first token says
        self.table: SlotTable | None = None
        self.tokens = torch.zeros(0, dtype=torch.long)  # valid tokens of each row that the table stands for, on the CPU
        self.next_positions: Tensor | None = None  # (axes, batch), of the first token of the tail
        self.tail = 0
        self.seen = 0  # columns, padding counted
        self.arrived = 0  # tokens of this forward that the attention function has not seen yet
        self.trimmed = False  # slots are no longer columns
        self.rho: Tensor | None = None  # (batch,), of the last compression
        self.seconds = 0.0
        self.forwards: tuple[Forward, ...] = ()  # seen by attention and not yet compressed
        self.carried: dict[Observation, Tensor] = {}
        self.compressions = 0
        self._view: LayerView | None = None
        self._scores: Scores | None = None

    # --- what transformers asks of a layer ---

    @property
    def keys(self) -> Tensor | None:  # type: ignore[override]
        """Return the keys of the filled slots, `(batch, kv_heads, slots, head_dim)`, None before the first token.

        A view; where heads or rows hold fewer slots than others, a copy with zeros at their ends.
        """
        return self._together(self.storage.read()[0]) if self.is_initialized else None

    @property
    def values(self) -> Tensor | None:  # type: ignore[override]
        """Return the values of the filled slots, `(batch, kv_heads, slots, head_dim)`, as `keys` does."""
        return self._together(self.storage.read()[1]) if self.is_initialized else None

    def get_seq_length(self) -> int:
        """Return the number of columns seen."""
        return self.seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return the width of the mask over columns, and offset 0."""
        return self.seen + query_length, 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Remember dtype and device."""
        self.dtype, self.device = key_states.dtype, key_states.device
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Take in new tokens, `(batch, kv_heads, tokens, head_dim)`, and return keys and values of all slots."""
        self.request.check_in_use()
        if key_states.requires_grad and torch.is_grad_enabled():
            raise UnsupportedUseError(
                "no gradient flows through a compressed cache; call the model under torch.no_grad() or "
                "torch.inference_mode()"
            )
        if self.arrived:
            raise UnsupportedUseError(
                "no attention of kvcomp saw the tokens of the last forward; a compressed cache works with the model "
                "that it was made for, and inside its block"
            )
        new = key_states.shape[2]
        if new == 1 and self.forwards:
            self.request.finish()
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.storage.append(key_states, value_states)
        self.seen += new
        if new > 1 or self.table is None:
            self.arrived = new
        else:
            self.tail += 1
        keys, values = self.storage.read()
        keys = keys[:]  # a fresh view: on a stored tensor the attribute would make a reference cycle
        setattr(keys, LAYER_ATTRIBUTE, self)
        return keys, values

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Take the rows of the batch in another order."""
        self._take_rows(lambda rows: rows.index_select(0, beam_idx.to(rows.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row of the batch."""
        self._take_rows(lambda rows: rows.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep only these rows of the batch."""
        self._take_rows(lambda rows: rows[indices.to(rows.device)])

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last columns: `-n` or 0 removes n of them; older transformers give the length that stays.

        Raises:
            UnsupportedUseError: the columns were compressed by the forward that just ended, as in assisted decoding,
                whose drafts would have been part of the budget; or compression is deferred.
        """
        target = self.seen + tokens_to_remove if tokens_to_remove <= 0 else tokens_to_remove
        if target >= self.seen or not self.is_initialized:
            return
        if self.forwards:
            raise UnsupportedUseError("the cache has deferred its compression; call cache.finish() before cropping it")
        if self.trimmed and self.tail == 0:
            raise UnsupportedUseError(
                "tokens were removed right after they were compressed, as assisted and prompt-lookup decoding do; they "
                "do not work with a compressed cache"
            )
        table = self._whole_table()
        removed, upcoming = self.seen - target, self.upcoming_positions()
        before = table.columns < target
        self.table = self._take_slots(before & table.valid if self.trimmed else before, table)
        self.tokens = self.tokens + self.tail - removed
        if upcoming is not None:
            self.next_positions = upcoming - removed if removed <= self.tail else self.table.positions_at(target)
        self.tail, self.seen = 0, target

    def offload(self) -> None:
        """Move keys and values to the CPU."""
        self._move(torch.device("cpu"))

    def prefetch(self) -> None:
        """Move keys and values back to the layer's device."""
        self._move(self.device)

    # --- what the attention function asks ---

    def slot_mask(self, mask: Tensor | None, queries: Tensor) -> Tensor | None:
        """Return the mask over this layer's slots, given transformers' mask over columns."""
        mass = self.request.strategy.mass_preserving
        if not self.trimmed:
            return mask
        assert self.table is not None
        new = queries.shape[2]
        if mask is None and new == 1 and self.table.mask is None and not mass:
            return None  # one query, which sees every slot
        table, group = self._whole_table(), queries.shape[1] // self.table.indices.shape[1]
        slot_mask = over_slots(mask, table, new, self.seen - new, group)
        return with_mass(slot_mask, table.counts, group, queries.dtype) if mass else slot_mask

    def attended(self, queries: Tensor, mask: Tensor | None, slot_mask: Tensor | None, logits: Logits) -> None:
        """Take note of what the attention saw of the tokens that just arrived, then compress, unless that is
        deferred.
        """
        modality, positions = self.request.arriving()
        valid = row_validity(mask, queries.shape[0], self.arrived)
        forward = Forward(queries, slot_mask, self.seen - self.arrived, valid, modality, logits)
        self.forwards = (*self.forwards, forward)
        self._take_in(valid, modality, positions)
        if not self.request.defer:
            self.request.compress_after(self)

    # --- compression ---

    def prepare(self) -> tuple[LayerView, Scores] | None:
        """Return the view and the scores to allocate by, None where nothing is to be trimmed."""
        started = time.perf_counter()
        assert self.table is not None
        strategy = self.request.strategy
        prepared = None
        if strategy.turns == "append" and self.compressions:
            pass  # what comes later stays as it is
        elif self._everything_fits():
            self._observe_only()
        else:
            self._view = self._make_view(strategy.observations)
            self._scores = strategy.scores(self._view, self.share())
            prepared = self._view, self._scores
        self.forwards = ()
        self.compressions += 1
        self.seconds += time.perf_counter() - started
        return prepared

    def trim(self, slots: Tensor | None = None) -> None:
        """Compress what `prepare` saw, to `slots` `(batch, kv_heads)` or to what the strategy's allocator gives this
        layer.
        """
        started = time.perf_counter()
        assert self.table is not None
        assert self._view is not None
        assert self._scores is not None
        strategy, view = self.request.strategy, self._view
        if slots is None:
            slots = strategy.allocate(self.share(), [view], [self._scores])[0]
        plan = strategy.plan(view, slots, self._scores)
        layer = strategy.apply(view, plan)
        assert plan.pivots is not None
        padded = self.table.columns is not self.table.indices
        self.table = SlotTable.of(layer, plan.pivots.gather(self.table.columns) if padded else None)
        self.storage.replace(layer.keys, layer.values)
        self._carry(view, plan.pivots)
        self.rho, self.trimmed = plan.rho, True
        self._view = self._scores = None
        self.seconds += time.perf_counter() - started

    def all_slots(self) -> SlotTable | None:
        """Return the table of all slots, the tail included; None before the first token."""
        return None if self.table is None else self._whole_table()

    @property
    def indices(self) -> Tensor | None:
        """Return the logical position of each slot, `(batch, kv_heads, slots)` int32, ascending, -1 where empty."""
        table = self.all_slots()
        return None if table is None else self._together(table.indices, empty=-1)

    @property
    def counts(self) -> Tensor | None:
        """Return how many prompt tokens each slot stands for, `(batch, kv_heads, slots)` float32."""
        table = self.all_slots()
        return None if table is None else self._together(table.counts)

    def _together(self, per_slot: Tensor, empty: int = 0) -> Tensor:
        table = self.all_slots()
        return per_slot if table is None else table.together(per_slot, empty)

    def upcoming_positions(self) -> Tensor | None:
        """Return the position of the next token, `(axes, batch)`; None where positions are columns."""
        return None if self.next_positions is None else self.next_positions + self.tail

    def bookkeeping(self) -> list[Tensor]:
        """Return every tensor that the layer keeps beside keys and values."""
        tensors = [] if self.table is None else list(self.table.tensors())
        tensors += [tensor for tensor in (self.tokens, self.next_positions, self.rho) if tensor is not None]
        return [*tensors, *self.carried.values()]

    def _everything_fits(self) -> bool:
        """Return whether every row may keep all it holds, and holds no padding."""
        assert self.table is not None
        if self.request.strategy.selector is None:
            return True
        return not self.trimmed and self.table.mask is None and bool((self.share() >= self.tokens).all())

    def share(self) -> Tensor:
        """Return the uniform share of the budget, `(batch,)` on the CPU: of all tokens seen."""
        keys, values = self.storage.read()
        slot_bytes = self.layers * keys.shape[1] * (keys.shape[-1] + values.shape[-1]) * keys.element_size()
        return self.request.strategy.slots(self.tokens, slot_bytes)

    def _observe_only(self) -> None:
        """Measure rho, and what later turns add to, of a layer that keeps everything."""
        strategy = self.request.strategy
        if strategy.selector is None:
            return
        later = () if strategy.budget.ratio == 1 else tuple(seen for seen in strategy.observations if seen.carried)
        wanted = tuple(dict.fromkeys((*strategy.policy.observations(), *later)))
        view = self._make_view(wanted)
        self.rho = strategy.policy.plan(view).rho
        self.carried = {seen: view.observations[seen] for seen in later}

    def _make_view(self, observations: tuple[Observation, ...]) -> LayerView:
        assert self.table is not None
        keys, values = self.storage.read()
        table = self.table
        seen = observe_forwards(self.forwards, keys, table, observations)
        for observation, sums in self.carried.items():
            if observation in seen:
                seen[observation] = seen[observation] + padded(sums, table.slots)
        return LayerView(
            keys=keys,
            values=values,
            modality=table.modality,
            valid=table.valid,
            indices=table.indices,
            counts=table.counts,
            positions=table.positions,
            layer=self.number,
            layers=self.layers,
            observations=seen,
        )

    def _carry(self, view: LayerView, pivots: Pivots) -> None:
        """Keep the sums of the surviving slots, `(batch, heads, slots)`."""
        self.carried = {
            seen: gather_heads(result, pivots)
            for seen, result in view.observations.items()
            if seen.carried and self.request.strategy.turns == "recompress"
        }

    # --- bookkeeping ---

    def _take_in(self, valid: Tensor | None, modality: Tensor | None, positions: Tensor | None) -> None:
        """Move the tail and the tokens that just arrived into the table."""
        batch, kv_heads = self.storage.read()[0].shape[:2]
        seen = self.seen - self.arrived
        before = torch.full((batch,), 0) if self.table is None else self.tokens + self.tail
        arrived = new_tokens(
            (batch, kv_heads, self.arrived),
            seen,
            before,
            device=self.device,
            valid=valid,
            modality=modality,
            positions=positions,
        )
        self.table = arrived if self.table is None else self._whole_table(arrived=False).extend(arrived)
        self.tokens = before + (self.arrived if valid is None else valid.sum(dim=1).cpu())
        self.next_positions = None if positions is None else positions_after(positions, batch)
        self.tail = self.arrived = 0

    def _whole_table(self, arrived: bool = True) -> SlotTable:
        """Return the table with the tail, and with the tokens that just arrived, which only a mask may ask for."""
        assert self.table is not None
        more = self.tail + (self.arrived if arrived else 0)
        if not more:
            return self.table
        batch, kv_heads, _ = self.table.indices.shape
        positions = None
        if self.next_positions is not None:
            positions = self.next_positions[..., None] + torch.arange(more, device=self.device)
        start = self.seen - self.arrived - self.tail
        return self.table.extend(
            new_tokens((batch, kv_heads, more), start, self.tokens, device=self.device, positions=positions)
        )

    def _take_slots(self, stays: Tensor, table: SlotTable) -> SlotTable:
        """Hold the slots of a table of all slots that stay, `(batch, kv_heads, slots)`, and return their table."""
        slots = int(stays.sum(dim=-1).max())
        order = (~stays).to(torch.uint8).argsort(dim=-1, stable=True)[..., :slots]
        kept, filled = Pivots(order), stays.gather(2, order)
        keys, values = self.storage.read()
        self.storage.replace(kept.gather(keys), kept.gather(values))
        self.carried = {seen: gather_heads(padded(sums, stays.shape[2]), kept) for seen, sums in self.carried.items()}
        table = table.map(kept.gather)
        return table if bool(filled.all()) else table.masked(filled)

    def _take_rows(self, take: Callable[[Tensor], Tensor]) -> None:
        if not self.is_initialized:
            return
        if self.forwards:  # beams are reordered right after the prefill
            self.request.finish()
        keys, values = self.storage.read()
        self.storage.replace(take(keys), take(values))
        self.table = None if self.table is None else self.table.map(take)
        self.tokens = take(self.tokens)
        self.next_positions = None if self.next_positions is None else take(self.next_positions.T).T
        self.rho = None if self.rho is None else take(self.rho)
        self.carried = {seen: take(sums) for seen, sums in self.carried.items()}

    def _move(self, device: torch.device) -> None:
        if self.is_initialized:
            keys, values = self.storage.read()
            self.storage.replace(keys.to(device), values.to(device))
