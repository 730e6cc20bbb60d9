"""One buffer for keys and one for values, with room to grow."""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor

from kvcomp.core.interfaces import SlotStorage, Store


class DenseStorage(SlotStorage):
    """Keys and values of all heads padded to the longest, `(batch, kv_heads, capacity, head_dim)` each.

    What is stored by `replace` takes exactly its own bytes. The first append moves it into a buffer with room, so
    that later ones copy only what is new.
    """

    def __init__(self, growth: float, reserve: int | None) -> None:
        self._growth = growth
        self._reserve = reserve
        self._keys: Tensor | None = None
        self._values: Tensor | None = None
        self._filled = 0

    def replace(self, keys: Tensor, values: Tensor) -> None:
        """Hold exactly these slots; copies only what shares its storage with something else."""
        self._keys, self._values = _owned(keys), _owned(values)
        self._filled = keys.shape[2]

    def append(self, keys: Tensor, values: Tensor) -> None:
        """Add slots at the end, growing the buffers where they are full."""
        if self._keys is None or self._values is None:
            self.replace(keys, values)
            return
        end = self._filled + keys.shape[2]
        if end > self._keys.shape[2]:
            room = self._room(end)
            self._keys, self._values = self._grown(self._keys, room), self._grown(self._values, room)
        self._keys[:, :, self._filled : end] = keys
        self._values[:, :, self._filled : end] = values
        self._filled = end

    def read(self) -> tuple[Tensor, Tensor]:
        """Return views of the filled slots."""
        assert self._keys is not None
        assert self._values is not None
        return self._keys[:, :, : self._filled], self._values[:, :, : self._filled]

    def nbytes(self) -> int:
        """Return the bytes of both buffers."""
        return sum(part.untyped_storage().nbytes() for part in (self._keys, self._values) if part is not None)

    def _room(self, end: int) -> int:
        if self._reserve is not None and self._reserve >= end - self._filled:
            room, self._reserve = self._filled + self._reserve, None
            return room
        return max(end, int(end * self._growth), end + 15)

    def _grown(self, buffer: Tensor, room: int) -> Tensor:
        grown = buffer.new_empty(*buffer.shape[:2], room, buffer.shape[3])
        grown[:, :, : self._filled] = buffer[:, :, : self._filled]
        return grown


class Dense(Store, use="dense"):
    """Hold slots in full precision, heads that keep fewer padded to the longest.

    Attributes:
        growth: factor by which a full buffer grows, so that appending copies each slot a bounded number of times.
    """

    growth: float = Field(default=1.25, gt=1.0, le=4.0)

    def open(self, reserve: int | None = None) -> DenseStorage:
        """Return an empty storage; with `reserve`, the first append takes room for that many slots."""
        return DenseStorage(self.growth, reserve)


def _owned(tensor: Tensor) -> Tensor:
    """Return the tensor itself where its storage holds nothing else, else a contiguous copy."""
    alone = tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()
    return tensor if alone else tensor.clone(memory_format=torch.contiguous_format)
