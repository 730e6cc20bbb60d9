"""One layer of a compressed cache: what transformers and the attention function ask of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicLayer

from kvcomp.core.errors import UnsupportedUseError
from kvcomp.core.packed import PackedSlots
from kvcomp.core.storage import SteadyStorage
from kvcomp.runtime.adapter import per_head
from kvcomp.runtime.compression import LayerCompression
from kvcomp.runtime.fixed import LAYER_ATTRIBUTE, FixedSlots, rounded
from kvcomp.runtime.forward import Forward, Logits
from kvcomp.runtime.masks import (
    over_filled,
    over_sequences,
    over_slots,
    row_validity,
    shown_columns,
    visible,
    with_mass,
)
from kvcomp.runtime.packed import can_attend, own_slots
from kvcomp.runtime.slots import PackedTable

NO_DRAFTS = (
    "Assisted and prompt-lookup decoding feed drafts together with the prompt: the cache would be compressed for "
    "drafts that are then taken back. Generate without assistant_model and prompt_lookup_num_tokens, or at a budget of "
    "1.0"
)
PackedAttention = tuple[PackedSlots, Tensor | None, Sequence[Tensor | None]]


class CompressedCacheLayer(LayerCompression, DynamicLayer):  # type: ignore[no-untyped-call, override]
    """A cache layer that reports the tokens it has *seen* while it holds fewer slots.

    With logical lengths everywhere, `generate()` computes positions, feeds only new tokens and builds masks as for a
    stock cache. CacheLayerMixin.__init__ is never called: it would assign `keys` and `values`, which are read from the
    storage here.
    """

    def reset(self) -> None:
        """Forget everything."""
        self.hold_nothing()

    # --- what transformers asks of a layer ---

    def get_seq_length(self) -> int | Tensor:  # type: ignore[override]
        """Return the number of columns seen: where slots are fixed a 0-d tensor, as transformers' static caches do."""
        return self.seen if self.fixed is None else self.fixed.seen.clone()

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return the width of the mask over columns, and offset 0."""
        if self.fixed is not None and query_length == 1:
            return self.fixed.width, 0
        self.catch_up()
        return self.seen + query_length, 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Remember what the layer is to hold."""
        self.take_form(key_states, value_states, self.layers)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Take in new tokens, `(batch, kv_heads, tokens, head_dim)`, and return keys and values of all slots; only the
        new ones where the slots are packed.
        """
        if self.fixed is not None and key_states.shape[2] == 1:
            return self.fixed.update(key_states, value_states)
        self.loosen()
        if self.number == 0:
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

    def fix(self, room: int) -> None:
        """Hold the slots at fixed addresses, with room for that many tokens, until something but one token comes."""
        table = self.whole_table()
        storage, mass = self.storage, self.request.strategy.mass_preserving
        assert isinstance(storage, SteadyStorage)
        memory = storage.take_room(rounded(table.slots + room) - table.slots)
        with torch.inference_mode(mode=False):  # what is made here is written to in any mode
            self.fixed = FixedSlots(memory, table, self.seen, causal=not (self.holds_padding or mass))
            if mass and self.trimmed:
                self.fixed.weigh(table.counts, self.dtype)
        self.fixed.pin()

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
        self.loosen()
        if not self.is_initialized:
            return
        if self.pending:  # beams are reordered right after the prefill
            self.request.finish()
        super().keep_rows(rows)
        self.rho = None if self.rho is None else self.rho.index_select(0, rows.to(self.rho.device))

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last columns: `-n` or 0 removes n of them; older transformers give the length that stays.

        Raises:
            UnsupportedUseError: see `check_crop`.
        """
        self.check_crop(tokens_to_remove)
        target = self._target(tokens_to_remove)
        if target is None:
            return
        goes = self.whole_table().columns >= target
        removed, upcoming = self.seen - target, self.upcoming_positions()
        if self.storage.removable() is None:
            self.keep_slots(~goes & self.whole_table().valid if self.trimmed else ~goes)
        else:
            self.drop_last(int(goes.sum(dim=-1).max()))
        kept = self.table
        assert kept is not None
        self.tokens = self.tokens + self.tail - removed
        self.prompt, self.steps = self.prompt.minimum(self.tokens), max(0, self.steps - removed)
        self.log = self.log.before(target)
        if upcoming is not None:
            self.next_positions = upcoming - removed if removed <= self.tail else kept.positions_at(target)
        self.rotary = None if self.rotary is None else self.rotary.first(target)
        self.transcript = self.transcript.first(target)
        self.tail, self.seen = 0, target

    def check_crop(self, tokens_to_remove: int) -> None:
        """Raise where `crop` could not remove these columns and leave everything else as it is.

        Raises:
            UnsupportedUseError: the columns were compressed by the forward that just ended, as in assisted decoding,
                whose drafts would have been part of the budget; or compression is deferred; or the store has coded
                some of them together with slots that stay.
        """
        self.loosen()
        target = self._target(tokens_to_remove)
        if target is None:
            return
        if self.pending:
            raise UnsupportedUseError("the cache has deferred its compression; call cache.finish() before cropping it")
        if self.trimmed and torch.equal(self.tokens + self.tail, self.prompt):
            raise UnsupportedUseError(
                f"tokens were removed right after they were compressed, as in assisted decoding. {NO_DRAFTS}"
            )
        most = self.storage.removable()
        if most is None:
            return
        goes = self.whole_table().columns >= target
        slots = int(goes.sum(dim=-1).max())
        if slots > most or not bool(goes[..., goes.shape[2] - slots :].all()):
            raise UnsupportedUseError(
                f"store {self.request.strategy.store.use!r} holds only the last {most} tokens of this cache as they "
                f"came, and the last {self.seen - target} were to be removed: slots that stay would be coded anew, "
                "each with another error. Take snapshot = cache.snapshot() before the tokens come, and give them back "
                "with cache.restore(snapshot)"
            )

    def _target(self, tokens_to_remove: int) -> int | None:
        """Return how many columns are to stay, None where all do."""
        target = self.seen + tokens_to_remove if tokens_to_remove <= 0 else tokens_to_remove
        return target if target < self.seen and self.is_initialized else None

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

    def packed(self, base: str, query: Tensor, mask: Tensor | None, logits: Logits) -> PackedAttention | None:
        """Return the slots as they lie in memory if attention can run over them so, with the mask over all slots (None
        where it is not needed) and that of each (row, KV head) over its own, given transformers' mask over columns.
        """
        slots = self.storage.packed()
        if slots is None:
            return None
        causal = self.only_causal(mask)
        if not can_attend(base, slots, logits, causal):
            return None
        if causal and query.shape[2] == 1:
            return slots, None, [None] * len(slots.layout.lengths)
        slot_mask = None
        if query.shape[2] > 1 or self.holds_padding:
            slot_mask = self.slot_mask(mask, query, aligned=False)
        masks = self.head_masks(mask, slots, query) if slot_mask is None else own_slots(slot_mask, slots)
        return slots, slot_mask, masks

    def unpacked(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Return keys and values of all slots, given what `update` returned."""
        return (keys, values) if self.storage.packed() is None else self.storage.read()

    def only_causal(self, mask: Tensor | None) -> bool:
        """Return whether a query sees every slot before it and nothing weighs them, given transformers' mask: one that
        shows a single query as many columns as there are tokens hides only padding, which no slot stands for.
        """
        if self.holds_padding or self.request.strategy.mass_preserving:
            return False
        if mask is None:
            return True
        tokens = self.tokens + (self.tail + self.arrived)
        return mask.shape[2] == 1 and torch.equal(shown_columns(mask).expand_as(tokens), tokens)

    def slot_mask(self, mask: Tensor | None, queries: Tensor, *, aligned: bool) -> Tensor | None:
        """Return the mask over this layer's slots, `(batch, heads, queries, slots)`; None for no mask at all.

        Args:
            mask: transformers' mask over columns.
            queries: `(batch, heads, queries, head_dim)`.
            aligned: whether several queries without a mask see every slot before them.
        """
        if not self.trimmed:
            return mask
        assert self.held_table is not None
        new = queries.shape[2]
        group, filled = queries.shape[1] // self.form.kv_heads, self.held_table.mask
        if (new == 1 or aligned) and self.only_causal(mask):
            if filled is None:
                return None
            if new == 1:
                return over_filled(filled, self.tail + self.arrived, group, mask)
        slot_mask = over_slots(mask, self.places(), new, self.seen - new, group)
        if not self.request.strategy.mass_preserving:
            return slot_mask
        return with_mass(slot_mask, self.whole_table().counts, group, queries.dtype)

    def head_masks(self, mask: Tensor | None, slots: PackedSlots, query: Tensor) -> Sequence[Tensor]:
        """Return the mask of one query over the own slots of each (row, KV head), `(1, 1, 1, slots)`.

        Args:
            mask: transformers' mask over columns.
            slots: of this layer, none of them padding.
            query: `(batch, heads, 1, head_dim)`.
        """
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
        arriving = self.request.arriving()  # on the device of the inputs, which need not be that of this layer
        modality, positions = (None if entry is None else entry.to(queries.device) for entry in arriving)
        self._drop_padding(mask)
        valid = row_validity(mask, queries.shape[0], self.arrived)
        columns = torch.arange(self.seen - self.arrived, self.seen, device=queries.device)
        forward = Forward(queries, slot_mask, columns, valid, modality, logits)
        self.forwards = (*self.forwards, forward)
        self.take_in(queries.shape[0], valid, modality, positions)
        if not self.request.defer:
            self.request.compress_after(self)

    def _drop_padding(self, mask: Tensor | None) -> None:
        """Let go of tokens that arrived before and are padding by the mask of this forward: what `generate()` appends
        to rows that have ended, while others go on.
        """
        if mask is None or self.held_table is None:
            return
        start, rows = self.seen - self.arrived, len(self.tokens)
        if torch.equal(visible(mask[:, 0, -1, :start]).expand(rows, -1).sum(dim=1).cpu(), self.tokens + self.tail):
            return  # one sync per layer and later turn
        shown = visible(mask[:, 0, :, :start]).any(dim=1).expand(rows, -1)
        self.take_in_tail()
        table = self.table
        assert table is not None
        columns = table.columns.clamp(min=0).long()
        stays = table.valid & shown.gather(1, columns.flatten(1)).view(columns.shape)
        if not torch.equal(stays, table.valid):
            self.table, self.tokens, self.holds_padding = table.masked(stays), shown.sum(dim=1).cpu(), True

    def _decoded(self, queries: Tensor, logits: Logits) -> None:
        """Take note of one decoded token, then compress where it is time."""
        self.tail, self.arrived, self.steps = self.tail + 1, 0, self.steps + 1
        if self.request.strategy.observations:
            self.log = self.log.add(queries, self.seen, logits)
        self.request.compress_decoded(self)
