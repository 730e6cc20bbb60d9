"""Stores against a list of lists: whatever is replaced, appended, remembered, selected and moved, in any order."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from kvcomp_strategies.stores.dense import Dense
from kvcomp_strategies.stores.ragged import Ragged

from kvcomp.core.storage import SlotStorage

HEAD_DIM = 2
MOST_SNAPSHOTS = 4


@dataclass(frozen=True)
class Model:
    """What a storage holds: the number of each filled slot by row and head, of which the last `appended` were added to
    an axis of `width` slots.
    """

    rows: tuple[tuple[tuple[float, ...], ...], ...] = ()
    width: int = 0
    appended: int = 0

    def check(self, storage: SlotStorage) -> None:
        """Compare with a storage, as it is read and as its heads are packed."""
        if not self.rows:
            return
        keys, values = storage.read()
        assert keys.shape == (len(self.rows), len(self.rows[0]), self.width + self.appended, HEAD_DIM)
        assert torch.equal(keys, -values)
        for row, heads in enumerate(self.rows):
            for head, numbers in enumerate(heads):
                axis, kept = keys[row, head, :, 0].tolist(), len(numbers) - self.appended
                assert axis[:kept] + axis[self.width :] == list(numbers)
        if (packed := storage.packed()) is not None:
            numbers = [list(numbers) for heads in self.rows for numbers in heads]
            assert packed.appended == self.appended
            assert [view[0, 0, :, 1].tolist() for view in packed.sequences()[0]] == numbers
            assert [(-view[0, 0, :, 1]).tolist() for view in packed.sequences()[1]] == numbers
            assert int((keys[..., 0] != 0).sum()) == sum(map(len, numbers))
            assert packed.layout.total == packed.keys.shape[0] == packed.values.shape[0]


@dataclass
class Holder:
    """A storage and what it should hold."""

    storage: SlotStorage
    model: Model = field(default_factory=Model)


class StorageMachine(RuleBasedStateMachine):
    """Two storages that take each other's snapshots. Every slot holds a number that is used once, its value minus
    that number.
    """

    store: Any = Ragged(growth=1.5)

    @initialize(reserve=st.sampled_from((None, 1, 5)))
    def begin(self, reserve: int | None) -> None:
        """Start with nothing."""
        self.holders = [Holder(self.store.open(reserve)) for _ in range(2)]
        self.snapshots: list[tuple[Any, Model]] = []
        self.next = 1.0

    @rule(lengths=st.lists(st.lists(st.integers(1, 5), min_size=2, max_size=2), min_size=1, max_size=2))
    def replace(self, lengths: list[list[int]]) -> None:
        """Hold heads of these lengths in the first storage."""
        width = max(max(row) for row in lengths)
        rows = tuple(tuple(self._numbers(length) for length in row) for row in lengths)
        mask = torch.arange(width) < torch.tensor(lengths)[..., None]
        keys = torch.full((*mask.shape, HEAD_DIM), 99.0)
        keys[mask] = torch.tensor([number for heads in rows for numbers in heads for number in numbers])[:, None]
        self.holders[0].storage.replace(keys, -keys, None if bool(mask.all()) else mask)
        self.holders[0].model = Model(rows, width)

    @rule(source=st.integers(0, 1), other=st.integers(0, 1), tokens=st.integers(1, 3))
    def branch(self, source: int, other: int, tokens: int) -> None:
        """Go on from one snapshot twice, in one storage or in both."""
        self.snapshot(source)
        held, model = self.snapshots[-1]
        self.append(source, tokens)
        self.snapshot(source)
        self.holders[other].storage.restore(held)
        self.holders[other].model = model
        self.append(other, tokens)

    @rule(place=st.integers(0, 1), tokens=st.integers(1, 3))
    def append(self, place: int, tokens: int) -> None:
        """Add as many slots to every head; to a storage without any, as its first."""
        holder = self.holders[place]
        before = holder.model if holder.model.rows else Model((((), ()),), width=tokens, appended=-tokens)
        new = [[self._numbers(tokens) for _ in heads] for heads in before.rows]
        keys = torch.tensor(new)[..., None].repeat(1, 1, 1, HEAD_DIM)
        holder.storage.append(keys, -keys)
        rows = tuple(
            tuple(held + more for held, more in zip(heads, added, strict=True))
            for heads, added in zip(before.rows, new, strict=True)
        )
        holder.model = replace(before, rows=rows, appended=before.appended + tokens)

    @rule(place=st.integers(0, 1), data=st.data())
    def select(self, place: int, data: st.DataObject) -> None:
        """Take some rows, any number of times."""
        holder = self.holders[place]
        if holder.model.rows:
            rows = data.draw(st.lists(st.integers(0, len(holder.model.rows) - 1), min_size=1, max_size=2))
            holder.storage.select(torch.tensor(rows))
            holder.model = replace(holder.model, rows=tuple(holder.model.rows[row] for row in rows))

    @rule(place=st.integers(0, 1))
    def move(self, place: int) -> None:
        """Go to where the slots are."""
        self.holders[place].storage.move(torch.device("cpu"))

    @rule(place=st.integers(0, 1))
    def snapshot(self, place: int) -> None:
        """Remember everything, and of snapshots the latest."""
        holder = self.holders[place]
        self.snapshots = [*self.snapshots, (holder.storage.snapshot(), holder.model)][-MOST_SNAPSHOTS:]

    @precondition(lambda self: self.snapshots)
    @rule(place=st.integers(0, 1), data=st.data())
    def restore(self, place: int, data: st.DataObject) -> None:
        """Go back to a snapshot, perhaps of the other storage."""
        held, model = data.draw(st.sampled_from(self.snapshots))
        self.holders[place].storage.restore(held)
        self.holders[place].model = model

    @invariant()
    def everything_is_held(self) -> None:
        """Check both storages, and every snapshot in a storage of its own."""
        for holder in getattr(self, "holders", []):
            holder.model.check(holder.storage)
        for held, model in getattr(self, "snapshots", []):
            probe = self.store.open()
            probe.restore(held)
            model.check(probe)

    def _numbers(self, count: int) -> tuple[float, ...]:
        self.next += count
        return tuple(self.next - count + place for place in range(count))


class DenseMachine(StorageMachine):
    """The padded store keeps the same promises."""

    store = Dense(growth=1.5)


TestRagged = StorageMachine.TestCase
TestDense = DenseMachine.TestCase
TestRagged.settings = TestDense.settings = settings(
    max_examples=max(30, settings.default.max_examples), stateful_step_count=25
)
