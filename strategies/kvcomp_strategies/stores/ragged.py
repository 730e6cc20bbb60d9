"""Every head exactly as long as it is: slots packed head by head, so that shorter heads cost what they hold."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from pydantic import Field
from torch import Tensor

from kvcomp.core.interfaces import Store
from kvcomp.core.packed import PackedLayout, PackedSlots, runs
from kvcomp_strategies.stores.buffers import BufferedStorage, Buffers, Growth
from kvcomp_strategies.stores.dense import DenseBuffers, owned


@dataclass(eq=False)
class PackedBuffers(Buffers):
    """Keys and values `(places, head_dim)` of all (row, KV head) sequences, as the layout says."""

    keys: Tensor
    values: Tensor
    layout: PackedLayout
    held: int = 0

    @classmethod
    def of(cls, keys: Tensor, values: Tensor, mask: Tensor) -> PackedBuffers:
        """Return exactly the slots `(batch, kv_heads, slots, head_dim)` that the mask fills, without room."""
        lengths = mask.sum(dim=-1).flatten().tolist()
        layout = PackedLayout.of(lengths, kv_heads=keys.shape[1], width=keys.shape[2], room=0, device=keys.device)
        return cls(keys[mask], values[mask], layout)

    @property
    def capacity(self) -> int:
        """Return for how many slots there is room on the axis of the longest head."""
        return self.layout.width + self.layout.room

    def mean_slots(self, filled: int) -> int:
        """Return how many slots a head holds on average where the axis is filled so far."""
        return sum(self.layout.lengths) // len(self.layout.lengths) + filled - self.layout.width

    def shared(self) -> PackedBuffers:
        """Return the same buffers as something that must not be written to."""
        return PackedBuffers(self.keys, self.values, self.layout, held=self.capacity + 1)

    def grown(self, filled: int, capacity: int) -> PackedBuffers:
        """Return larger buffers with the filled slots copied."""
        return self._repacked(range(len(self.layout.lengths)), filled, capacity - self.layout.width)

    def select(self, rows: Tensor, filled: int) -> PackedBuffers:
        """Return buffers of these rows, with as much room."""
        heads = self.layout.kv_heads
        sequences = [row * heads + head for row in rows.tolist() for head in range(heads)]
        return self._repacked(sequences, filled, self.layout.room)

    def move(self, device: torch.device) -> PackedBuffers:
        """Return the buffers on a device; themselves where they are there."""
        if self.keys.device == device:
            return self
        layout = replace(self.layout, ends=self.layout.ends.to(device))
        return PackedBuffers(self.keys.to(device), self.values.to(device), layout)

    def cleared(self, filled: int) -> PackedSlots:
        """Set the room of every sequence to zero and return the slots as they lie."""
        free = self.capacity - filled
        starts = (self.layout.ends.cpu() + (filled - self.layout.width)).tolist()
        places = runs(starts, [free] * len(starts), self.keys.device)
        self.keys.index_fill_(0, places, 0)
        self.values.index_fill_(0, places, 0)
        return self.packed(filled)

    def write(self, filled: int, keys: Tensor, values: Tensor) -> None:
        """Put slots after the filled ones of every sequence, in place."""
        places = self.layout.ends + (filled - self.layout.width)
        if keys.shape[2] > 1:
            places = (places[:, None] + torch.arange(keys.shape[2], device=places.device)).flatten()
        self.keys.index_copy_(0, places, keys.reshape(-1, keys.shape[3]))
        self.values.index_copy_(0, places, values.reshape(-1, values.shape[3]))

    def read(self, filled: int) -> tuple[Tensor, Tensor]:
        """Return copies of the filled slots, with zeros where shorter heads have none."""
        layout, appended, host = self.layout, filled - self.layout.width, torch.device("cpu")
        ends = [start + length for start, length in zip(layout.starts, layout.lengths, strict=True)]
        tail = [appended] * len(ends)
        spread = range(0, len(ends) * filled, filled), range(layout.width, layout.width + len(ends) * filled, filled)
        source = [runs(layout.starts, layout.lengths, host), runs(ends, tail, host)]
        target = [runs(spread[0], layout.lengths, host), runs(spread[1], tail, host)]
        # Together they go to the device once, which waits for it.
        here, there = torch.stack([torch.cat(source), torch.cat(target)]).to(self.keys.device)
        shape = (len(ends) // layout.kv_heads, layout.kv_heads, filled)
        return _spread(self.keys, here, there, shape), _spread(self.values, here, there, shape)

    def packed(self, filled: int) -> PackedSlots:
        """Return the slots as they lie."""
        return PackedSlots(self.keys, self.values, self.layout, filled - self.layout.width)

    def _repacked(self, sequences: Sequence[int], filled: int, room: int) -> PackedBuffers:
        """Return buffers of these sequences, in this order, each with this room."""
        old, device, appended = self.layout, self.keys.device, filled - self.layout.width
        lengths = [old.lengths[sequence] for sequence in sequences]
        layout = PackedLayout.of(lengths, kv_heads=old.kv_heads, width=old.width, room=room, device=device)
        sizes = [length + appended for length in lengths]
        source = runs([old.starts[sequence] for sequence in sequences], sizes, device)
        target = runs(layout.starts, sizes, device)
        keys = self.keys.new_empty(layout.total, self.keys.shape[1])
        values = self.values.new_empty(layout.total, self.values.shape[1])
        keys.index_copy_(0, target, self.keys.index_select(0, source))
        values.index_copy_(0, target, self.values.index_select(0, source))
        return PackedBuffers(keys, values, layout)


class RaggedStorage(BufferedStorage):
    """Heads packed one after the other where they differ; one buffer of all heads, as `dense`, where they do not."""

    def _buffers_of(self, keys: Tensor, values: Tensor, mask: Tensor | None) -> Buffers:
        if mask is None or bool(mask.all()):
            return DenseBuffers(owned(keys), owned(values))
        return PackedBuffers.of(keys, values, mask)

    def packed(self) -> PackedSlots | None:
        """Return the slots as they lie where heads differ."""
        return self._buffers.packed(self._filled) if isinstance(self._buffers, PackedBuffers) else None


class Ragged(Store, use="ragged"):
    """Hold slots in full precision, every head with as many as it keeps: for allocators that divide a budget among
    heads.

    Packed heads are what Ada-KV (arXiv:2407.11550) needs to save memory. Deviation: its repository FFY0/AdaKV attends
    with a kernel for flattened caches; here attention runs over each head's own slots on a CPU, and on a GPU through
    variable-length attention.

    Attributes:
        growth: factor by which full buffers grow, so that appending copies each slot a bounded number of times.
    """

    growth: float = Field(default=1.25, gt=1.0, le=4.0)

    def open(self, reserve: int | None = None) -> RaggedStorage:
        """Return an empty storage; with `reserve`, the first append takes room for that many slots in each head."""
        return RaggedStorage(Growth(self.growth, reserve))


def _spread(packed: Tensor, source: Tensor, target: Tensor, shape: tuple[int, int, int]) -> Tensor:
    """Return `(batch, kv_heads, slots, head_dim)` with packed slots at other places, zeros between."""
    spread = packed.new_zeros(*shape, packed.shape[1])
    spread.view(-1, packed.shape[1]).index_copy_(0, target, packed.index_select(0, source))
    return spread
