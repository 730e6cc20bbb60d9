"""Buffers with room to grow, and the storage that appends to them and shares them with snapshots."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from kvcomp.core.packed import PackedSlots
from kvcomp.core.storage import SteadyStorage
from kvcomp.core.types import Guide

FEWEST_NEW = 16  # slots that a full buffer grows by at least


class Buffers(ABC):
    """Keys and values with room for more slots; the first `held` on their axis belong to a snapshot as well."""

    keys: Tensor
    values: Tensor
    held: int

    @property
    @abstractmethod
    def capacity(self) -> int:
        """Return for how many slots there is room on the axis of the longest head."""

    @property
    def frozen(self) -> bool:
        """Return whether the buffers were made in inference mode, and may not be written to outside of it."""
        return self.keys.is_inference() and not torch.is_inference_mode_enabled()

    def nbytes(self) -> int:
        """Return the bytes of the storages."""
        return self.keys.untyped_storage().nbytes() + self.values.untyped_storage().nbytes()

    def mean_slots(self, filled: int) -> int:
        """Return how many slots a head holds on average where the axis is filled so far."""
        return filled

    @abstractmethod
    def shared(self) -> Self:
        """Return the same buffers as something that must not be written to."""

    @abstractmethod
    def grown(self, filled: int, capacity: int) -> Self:
        """Return larger buffers with the filled slots copied."""

    @abstractmethod
    def cleared(self, filled: int) -> PackedSlots | tuple[Tensor, Tensor]:
        """Set the room after the filled slots to zero, and return the memory itself."""

    @abstractmethod
    def write(self, filled: int, keys: Tensor, values: Tensor) -> None:
        """Put `(batch, kv_heads, tokens, head_dim)` after the filled slots."""

    @abstractmethod
    def read(self, filled: int) -> tuple[Tensor, Tensor]:
        """Return keys and values of the filled slots, `(batch, kv_heads, slots, head_dim)`."""

    @abstractmethod
    def select(self, rows: Tensor, filled: int) -> Self:
        """Return buffers of these rows of the batch, with as much room."""

    @abstractmethod
    def move(self, device: torch.device) -> Self:
        """Return the buffers on a device; themselves where they are there."""


@dataclass(frozen=True)
class Growth:
    """How much room an append takes: `reserve` slots the first time where that is enough, else by a factor."""

    factor: float
    reserve: int | None = None

    def room(self, slots: int, new: int, first: bool) -> int:
        """Return how many slots there shall be room for beside `slots`, of which `new` come now."""
        if self.reserve is not None and first and self.reserve >= new:
            return self.reserve
        return max(int((slots + new) * self.factor) - slots, new + FEWEST_NEW - 1)


class BufferedStorage(SteadyStorage):
    """Slots in buffers.

    What is stored by `replace` takes exactly its own bytes. The first append moves it into buffers with room, so that
    later ones copy only what is new.
    """

    def __init__(self, growth: Growth) -> None:
        self._growth = growth
        self._buffers: Buffers | None = None
        self._filled = 0
        self._fresh = True  # nothing was appended to what `replace` left

    @abstractmethod
    def _buffers_of(self, keys: Tensor, values: Tensor, mask: Tensor | None) -> Buffers:
        """Return buffers without room that hold these slots; copies only what shares its storage with something
        else.
        """

    def replace(self, keys: Tensor, values: Tensor, mask: Tensor | None = None, guide: Guide | None = None) -> None:
        """Hold exactly these slots."""
        self._buffers = self._buffers_of(keys, values, mask)
        self._filled = keys.shape[2]
        self._fresh = True

    def append(self, keys: Tensor, values: Tensor) -> None:
        """Add slots at the end, in new buffers where these are full or a snapshot holds what would be overwritten."""
        if self._buffers is None:
            self.replace(keys, values)
            return
        buffers, new = self._buffers, keys.shape[2]
        if self._filled + new > buffers.capacity or self._filled < buffers.held or buffers.frozen:
            room = self._growth.room(buffers.mean_slots(self._filled), new, self._fresh)
            buffers = self._buffers = buffers.grown(self._filled, self._filled + room)
            self._fresh = False
        buffers.write(self._filled, keys, values)
        self._filled += new

    def take_room(self, slots: int) -> PackedSlots | tuple[Tensor, Tensor]:
        """Take room for that many more slots, in buffers that may be written to in any mode, and return them."""
        assert self._buffers is not None
        buffers, more = self._buffers, self._filled + slots
        with torch.inference_mode(mode=False):
            if more > buffers.capacity or self._filled < buffers.held or buffers.keys.is_inference():
                buffers = self._buffers = buffers.grown(self._filled, max(more, buffers.capacity))
            self._fresh = False
            return buffers.cleared(self._filled)

    def count(self, slots: int) -> None:
        """Take note that so many slots were written into the room."""
        self._filled += slots

    def read(self) -> tuple[Tensor, Tensor]:
        """Return keys and values of all slots."""
        assert self._buffers is not None
        return self._buffers.read(self._filled)

    def select(self, rows: Tensor) -> None:
        """Hold these rows, in buffers of their own with as much room."""
        if self._buffers is not None:
            self._buffers = self._buffers.select(rows, self._filled)

    def move(self, device: torch.device) -> None:
        """Hold the slots on a device."""
        if self._buffers is not None:
            self._buffers = self._buffers.move(device)

    def nbytes(self) -> int:
        """Return the bytes of the buffers."""
        return 0 if self._buffers is None else self._buffers.nbytes()

    def snapshot(self) -> tuple[BufferedStorage, Buffers | None, int]:
        """Return whose buffers these are, the buffers, and how much of them is filled."""
        if self._buffers is not None:
            self._buffers.held = max(self._buffers.held, self._filled)
        return self, self._buffers, self._filled

    def restore(self, snapshot: tuple[BufferedStorage, Buffers | None, int]) -> None:
        """Hold the slots of a snapshot; those of another storage are shared and never written to."""
        owner, self._buffers, self._filled = snapshot
        if owner is not self and self._buffers is not None:
            self._buffers = self._buffers.shared()
