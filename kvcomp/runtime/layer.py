"""One layer of a compressed cache: what transformers and the attention function ask of it, and its compression."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer

from kvcomp.core.errors import UnsupportedUseError
from kvcomp.core.interfaces import Observation, SlotStorage
from kvcomp.core.packed import PackedSlots
from kvcomp.core.strategy import Strategy
from kvcomp.core.types import LayerView, Pivots, Scores
from kvcomp.runtime.forward import Forward, Logits, observe_forwards
from kvcomp.runtime.masks import over_sequences, over_slots, row_validity, with_mass
from kvcomp.runtime.slots import PackedTable, SlotTable, gather_heads, padded
from kvcomp.runtime.state import LayerState

LAYER_ATTRIBUTE = "kvcomp_layer"  # how the attention function finds the layer that its keys came from


class Request(Protocol):
    """What a layer asks of the cache that it belongs to."""

    strategy: Strategy
    defer: bool

    def check_in_use(self) -> None:
        """Raise where the cache may not be written to."""

    def arriving(self) -> tuple[Tensor | None, Tensor | None]:
        """Return modality `(batch, tokens)` and positions `(axes, batch, tokens)` of the tokens of this forward."""

    def compress_after(self, layer: CompressedCacheLayer) -> None:
        """Compress a layer whose attention has run, or all layers if it is the last and the budget spans the model."""

    def finish(self) -> None:
        """Compress everything that was deferred."""


class CompressedCacheLayer(LayerState, DynamicLayer):  # type: ignore[no-untyped-call, override]
    """A cache layer that reports the tokens it has *seen* while it holds fewer slots.

    With logical lengths everywhere, `generate()` computes positions, feeds only new tokens and builds masks as for a
    stock cache.
    """

    def __init__(self, request: Request, number: int, layers: int, storage: SlotStorage) -> None:
        # CacheLayerMixin.__init__ would assign `keys` and `values`, which are read from the storage here.
        self.request = request
        self.number = number  # among the compressed layers
        self.layers = layers
        self.storage = storage
        self._empty = storage.snapshot()
        self.reset()

    def reset(self) -> None:
        """Forget everything."""
        self.storage.restore(self._empty)
        self.hold_nothing(self.storage)
        self.rho: Tensor | None = None  # (batch,), of the last compression
        self.seconds = 0.0
        self.forwards: tuple[Forward, ...] = ()  # seen by attention and not yet compressed
        self.compressions = 0
        self._view: LayerView | None = None
        self._scores: Scores | None = None

    # --- what transformers asks of a layer ---

    def get_seq_length(self) -> int:
        """Return the number of columns seen."""
        return self.seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return the width of the mask over columns, and offset 0."""
        return self.seen + query_length, 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Remember what the layer is to hold."""
        self.take_form(key_states, value_states, self.layers)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Take in new tokens, `(batch, kv_heads, tokens, head_dim)`, and return keys and values of all slots; only the
        new ones where the slots are packed.
        """
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
        if new > 1 or self.held_table is None:
            self.arrived = new
        else:
            self.tail += 1
        # The attention function goes to the storage itself where heads are packed.
        keys, values = (key_states, value_states) if self.storage.packed() else self.storage.read()
        keys = keys[:]  # a fresh view: on a stored tensor the attribute would make a reference cycle
        setattr(keys, LAYER_ATTRIBUTE, self)
        return keys, values

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Take the rows of the batch in another order."""
        self.keep_rows(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row of the batch."""
        self.keep_rows(torch.arange(len(self.tokens)).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep only these rows of the batch."""
        self.keep_rows(torch.arange(len(self.tokens))[indices.cpu()])

    def keep_rows(self, rows: Tensor) -> None:
        """Hold these rows of the batch, `(rows,)` int64, in this order."""
        if not self.is_initialized:
            return
        if self.forwards:  # beams are reordered right after the prefill
            self.request.finish()
        super().keep_rows(rows)
        self.rho = None if self.rho is None else self.rho.index_select(0, rows.to(self.rho.device))

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
        table = self.whole_table()
        removed, upcoming = self.seen - target, self.upcoming_positions()
        before = table.columns < target
        self.keep_slots(before & table.valid if self.trimmed else before)
        kept = self.table
        assert kept is not None
        self.tokens = self.tokens + self.tail - removed
        if upcoming is not None:
            self.next_positions = upcoming - removed if removed <= self.tail else kept.positions_at(target)
        self.tail, self.seen = 0, target

    def offload(self) -> None:
        """Move keys and values to the CPU."""
        self.move(torch.device("cpu"))

    def prefetch(self) -> None:
        """Move keys and values back to the layer's device."""
        self.move(self.device)

    # --- what the attention function asks ---

    def only_causal(self, mask: Tensor | None) -> bool:
        """Return whether a query sees every slot before it and nothing weighs them, given transformers' mask."""
        return mask is None and not self.holds_padding and not self.request.strategy.mass_preserving

    def slot_mask(self, mask: Tensor | None, queries: Tensor) -> Tensor | None:
        """Return the mask over this layer's slots, `(batch, heads, queries, slots)`; None for no mask at all.

        Args:
            mask: transformers' mask over columns.
            queries: `(batch, heads, queries, head_dim)`.
        """
        if not self.trimmed:
            return mask
        assert self.held_table is not None
        new = queries.shape[2]
        if new == 1 and self.only_causal(mask) and self.held_table.mask is None:
            return None
        table, group = self.whole_table(), queries.shape[1] // self.form.kv_heads
        slot_mask = over_slots(mask, table, new, self.seen - new, group)
        if not self.request.strategy.mass_preserving:
            return slot_mask
        return with_mass(slot_mask, table.counts, group, queries.dtype)

    def head_masks(self, mask: Tensor | None, slots: PackedSlots, query: Tensor) -> Sequence[Tensor | None]:
        """Return the mask of one query over the own slots of each (row, KV head), `(1, 1, 1, slots)`, None for none.

        Args:
            mask: transformers' mask over columns.
            slots: of this layer, none of them padding.
            query: `(batch, heads, 1, head_dim)`.
        """
        if self.only_causal(mask):
            return [None] * len(slots.layout.lengths)
        assert isinstance(self.held_table, PackedTable)
        table, tail = self.held_table, self.tail + self.arrived
        sizes = [length + slots.appended - tail for length in slots.layout.lengths]
        counts = table.counts if self.request.strategy.mass_preserving else None
        return over_sequences(mask, table.columns, counts, sizes, slots.layout.kv_heads, tail, query.dtype)

    def attended(self, queries: Tensor, mask: Tensor | None, slot_mask: Tensor | None, logits: Logits) -> None:
        """Take note of what the attention saw of the tokens that just arrived, then compress, unless that is
        deferred.
        """
        modality, positions = self.request.arriving()
        valid = row_validity(mask, queries.shape[0], self.arrived)
        forward = Forward(queries, slot_mask, self.seen - self.arrived, valid, modality, logits)
        self.forwards = (*self.forwards, forward)
        self.take_in(queries.shape[0], valid, modality, positions)
        if not self.request.defer:
            self.request.compress_after(self)

    # --- compression ---

    def prepare(self) -> tuple[LayerView, Scores] | None:
        """Return the view and the scores to allocate by, None where nothing is to be trimmed."""
        started = time.perf_counter()
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

    def trim(self, slots: Tensor | None = None, scores: Scores | None = None) -> None:
        """Compress what `prepare` saw, to `slots` `(batch, kv_heads)` or to what the strategy's allocator gives this
        layer, by `scores` where other layers had a say in them.
        """
        started = time.perf_counter()
        table, view = self.table, self._view
        assert table is not None
        assert view is not None
        assert self._scores is not None
        strategy = self.request.strategy
        scores = self._scores if scores is None else scores
        if slots is None:
            slots = strategy.allocate(self.share(), [view], [scores])[0]
        plan = strategy.plan(view, slots, scores)
        layer = strategy.apply(view, plan)
        assert plan.pivots is not None
        assert plan.assignment is not None
        self.rho, self.trimmed, self.holds_padding = plan.rho, True, False
        self.memory = plan.assignment.memory
        padded = table.columns is not table.indices
        self.table = SlotTable.of(layer, plan.pivots.gather(table.columns) if padded else None)
        guide = strategy.guide(view, plan, scores)
        self.storage.replace(layer.keys, layer.values, layer.mask, guide)
        self._carry(view, plan.pivots)
        self._view = self._scores = None
        self.seconds += time.perf_counter() - started

    def _everything_fits(self) -> bool:
        """Return whether every row may keep all it holds, and holds no padding."""
        strategy = self.request.strategy
        if strategy.ignores_budget:
            return True
        assert self.held_table is not None
        return not self.trimmed and self.held_table.mask is None and strategy.keeps_all(self.tokens, self.form)

    def share(self) -> Tensor:
        """Return the uniform share of the budget, `(batch,)` on the CPU: of all tokens seen."""
        return self.request.strategy.slots(self.tokens, self.form)

    def bookkeeping(self) -> list[Tensor]:
        """Return every tensor that the layer keeps beside keys and values."""
        return super().bookkeeping() if self.rho is None else [*super().bookkeeping(), self.rho]

    def _observe_only(self) -> None:
        """Measure rho, and what later turns add to, of a layer that keeps everything."""
        strategy = self.request.strategy
        if not strategy.observations:
            return
        later = () if strategy.budget.ratio == 1 else tuple(seen for seen in strategy.observations if seen.carried)
        wanted = tuple(dict.fromkeys((*strategy.policy.observations(), *later)))
        view = self._make_view(wanted)
        self.rho = strategy.policy.plan(view).rho
        self.carried = {seen: view.observations[seen] for seen in later}

    def _make_view(self, observations: tuple[Observation, ...]) -> LayerView:
        table = self.table
        assert table is not None
        keys, values = self.storage.read()
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
            memory=self.memory,
        )

    def _carry(self, view: LayerView, pivots: Pivots) -> None:
        """Keep the sums of the surviving slots, `(batch, heads, slots)`."""
        self.carried = {
            seen: gather_heads(result, pivots)
            for seen, result in view.observations.items()
            if seen.carried and self.request.strategy.turns == "recompress"
        }
