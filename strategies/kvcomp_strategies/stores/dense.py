"""One buffer for keys and one for values, heads that keep fewer padded to the longest."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from pydantic import Field
from torch import Tensor

from kvcomp.core.interfaces import Store
from kvcomp_strategies.stores.buffers import BufferedStorage, Buffers, Growth


@dataclass(eq=False)
class DenseBuffers(Buffers):
    """Keys and values `(batch, kv_heads, capacity, head_dim)`."""

    keys: Tensor
    values: Tensor
    held: int = 0

    @property
    def capacity(self) -> int:
        """Return for how many slots there is room."""
        return self.keys.shape[2]

    def shared(self) -> DenseBuffers:
        """Return the same buffers as something that must not be written to."""
        return DenseBuffers(self.keys, self.values, held=self.capacity + 1)

    def grown(self, filled: int, capacity: int) -> DenseBuffers:
        """Return larger buffers with the filled slots copied."""
        return DenseBuffers(_grown(self.keys, filled, capacity), _grown(self.values, filled, capacity))

    def cleared(self, filled: int) -> tuple[Tensor, Tensor]:
        """Set the room to zero and return the buffers."""
        self.keys[:, :, filled:] = 0
        self.values[:, :, filled:] = 0
        return self.keys, self.values

    def write(self, filled: int, keys: Tensor, values: Tensor) -> None:
        """Put slots after the filled ones."""
        self.keys[:, :, filled : filled + keys.shape[2]] = keys
        self.values[:, :, filled : filled + keys.shape[2]] = values

    def read(self, filled: int) -> tuple[Tensor, Tensor]:
        """Return views of the filled slots."""
        return self.keys[:, :, :filled], self.values[:, :, :filled]

    def select(self, rows: Tensor, filled: int) -> DenseBuffers:
        """Return buffers of these rows, with as much room."""
        return DenseBuffers(self.keys.index_select(0, rows), self.values.index_select(0, rows))

    def move(self, device: torch.device) -> DenseBuffers:
        """Return the buffers on a device; themselves where they are there."""
        return self if self.keys.device == device else DenseBuffers(self.keys.to(device), self.values.to(device))


class DenseStorage(BufferedStorage):
    """Keys and values of all heads padded to the longest."""

    def _buffers_of(self, keys: Tensor, values: Tensor, mask: Tensor | None) -> DenseBuffers:
        return DenseBuffers(owned(keys), owned(values))


class Dense(Store, use="dense"):
    """Hold slots in full precision, heads that keep fewer padded to the longest.

    Attributes:
        growth: factor by which a full buffer grows, so that appending copies each slot a bounded number of times.
    """

    growth: float = Field(default=1.25, gt=1.0, le=4.0)

    def open(self, reserve: int | None = None) -> DenseStorage:
        """Return an empty storage; with `reserve`, the first append takes room for that many slots."""
        return DenseStorage(Growth(self.growth, reserve))


def owned(tensor: Tensor) -> Tensor:
    """Return the tensor itself where its storage holds nothing else, else a contiguous copy."""
    alone = tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()
    return tensor if alone else tensor.clone(memory_format=torch.contiguous_format)


def _grown(buffer: Tensor, filled: int, capacity: int) -> Tensor:
    grown = buffer.new_empty(*buffer.shape[:2], capacity, buffer.shape[3])
    grown[:, :, :filled] = buffer[:, :, :filled]
    return grown
