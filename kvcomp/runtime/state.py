"""What one layer of a compressed cache holds: keys and values in a storage, what each slot stands for in a table."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from kvcomp.core.interfaces import Observation
from kvcomp.core.storage import SlotStorage, SteadyStorage
from kvcomp.core.types import Pivots, SlotForm
from kvcomp.runtime.decoding import QueryLog
from kvcomp.runtime.fixed import FixedSlots
from kvcomp.runtime.rotary import RotaryColumns
from kvcomp.runtime.slots import PackedTable, Places, SlotTable, gather_heads, new_tokens, padded, positions_after
from kvcomp.runtime.transcript import Transcript


class LayerState:
    """The slots of a layer and their bookkeeping, and how both change together.

    Tokens decoded one by one since the table was made are the `tail`, whose entries follow from their number. Slots of
    table and storage lie on the same axis: what the storage was last given, then what was appended.
    """

    def __init__(self, storage: SlotStorage) -> None:
        self.storage = storage
        self._empty = storage.snapshot()
        self.hold_nothing()

    def hold_nothing(self) -> None:
        """Forget everything."""
        self.storage.restore(self._empty)
        self.is_initialized = False
        self.dtype, self.device = torch.float32, torch.device("cpu")  # until the first token says
        self.form = SlotForm(0, 0, 0, 0, 0)
        self.held_table: SlotTable | PackedTable | None = None
        self.tokens = torch.zeros(0, dtype=torch.long)  # valid tokens of each row that the table stands for, on the CPU
        self.next_positions: Tensor | None = None  # (axes, batch), of the first token of the tail
        self.tail = 0
        self.seen = 0  # columns, padding counted
        self.arrived = 0  # tokens of this forward that the attention function has not seen yet
        self.trimmed = False  # slots are no longer columns
        self.holds_padding = False  # some slot of the storage is that of a padding token
        self.carried: Mapping[Observation, Tensor] = {}  # (batch, heads, slots) each, of the slots in the table
        self.granted: Tensor | None = None  # (batch, kv_heads) on the CPU, of a budget that layers share
        self.memory: Tensor | None = None  # (batch, ...), what the matcher left at the last compression
        self.log = QueryLog()  # of queries that compressions while decoding look at
        self.steps = 0  # tokens decoded since the last compression
        self.prompt = self.tokens  # valid tokens of each row at the end of the last forward of several, on the CPU
        self.rotary: RotaryColumns | None = None  # of all columns seen, where the strategy reads it
        self.transcript = Transcript()  # of all columns seen, in the first layer alone
        self.fixed: FixedSlots | None = None  # where decode steps are compiled: `tail` and `seen` may be behind it
        self.lost = 0  # decoded tokens that found no room

    # --- reading ---

    @property
    def table(self) -> SlotTable | None:
        """Return what each slot stands for, the tail left out; where heads differ it is unpacked anew each time."""
        return self.held_table.unpacked() if isinstance(self.held_table, PackedTable) else self.held_table

    @table.setter
    def table(self, table: SlotTable | None) -> None:
        empty = table is not None and table.mask is not None and self.trimmed
        self.held_table = PackedTable.of(table) if table is not None and empty else table

    @property
    def keys(self) -> Tensor | None:
        """Return the keys of the filled slots, `(batch, kv_heads, slots, head_dim)`, None before the first token.

        A view; where heads or rows hold fewer slots than others, a copy with zeros at their ends.
        """
        self.catch_up()
        return self._together(self.storage.read()[0]) if self.is_initialized else None

    @property
    def values(self) -> Tensor | None:
        """Return the values of the filled slots, `(batch, kv_heads, slots, head_dim)`, as `keys` does."""
        self.catch_up()
        return self._together(self.storage.read()[1]) if self.is_initialized else None

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

    def all_slots(self) -> SlotTable | None:
        """Return the table of all slots, the tail included; None before the first token."""
        self.catch_up()
        return None if self.held_table is None else self.whole_table()

    def upcoming_positions(self) -> Tensor | None:
        """Return the position of the next token, `(axes, batch)`; None where positions are columns."""
        self.catch_up()
        return None if self.next_positions is None else self.next_positions + self.tail

    def bookkeeping(self) -> list[Tensor]:
        """Return every tensor that the layer keeps beside keys and values."""
        tensors = [] if self.held_table is None else list(self.held_table.tensors())
        tensors += [self.tokens, self.prompt]
        kept = (self.next_positions, self.memory, self.granted)
        tensors += [tensor for tensor in kept if tensor is not None]
        tensors += [packed.layout.ends] if (packed := self.storage.packed()) else []
        tensors += [] if self.rotary is None else self.rotary.tensors()
        tensors += self.transcript.parts
        tensors += [] if self.fixed is None else self.fixed.tensors()
        return [*tensors, *self.log.tensors(), *self.carried.values()]

    def whole_table(self, arrived: bool = True) -> SlotTable:
        """Return the table with the tail, and with the tokens that just arrived, which only a mask may ask for."""
        table = self.table
        assert table is not None
        more = self.tail + (self.arrived if arrived else 0)
        if not more:
            return table
        batch, kv_heads, _ = table.indices.shape
        positions = None
        if self.next_positions is not None:
            positions = self.next_positions[..., None] + torch.arange(more, device=self.device)
        start = self.seen - self.arrived - self.tail
        return table.extend(
            new_tokens((batch, kv_heads, more), start, self.tokens, device=self.device, positions=positions)
        )

    def places(self) -> Places:
        """Return where all slots lie, the tail and the tokens that just arrived included: what a mask needs of
        `whole_table`, at a fraction of its cost.
        """
        assert self.held_table is not None
        more = self.tail + self.arrived
        return self.held_table.places.then(self.seen - more, more)

    def _together(self, per_slot: Tensor, empty: int = 0) -> Tensor:
        table = self.all_slots()
        return per_slot if table is None else table.together(per_slot, empty)

    # --- changing ---

    def catch_up(self) -> None:
        """Take note of what was appended to fixed slots, which only the device knows."""
        if self.fixed is None:
            return
        assert isinstance(self.storage, SteadyStorage)
        new, self.lost = self.fixed.news()
        self.storage.count(new)
        self.tail, self.seen = self.tail + new, self.seen + new

    def loosen(self) -> None:
        """Let slots move again."""
        self.catch_up()
        self.fixed = None

    def take_form(self, keys: Tensor, values: Tensor, layers: int) -> None:
        """Take note of what the layer is to hold, `(batch, kv_heads, tokens, head_dim)` each."""
        self.dtype, self.device = keys.dtype, keys.device
        self.form = SlotForm(layers, keys.shape[1], keys.shape[-1], values.shape[-1], keys.element_size())
        self.is_initialized = True

    def take_in(self, batch: int, valid: Tensor | None, modality: Tensor | None, positions: Tensor | None) -> None:
        """Move the tail and the tokens that just arrived into the table.

        Args:
            batch: rows of the batch.
            valid: of the new tokens, `(batch, tokens)` bool, or None where none is padding.
            modality: `(batch, tokens)` int8, or None for text.
            positions: `(axes, batch, tokens)`, or None for the columns.
        """
        seen = self.seen - self.arrived
        first = self.held_table is None
        before = torch.full((batch,), 0) if first else self.tokens + self.tail
        arrived = new_tokens(
            (batch, self.form.kv_heads, self.arrived),
            seen,
            before,
            device=self.device,
            valid=valid,
            modality=modality,
            positions=positions,
        )
        self.table = arrived if first else self.whole_table(arrived=False).extend(arrived)
        self.tokens = before + (self.arrived if valid is None else valid.sum(dim=1).cpu())
        self.next_positions = None if positions is None else positions_after(positions, batch)
        self.prompt = self.tokens
        self.tail = self.arrived = 0
        self.holds_padding |= valid is not None

    def note_tokens(self, given: Tensor) -> None:
        """Remember what the tokens that were seen last are: ids `(batch, tokens)`, or their embeddings."""
        self.transcript = self.transcript.then(given, self.seen - given.shape[1])

    def take_in_tail(self) -> None:
        """Move the tail into the table."""
        if self.tail:
            self.table, self.next_positions = self.whole_table(arrived=False), self.upcoming_positions()
            self.tokens, self.tail = self.tokens + self.tail, 0

    def keep_slots(self, stays: Tensor) -> None:
        """Hold the slots that stay, `(batch, kv_heads, slots)` of all slots, and nothing else."""
        table = self.whole_table()
        slots = int(stays.sum(dim=-1).max())
        order = (~stays).to(torch.uint8).argsort(dim=-1, stable=True)[..., :slots]
        kept, filled = Pivots(order), stays.gather(2, order)
        full = bool(filled.all())
        self.holds_padding = bool((stays & ~table.valid).any())
        keys, values = self.storage.read()
        self.storage.replace(kept.gather(keys), kept.gather(values), None if full else filled)
        table = table.map(kept.gather)
        self.table = table if full else table.masked(filled)
        self.carried = {seen: gather_heads(padded(sums, stays.shape[2]), kept) for seen, sums in self.carried.items()}

    def drop_last(self, slots: int) -> None:
        """Let go of the last slots of every head, as many as the storage says are removable."""
        table = self.whole_table()
        left = table.slots - slots
        self.storage.shorten(slots)
        self.table = table.map(lambda entry: entry[..., :left])
        self.carried = {seen: padded(sums, table.slots)[..., :left] for seen, sums in self.carried.items()}

    def keep_rows(self, rows: Tensor) -> None:
        """Hold these rows of the batch, `(rows,)` int64, in this order."""
        here = rows.to(self.device)
        self.storage.select(here)
        table = self.table
        self.table = None if table is None else table.map(lambda entry: entry.index_select(0, here))
        self.tokens, self.prompt = (tokens.index_select(0, rows.cpu()) for tokens in (self.tokens, self.prompt))
        self.granted = None if self.granted is None else self.granted.index_select(0, rows.cpu())
        self.log = self.log.rows(here)
        self.next_positions = None if self.next_positions is None else self.next_positions.index_select(1, here)
        self.carried = {seen: sums.index_select(0, here) for seen, sums in self.carried.items()}
        self.memory = None if self.memory is None else self.memory.index_select(0, here)
        self.rotary = None if self.rotary is None else self.rotary.rows(rows)
        self.transcript = self.transcript.rows(rows)

    def move(self, device: torch.device) -> None:
        """Move keys and values to a device."""
        self.loosen()
        if self.is_initialized:
            self.storage.move(device)
