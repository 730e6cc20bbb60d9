"""Slots packed head by head: what a store that wastes no memory on shorter heads shows to the attention function."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class PackedLayout:
    """Where the slots of each (row, KV head) lie in a flat buffer: one sequence per head, row by row, each with room at
    its end.

    Attributes:
        lengths: slots of each sequence before anything was appended.
        starts: place of the first slot of each.
        ends: `(sequences,)` int64 on the device of the slots: where the first appended slot of each goes.
        kv_heads: sequences per row.
        width: slots of the longest head, which is where appended slots begin on the axis of `SlotStorage.read`.
        room: slots that can be appended to each sequence.
    """

    lengths: tuple[int, ...]
    starts: tuple[int, ...]
    ends: Tensor
    kv_heads: int
    width: int
    room: int

    @classmethod
    def of(cls, lengths: Sequence[int], *, kv_heads: int, width: int, room: int, device: torch.device) -> PackedLayout:
        """Return the layout in which sequences of these lengths follow each other, each with the same room."""
        sizes = torch.tensor(lengths, dtype=torch.long)
        starts = (sizes + room).cumsum(dim=0) - sizes - room
        return cls(
            lengths=tuple(lengths),
            starts=tuple(starts.tolist()),
            ends=(starts + sizes).to(device),
            kv_heads=kv_heads,
            width=width,
            room=room,
        )

    @property
    def total(self) -> int:
        """Return the slots of the whole buffer, the room included."""
        return self.starts[-1] + self.lengths[-1] + self.room


@dataclass(frozen=True, eq=False)
class PackedSlots:
    """The slots of one layer as they lie in memory.

    Attributes:
        keys: `(places, head_dim)`.
        values: `(places, head_dim)`.
        layout: which places belong to which head.
        appended: filled slots of each sequence after those that the layout counts.
    """

    keys: Tensor
    values: Tensor
    layout: PackedLayout
    appended: int

    def sequences(self) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
        """Return keys and values of each sequence, views `(1, 1, slots, head_dim)`."""
        free = self.layout.room - self.appended
        sizes = [size for length in self.layout.lengths for size in (length + self.appended, free)]
        keys, values = self.keys[None, None], self.values[None, None]
        return torch.split_with_sizes(keys, sizes, dim=2)[::2], torch.split_with_sizes(values, sizes, dim=2)[::2]


def runs(starts: Sequence[int], lengths: Sequence[int], device: torch.device) -> Tensor:
    """Return the places of several runs, one after the other, `(sum of lengths,)` int64.

    >>> runs([0, 7], [2, 3], torch.device("cpu")).tolist()
    [0, 1, 7, 8, 9]
    """
    sizes = torch.tensor(lengths, dtype=torch.long)
    shifts = torch.tensor(starts, dtype=torch.long) - (sizes.cumsum(dim=0) - sizes)
    return (torch.arange(int(sizes.sum())) + shifts.repeat_interleave(sizes)).to(device)
