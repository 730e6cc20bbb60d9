"""One buffer for keys and one for values, with room to grow."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from pydantic import Field
from torch import Tensor

from kvcomp.core.interfaces import SlotStorage, Store
from kvcomp.core.types import Guide


@dataclass(eq=False)
class Buffers:
    """Keys and values `(batch, kv_heads, capacity, head_dim)`; the first `held` slots belong to a snapshot as well."""

    keys: Tensor
    values: Tensor
    held: int = 0

    @property
    def capacity(self) -> int:
        """Return for how many slots there is room."""
        return self.keys.shape[2]

    @property
    def frozen(self) -> bool:
        """Return whether the buffers were made in inference mode, and may not be written to outside of it."""
        return self.keys.is_inference() and not torch.is_inference_mode_enabled()

    def grown(self, filled: int, capacity: int) -> Buffers:
        """Return larger buffers with the filled slots copied."""
        return Buffers(_grown(self.keys, filled, capacity), _grown(self.values, filled, capacity))


class DenseStorage(SlotStorage):
    """Keys and values of all heads padded to the longest.

    What is stored by `replace` takes exactly its own bytes. The first append moves it into buffers with room, so that
    later ones copy only what is new.
    """

    def __init__(self, growth: float, reserve: int | None) -> None:
        self._growth = growth
        self._reserve = reserve
        self._buffers: Buffers | None = None
        self._filled = 0
        self._fresh = True  # nothing was appended to what `replace` left

    def replace(self, keys: Tensor, values: Tensor, mask: Tensor | None = None, guide: Guide | None = None) -> None:
        """Hold these slots, the empty ones too; copies only what shares its storage with something else."""
        self._buffers = Buffers(_owned(keys), _owned(values))
        self._filled = keys.shape[2]
        self._fresh = True

    def append(self, keys: Tensor, values: Tensor) -> None:
        """Add slots at the end, in new buffers where these are full or a snapshot holds what would be overwritten."""
        if self._buffers is None:
            self.replace(keys, values)
            return
        end = self._filled + keys.shape[2]
        if end > self._buffers.capacity or self._filled < self._buffers.held or self._buffers.frozen:
            self._buffers = self._buffers.grown(self._filled, self._room(end))
            self._fresh = False
        self._buffers.keys[:, :, self._filled : end] = keys
        self._buffers.values[:, :, self._filled : end] = values
        self._filled = end

    def read(self) -> tuple[Tensor, Tensor]:
        """Return views of the filled slots."""
        assert self._buffers is not None
        return self._buffers.keys[:, :, : self._filled], self._buffers.values[:, :, : self._filled]

    def select(self, rows: Tensor) -> None:
        """Hold these rows, in buffers of their own with as much room."""
        self._map(lambda buffer: buffer.index_select(0, rows))

    def move(self, device: torch.device) -> None:
        """Hold the buffers on a device."""
        self._map(lambda buffer: buffer.to(device))

    def nbytes(self) -> int:
        """Return the bytes of both buffers."""
        if self._buffers is None:
            return 0
        return self._buffers.keys.untyped_storage().nbytes() + self._buffers.values.untyped_storage().nbytes()

    def snapshot(self) -> tuple[DenseStorage, Buffers | None, int]:
        """Return whose buffers these are, the buffers, and how much of them is filled."""
        if self._buffers is not None:
            self._buffers.held = max(self._buffers.held, self._filled)
        return self, self._buffers, self._filled

    def restore(self, snapshot: tuple[DenseStorage, Buffers | None, int]) -> None:
        """Hold the slots of a snapshot; those of another storage are shared and never written to."""
        owner, self._buffers, self._filled = snapshot
        if owner is not self and self._buffers is not None:
            self._buffers = Buffers(self._buffers.keys, self._buffers.values, held=self._buffers.capacity + 1)

    def _map(self, change: Callable[[Tensor], Tensor]) -> None:
        if self._buffers is not None:
            keys, values = change(self._buffers.keys), change(self._buffers.values)
            shared = keys is self._buffers.keys
            self._buffers = Buffers(keys, values, self._buffers.held if shared else 0)

    def _room(self, end: int) -> int:
        if self._reserve is not None and self._fresh and self._reserve >= end - self._filled:
            return self._filled + self._reserve
        return max(end, int(end * self._growth), end + 15)


class Dense(Store, use="dense"):
    """Hold slots in full precision, heads that keep fewer padded to the longest.

    Attributes:
        growth: factor by which a full buffer grows, so that appending copies each slot a bounded number of times.
    """

    growth: float = Field(default=1.25, gt=1.0, le=4.0)

    def open(self, reserve: int | None = None) -> DenseStorage:
        """Return an empty storage; with `reserve`, the first append takes room for that many slots."""
        return DenseStorage(self.growth, reserve)


def _grown(buffer: Tensor, filled: int, capacity: int) -> Tensor:
    grown = buffer.new_empty(*buffer.shape[:2], capacity, buffer.shape[3])
    grown[:, :, :filled] = buffer[:, :, :filled]
    return grown


def _owned(tensor: Tensor) -> Tensor:
    """Return the tensor itself where its storage holds nothing else, else a contiguous copy."""
    alone = tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()
    return tensor if alone else tensor.clone(memory_format=torch.contiguous_format)
