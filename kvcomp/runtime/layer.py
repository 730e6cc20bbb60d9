"""One layer of a compressed cache: what transformers and the attention function ask of it, and its compression."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicLayer

from kvcomp.core.errors import UnsupportedModelError, UnsupportedUseError
from kvcomp.core.interfaces import Observation, SlotStorage
from kvcomp.core.packed import PackedSlots
from kvcomp.core.rotary import Rotary
from kvcomp.core.strategy import Strategy
from kvcomp.core.types import LayerView, Pivots, Scores
from kvcomp.runtime.adapter import ModelAdapter, per_head
from kvcomp.runtime.decoding import FOLD
from kvcomp.runtime.forward import Forward, Logits
from kvcomp.runtime.masks import over_sequences, over_slots, row_validity, with_mass
from kvcomp.runtime.packed import can_attend, own_slots
from kvcomp.runtime.rotary import RotaryColumns
from kvcomp.runtime.slots import PackedTable, SlotTable, gather_heads, padded
from kvcomp.runtime.state import LayerState

LAYER_ATTRIBUTE = "kvcomp_layer"  # how the attention function finds the layer that its keys came from
PackedAttention = tuple[PackedSlots, Tensor | None, Sequence[Tensor | None]]


class Request(Protocol):
    """What a layer asks of the cache that it belongs to."""

    strategy: Strategy
    adapter: ModelAdapter
    defer: bool
    reads_rotary: bool
    recompresses: bool
    rotary_start: RotaryColumns  # without a column, the same for all layers

    def check_in_use(self) -> None:
        """Raise where the cache may not be written to."""

    def arriving(self) -> tuple[Tensor | None, Tensor | None]:
        """Return modality `(batch, tokens)` and positions `(axes, batch, tokens)` of the tokens of this forward."""

    def compress_after(self, layer: CompressedCacheLayer) -> None:
        """Compress a layer whose attention has run: now, with all others once the last one's has, or after a second
        pass.
        """

    def compress_decoded(self, layer: CompressedCacheLayer) -> None:
        """Compress all layers again if this is the last and the strategy's trigger says so after one more decoded
        token.
        """

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
        self.forwards: tuple[Forward, ...] = ()  # seen by attention and not yet observed
        self.observed: Mapping[Observation, Tensor] | None = None  # of forwards that are not yet compressed
        self.repeated: Mapping[Observation, Tensor] = {}  # of a second pass over them
        self.alive: Tensor | None = None  # (batch, kv_heads, slots), what the last round of a second pass attended to
        self.output: Tensor | None = None  # W_O while a compression waits
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
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.storage.append(key_states, value_states)
        self.seen += new
        if new > 1 or self.held_table is None or self.request.recompresses:
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
        if self.pending:  # beams are reordered right after the prefill
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
        if self.pending:
            raise UnsupportedUseError("the cache has deferred its compression; call cache.finish() before cropping it")
        if self.trimmed and torch.equal(self.tokens + self.tail, self.prompt):
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
        self.prompt, self.steps = self.prompt.minimum(self.tokens), max(0, self.steps - removed)
        self.log = self.log.before(target)
        if upcoming is not None:
            self.next_positions = upcoming - removed if removed <= self.tail else kept.positions_at(target)
        self.rotary = None if self.rotary is None else self.rotary.first(target)
        self.tail, self.seen = 0, target

    def offload(self) -> None:
        """Move keys and values to the CPU."""
        self.move(torch.device("cpu"))

    def prefetch(self) -> None:
        """Move keys and values back to the layer's device."""
        self.move(self.device)

    # --- what the attention module's hook and the attention function ask ---

    def note_rotary(self, module: nn.Module, embeddings: Any) -> None:
        """Take note of the rotary embeddings of the tokens of this forward, where something will look at them."""
        if self._reads_rotary:
            before = self.request.rotary_start if self.rotary is None else self.rotary
            self.rotary = before.extend(module, embeddings)

    def packed(self, base: str, query: Tensor, mask: Tensor | None) -> PackedAttention | None:
        """Return the slots as they lie in memory if attention can run over them so, with the mask over all slots (None
        where it is not needed) and that of each (row, KV head) over its own, given transformers' mask over columns.
        """
        slots = self.storage.packed()
        if slots is None or not can_attend(base, query, slots, self.only_causal(mask)):
            return None
        slot_mask = self.slot_mask(mask, query) if query.shape[2] > 1 or self.holds_padding else None
        masks = self.head_masks(mask, slots, query) if slot_mask is None else own_slots(slot_mask, slots)
        return slots, slot_mask, masks

    def unpacked(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Return keys and values of all slots, given what `update` returned."""
        return (keys, values) if self.storage.packed() is None else self.storage.read()

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

    def attended(
        self, module: nn.Module, queries: Tensor, mask: Tensor | None, slot_mask: Tensor | None, logits: Logits
    ) -> None:
        """Take note of what the attention saw of the tokens that just arrived, then compress, unless that is
        deferred.
        """
        self.output = per_head(self.request.adapter.output_projection(module), queries.shape[1])
        if self.arrived == 1 and self.held_table is not None:
            self._decoded(queries, logits)
            return
        modality, positions = self.request.arriving()
        valid = row_validity(mask, queries.shape[0], self.arrived)
        columns = torch.arange(self.seen - self.arrived, self.seen, device=queries.device)
        forward = Forward(queries, slot_mask, columns, valid, modality, logits)
        self.forwards = (*self.forwards, forward)
        self.take_in(queries.shape[0], valid, modality, positions)
        if not self.request.defer:
            self.request.compress_after(self)

    def _decoded(self, queries: Tensor, logits: Logits) -> None:
        """Take note of one decoded token, then compress where it is time."""
        self.tail, self.arrived, self.steps = self.tail + 1, 0, self.steps + 1
        if self.request.strategy.observations:
            self.log = self.log.add(queries, self.seen, logits)
        self.request.compress_decoded(self)

    # --- compression ---

    @property
    def pending(self) -> bool:
        """Return whether tokens wait for their compression."""
        return bool(self.forwards) or self.observed is not None

    def wanted(self) -> tuple[Observation, ...]:
        """Return the statistics that the next compression reads."""
        strategy = self.request.strategy
        if self.overfull:
            return strategy.observations
        if self._stays():
            return ()
        policy = () if strategy.selector is None else strategy.policy.observations()
        return tuple(dict.fromkeys((*policy, *self._later())))

    @property
    def overfull(self) -> bool:
        """Return whether the next compression has something to trim."""
        return not self._stays() and not self._everything_fits()

    def excess(self) -> Tensor:
        """Return by how many slots each row holds more than its budget, over all heads, `(batch,)` on the CPU."""
        table = self.held_table
        assert table is not None
        held = table.slots * self.form.kv_heads if table.mask is None else table.mask.sum(dim=(1, 2)).cpu()
        return held + (self.tail - self.share()) * self.form.kv_heads

    def fold(self) -> None:
        """Go on without a compression: once enough tokens were decoded, add what they attended to to the sums that are
        carried.
        """
        self.output = None
        observations = self.request.strategy.observations
        if len(self.log.decoded) < FOLD or any(
            observation.latest is None for observation in observations if not observation.carried
        ):
            return
        self.take_in_tail()
        self.carried = self._with_carried(self._look_back(self._later()))
        self.log = self.log.keep((), self._remembered())

    def observe(self) -> None:
        """Take the statistics of the queries since the last compression, and let go of all that no later one reads."""
        self.observed = self._look_back([wanted for wanted in self.wanted() if wanted.repeat() is None])
        if self.request.recompresses:
            self.log = self.log.keep(self.forwards, self._remembered())
        self.forwards = ()

    def prepare(self) -> tuple[LayerView, Scores] | None:
        """Return the view and the scores to allocate by, None where nothing is to be trimmed."""
        started = time.perf_counter()
        self.take_in_tail()
        prepared = None
        if self._stays():
            pass
        elif self._everything_fits():
            self._observe_only()
        else:
            self._view, self._scores = prepared = self.look(self.share())
        self.forwards, self.observed, self.repeated, self.alive, self.output = (), None, {}, None, None
        self.steps = 0
        self.compressions += 1
        self.seconds += time.perf_counter() - started
        return prepared

    def look(self, share: Tensor) -> tuple[LayerView, Scores]:
        """Return the view and the scores at a uniform share, `(batch,)`; nothing is changed."""
        view = self._make_view()
        return view, self.request.strategy.scores(view, share)

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
        self.rotary = self.rotary if self._reads_rotary else None
        self._view = self._scores = None
        self.seconds += time.perf_counter() - started

    def _stays(self) -> bool:
        """Return whether what came after the first compression stays as it is."""
        return self.request.strategy.turns == "append" and self.compressions > 0

    def _everything_fits(self) -> bool:
        """Return whether every row may keep all it holds, and holds no padding."""
        strategy = self.request.strategy
        if strategy.ignores_budget:
            return True
        assert self.held_table is not None
        return not self.trimmed and self.held_table.mask is None and strategy.keeps_all(self.tokens, self.form)

    def share(self) -> Tensor:
        """Return the uniform share of the budget, `(batch,)` on the CPU: of all tokens seen; with the trigger
        over-budget, a ratio is of those that its last forward of several tokens had seen.
        """
        strategy = self.request.strategy
        resolved = strategy.trigger.over_budget and strategy.budget.ratio is not None
        return strategy.slots(self.prompt if resolved else self.tokens + self.tail, self.form)

    def bookkeeping(self) -> list[Tensor]:
        """Return every tensor that the layer keeps beside keys and values."""
        return super().bookkeeping() if self.rho is None else [*super().bookkeeping(), self.rho]

    def _observe_only(self) -> None:
        """Measure rho, and what later turns add to, of a layer that keeps everything."""
        strategy = self.request.strategy
        if strategy.ignores_budget:
            return
        view = self._make_view()
        self.rho = None if strategy.selector is None else strategy.policy.plan(view).rho
        self.carried = {seen: view.observations[seen] for seen in self._later()}

    def _later(self) -> tuple[Observation, ...]:
        """Return the statistics that a later compression joins with its own."""
        strategy = self.request.strategy
        if strategy.budget.ratio == 1 or strategy.turns == "append":
            return ()
        return tuple(observation for observation in strategy.observations if observation.carried)

    def _make_view(self) -> LayerView:
        if self.observed is None:
            self.observe()
        table = self.table
        assert table is not None
        assert self.observed is not None
        keys, values = self.storage.read()
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
            observations=self._with_carried({**self.observed, **self.repeated}),
            memory=self.memory,
            output=self.output,
            rotary=self._rotary(table) if self.request.reads_rotary else None,
        )

    def _look_back(self, observations: Sequence[Observation]) -> dict[Observation, Tensor]:
        """Return the observations over the queries since the last compression."""
        keys, mass = self.storage.read()[0], self.request.strategy.mass_preserving
        return self.log.observe(self.forwards, keys, self.whole_table(), observations, mass)

    def _with_carried(self, seen: Mapping[Observation, Tensor]) -> dict[Observation, Tensor]:
        """Return the statistics joined with what is carried of earlier ones."""
        before = {name: self._still_seen(sums) for name, sums in self.carried.items() if name in seen}
        return {name: name.join(before[name], now) if name in before else now for name, now in seen.items()}

    def _still_seen(self, before: Tensor) -> Tensor:
        """Return what is carried, `(batch, heads, slots)`, 0 for new tokens and for what a second pass has given up."""
        assert self.held_table is not None
        before = padded(before, self.held_table.slots)
        if self.alive is None:
            return before
        return before * self.alive.repeat_interleave(before.shape[1] // self.alive.shape[1], dim=1)

    def _remembered(self) -> int:
        """Return how many of the latest queries a later compression looks at."""
        return max((observation.latest or 0 for observation in self.request.strategy.observations), default=0)

    @property
    def _reads_rotary(self) -> bool:
        return self.request.reads_rotary and not self._stays()

    def _rotary(self, table: SlotTable) -> Rotary:
        """Return how the keys of all slots were rotated.

        Raises:
            UnsupportedModelError: the attention module was not given the embeddings of every column.
        """
        known = 0 if self.rotary is None else self.rotary.columns
        if self.rotary is None or known != self.seen:
            raise UnsupportedModelError(
                f"strategy {self.request.strategy.name!r} turns keys back to before their rotary embedding, so every "
                f"attention module must be given position_embeddings; layer {self.number} was given those of {known} "
                f"of {self.seen} tokens. Use a merger that does not turn keys back, such as pivot-mean"
            )
        return self.rotary.at(table.columns)

    def _carry(self, view: LayerView, pivots: Pivots) -> None:
        """Keep the sums of the surviving slots, `(batch, heads, slots)`."""
        self.carried = {
            seen: gather_heads(result, pivots) for seen, result in view.observations.items() if seen in self._later()
        }
