"""Stores against a list of lists: whatever is replaced, appended, remembered, selected and moved, in any order."""

from __future__ import annotations

import copy
from typing import Any

import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, initialize, invariant, rule
from kvcomp_strategies.stores.dense import Dense
from kvcomp_strategies.stores.ragged import Ragged
from torch import Tensor

HEAD_DIM = 2
Model = list[list[list[float]]]  # the number of each filled slot, by row and head


class StorageMachine(RuleBasedStateMachine):
    """A store and its model: every slot holds a number that is used once, its value is the negative."""

    store: Any = Ragged(growth=1.5)
    snapshots: Any = Bundle("snapshots")

    @initialize(reserve=st.sampled_from((None, 1, 5)))
    def begin(self, reserve: int | None) -> None:
        """Start with an empty storage, and another that shares its snapshots."""
        self.storage = self.store.open(reserve)
        self.other = self.store.open(reserve)
        self.model: Model = []
        self.width = 0  # slots of the last replace, empty ones included
        self.appended = 0
        self.next = 1.0

    @rule(lengths=st.lists(st.lists(st.integers(1, 6), min_size=3, max_size=3), min_size=1, max_size=3))
    def replace(self, lengths: list[list[int]]) -> None:
        """Hold heads of these lengths."""
        self.width = max(max(row) for row in lengths)
        self.appended = 0
        self.model = [[self._numbers(length) for length in row] for row in lengths]
        mask = torch.tensor([[[place < length for place in range(self.width)] for length in row] for row in lengths])
        keys = torch.full((*mask.shape, HEAD_DIM), 99.0)
        for row, heads in enumerate(self.model):
            for head, numbers in enumerate(heads):
                keys[row, head, : len(numbers)] = torch.tensor(numbers)[:, None]
        self.storage.replace(keys, -keys, None if bool(mask.all()) else mask)

    @rule(tokens=st.integers(1, 4))
    def append(self, tokens: int) -> None:
        """Add as many slots to every head, as the first of all if there are none."""
        if not self.model:
            self.model = [[[], []]]
            self.width, self.appended = tokens, -tokens
        new = [[self._numbers(tokens) for _ in heads] for heads in self.model]
        keys = torch.tensor(new)[..., None].repeat(1, 1, 1, HEAD_DIM)
        self.storage.append(keys, -keys)
        self.model = [
            [held + more for held, more in zip(*pair, strict=True)] for pair in zip(self.model, new, strict=True)
        ]
        self.appended += tokens

    @rule(data=st.data())
    def select(self, data: st.DataObject) -> None:
        """Take some rows, any number of times."""
        if self.model:
            rows = data.draw(st.lists(st.integers(0, len(self.model) - 1), min_size=1, max_size=3))
            self.storage.select(torch.tensor(rows))
            self.model = [copy.deepcopy(self.model[row]) for row in rows]

    @rule()
    def move(self) -> None:
        """Go to where the slots are."""
        self.storage.move(torch.device("cpu"))

    @rule(target=snapshots)
    def snapshot(self) -> Any:
        """Remember everything."""
        return self.storage.snapshot(), copy.deepcopy(self.model), self.width, self.appended

    @rule(snapshot=snapshots, elsewhere=st.booleans())
    def restore(self, snapshot: Any, elsewhere: bool) -> None:
        """Go back to a snapshot, in this storage or in another, which goes on."""
        if elsewhere:
            self.storage, self.other = self.other, self.storage
        held, model, self.width, self.appended = snapshot
        self.storage.restore(held)
        self.model = copy.deepcopy(model)

    @invariant()
    def holds_the_model(self) -> None:
        """Read what the model says, on the axis that the model says, with zeros between where heads are packed."""
        if not getattr(self, "model", None):
            return
        keys, values = self.storage.read()
        assert keys.shape == (len(self.model), len(self.model[0]), self.width + self.appended, HEAD_DIM)
        assert torch.equal(keys, -values)
        for row, heads in enumerate(self.model):
            for head, numbers in enumerate(heads):
                kept = len(numbers) - self.appended
                axis = keys[row, head, :, 0].tolist()
                assert axis[:kept] + axis[self.width :] == numbers
        self._holds_packed(keys)

    def _holds_packed(self, keys: Tensor) -> None:
        packed = self.storage.packed()
        numbers = [numbers for heads in self.model for numbers in heads]
        if packed is None:
            return
        assert packed.appended == self.appended
        assert [view[0, 0, :, 1].tolist() for view in packed.sequences()[0]] == numbers
        assert [view[0, 0, :, 1].tolist() for view in packed.sequences()[1]] == [[-n for n in own] for own in numbers]
        assert int((keys[..., 0] != 0).sum()) == sum(map(len, numbers))
        assert packed.layout.total == packed.keys.shape[0] == packed.values.shape[0]

    def _numbers(self, count: int) -> list[float]:
        self.next += count
        return [self.next - count + place for place in range(count)]


class DenseMachine(StorageMachine):
    """The padded store keeps the same promises."""

    store = Dense(growth=1.5)


TestRagged = StorageMachine.TestCase
TestDense = DenseMachine.TestCase
TestRagged.settings = TestDense.settings = settings(
    max_examples=max(15, settings.default.max_examples), stateful_step_count=20
)
