"""What a store opens: the keys and values of one layer, as they lie in memory."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from kvcomp.core.errors import InputError
from kvcomp.core.packed import PackedSlots
from kvcomp.core.types import Guide


class SlotStorage(ABC):
    """The keys and values of one layer of one request: the mutable object that a `Store` opens.

    Its slots lie on one axis: those of the last `replace`, empty ones included, then what was appended.
    """

    @abstractmethod
    def replace(self, keys: Tensor, values: Tensor, mask: Tensor | None = None, guide: Guide | None = None) -> None:
        """Hold exactly these slots, `(batch, kv_heads, slots, head_dim)` each, and nothing else.

        Args:
            keys: of the slots.
            values: of the slots.
            mask: `(batch, kv_heads, slots)` bool, false at the end of heads that keep fewer; None where all are full.
            guide: what a compression knows of the slots; None where nothing was compressed: then they are held as
                precisely as those that were there.
        """

    @abstractmethod
    def append(self, keys: Tensor, values: Tensor) -> None:
        """Add slots at the end, `(batch, kv_heads, tokens, head_dim)`, the same number for every head."""

    def removable(self) -> int | None:
        """Return how many slots at the end can go without a change of those that stay; None where `replace` holds what
        it is given exactly, so that any can.

        Stores that do not hold slots as they came override it, with `shorten`.
        """
        return None

    def shorten(self, slots: int) -> None:
        """Let go of the last slots of every head, at most as many as are `removable`; the others stay bit for bit."""
        raise AssertionError("a storage that says what is removable can let go of it")

    @abstractmethod
    def read(self) -> tuple[Tensor, Tensor]:
        """Return keys and values of all slots, `(batch, kv_heads, slots, head_dim)`; what empty slots hold is finite
        and means nothing. Views where the store can give them.
        """

    @abstractmethod
    def select(self, rows: Tensor) -> None:
        """Hold these rows of the batch, `(rows,)` int64 on the device of the slots, in this order, and no others."""

    @abstractmethod
    def move(self, device: torch.device) -> None:
        """Hold the slots on a device."""

    def packed(self) -> PackedSlots | None:
        """Return the slots as they lie in memory where heads hold different numbers and `read` would copy them; None
        where attention is to run over what `read` returns.
        """
        return None

    @abstractmethod
    def nbytes(self) -> int:
        """Return the bytes of all storages of keys and values held, filled or not, read from the storages."""

    def filled_nbytes(self, slots: int, slot_bytes: int) -> int:
        """Return the bytes of keys and values in the filled slots alone.

        Args:
            slots: filled slots of all rows and heads.
            slot_bytes: of one slot of one head, as it came in. Stores that make slots smaller do not multiply.
        """
        return slots * slot_bytes

    def dump(self) -> tuple[dict[str, Tensor], Any]:
        """Return what a file must hold: tensors by name, and plain data, None where keys and values are all there is.

        Stores that do not hold slots as they came override it, with `load`.
        """
        keys, values = self.read()
        return {"keys": keys, "values": values}, None

    def load(self, tensors: Mapping[str, Tensor], data: Any) -> None:
        """Hold what `dump` returned.

        Raises:
            InputError: it is not of a store like this one.
        """
        if data is not None:
            raise InputError(f"{type(self).__name__} holds slots as they came, and the file describes codes")
        self.replace(tensors["keys"], tensors["values"])

    @abstractmethod
    def snapshot(self) -> Any:
        """Return what `restore` needs to hold these slots again, sharing their memory: later appends leave it alone."""

    @abstractmethod
    def restore(self, snapshot: Any) -> None:
        """Hold the slots of a snapshot, which can be restored any number of times."""


class SteadyStorage(SlotStorage):
    """A storage whose slots stay in their place, as they are, while others are appended: what a compiled decode step
    needs.
    """

    @abstractmethod
    def take_room(self, slots: int) -> PackedSlots | tuple[Tensor, Tensor]:
        """Take room for that many more slots and return the memory itself, which stays until something is replaced:
        keys and values `(batch, kv_heads, capacity, head_dim)`, or where heads are packed their places.

        The room is finite and may be written to in any mode. The caller writes, and tells by `count` how many slots.
        """

    @abstractmethod
    def count(self, slots: int) -> None:
        """Take note that so many slots were written into the room, after those that were filled."""
