"""One buffer for keys and one for values, with room to grow."""

from __future__ import annotations

import pytest
import torch
from kvcomp_strategies.stores.dense import Dense, DenseStorage
from pydantic import ValidationError
from torch import Tensor


def slots(count: int, start: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """`(2, 3, count, 4)` with the number of each slot in all of its coordinates."""
    return torch.arange(start, start + count, dtype=dtype)[None, None, :, None].repeat(2, 3, 1, 4)


def filled(count: int, reserve: int | None = None, growth: float = 1.25) -> DenseStorage:
    storage = Dense(growth=growth).open(reserve)
    storage.replace(slots(count), -slots(count))
    return storage


def numbers(storage: DenseStorage) -> list[float]:
    keys, values = storage.read()
    assert torch.equal(keys, -values)
    return keys[1, 2, :, 3].tolist()


BYTES = 2 * 3 * 4 * 4 * 2  # of one slot: rows, heads, head_dim, float32, keys and values


def test_what_is_stored_takes_exactly_its_own_bytes() -> None:
    assert filled(10).nbytes() == 10 * BYTES


def test_a_view_of_something_larger_is_copied() -> None:
    everything = slots(100)
    storage = Dense().open()
    storage.replace(everything[:, :, :5], everything[:, :, 5:10])
    assert storage.nbytes() == 5 * BYTES


def test_an_expanded_tensor_is_copied() -> None:
    storage = Dense().open()
    storage.replace(torch.ones(1, 1, 1, 4).expand(2, 3, 5, 4), torch.ones(1, 1, 1, 4).expand(2, 3, 5, 4))
    storage.append(slots(1), slots(1))
    assert storage.read()[0][0, 0, :, 0].tolist() == [1, 1, 1, 1, 1, 0]


def test_appended_slots_follow_in_order() -> None:
    storage = filled(4)
    for number in range(4, 60):
        storage.append(slots(1, number), -slots(1, number))
    assert numbers(storage) == list(range(60))


def test_appending_copies_each_slot_a_bounded_number_of_times() -> None:
    storage, moves = filled(100), 0
    place = storage.read()[0].data_ptr()
    for number in range(1000):
        storage.append(slots(1, number), -slots(1, number))
        moves += storage.read()[0].data_ptr() != place
        place = storage.read()[0].data_ptr()
    assert 1 <= moves <= 12  # log(11) / log(1.25) = 10.7


@pytest.mark.parametrize("growth", [1.1, 1.25, 2.0])
def test_room_is_at_most_the_growth_or_a_few_slots(growth: float) -> None:
    storage = filled(200, growth=growth)
    storage.append(slots(1), -slots(1))
    assert 201 * BYTES <= storage.nbytes() <= max(201 * growth, 201 + 16) * BYTES


def test_reserved_room_is_taken_at_the_first_append_and_exactly() -> None:
    storage = filled(10, reserve=30)
    assert storage.nbytes() == 10 * BYTES
    storage.append(slots(1, 10), -slots(1, 10))
    assert storage.nbytes() == 40 * BYTES
    place = storage.read()[0].data_ptr()
    for number in range(11, 40):
        storage.append(slots(1, number), -slots(1, number))
    assert storage.read()[0].data_ptr() == place
    assert numbers(storage) == list(range(40))
    storage.append(slots(1, 40), -slots(1, 40))
    assert numbers(storage) == list(range(41))


def test_more_than_was_reserved_still_fits() -> None:
    storage = filled(2, reserve=3)
    storage.append(slots(8, 2), -slots(8, 2))
    assert numbers(storage) == list(range(10))


def test_the_first_append_may_come_before_any_replace() -> None:
    storage = Dense().open()
    storage.append(slots(3), -slots(3))
    assert numbers(storage) == [0, 1, 2]
    assert storage.nbytes() == 3 * BYTES


def test_reserve_counts_when_the_first_append_fills_an_empty_storage() -> None:
    storage = Dense().open(reserve=20)
    storage.append(slots(3), -slots(3))
    storage.append(slots(1, 3), -slots(1, 3))
    place = storage.read()[0].data_ptr()
    for number in range(4, 20):
        storage.append(slots(1, number), -slots(1, number))
    assert storage.read()[0].data_ptr() == place


def test_replace_forgets_what_was_there() -> None:
    storage = filled(4)
    storage.append(slots(6, 4), -slots(6, 4))
    storage.replace(slots(2, 7), -slots(2, 7))
    assert numbers(storage) == [7, 8]
    assert storage.nbytes() == 2 * BYTES


def test_appending_does_not_write_into_what_the_caller_holds() -> None:
    keys, values = slots(3), -slots(3)
    storage = Dense().open()
    storage.replace(keys, values)
    storage.append(slots(2, 3), -slots(2, 3))
    assert keys.shape[2] == 3
    assert torch.equal(keys, slots(3))


def test_reading_gives_views() -> None:
    storage = filled(5)
    assert storage.read()[0].data_ptr() == storage.read()[0].data_ptr()
    storage.append(slots(1), -slots(1))
    assert storage.read()[0].untyped_storage().nbytes() * 2 == storage.nbytes()


def test_the_dtype_stays() -> None:
    storage = Dense().open()
    half = slots(2, dtype=torch.bfloat16)
    storage.replace(half, half)
    storage.append(half, half)
    assert storage.read()[0].dtype == torch.bfloat16


def test_rows_come_in_any_order_and_number_with_as_much_room() -> None:
    storage = filled(4, reserve=6)
    storage.append(slots(1, 4), -slots(1, 4))
    storage.select(torch.tensor([1, 1, 0]))
    assert numbers(storage) == [0, 1, 2, 3, 4]
    assert storage.read()[0].shape == (3, 3, 5, 4)
    assert storage.nbytes() == 10 * BYTES * 3 // 2
    place = storage.read()[0].data_ptr()
    storage.append(slots(1)[[0, 0, 0]], slots(1)[[0, 0, 0]])
    assert storage.read()[0].data_ptr() == place


def test_rows_that_are_taken_leave_a_snapshot_alone() -> None:
    storage = filled(4)
    snapshot = storage.snapshot()
    storage.select(torch.tensor([1]))
    storage.append(slots(2, 4)[:1], slots(2, 4)[:1])
    storage.restore(snapshot)
    assert numbers(storage) == [0, 1, 2, 3]


def test_moving_to_where_it_is_changes_nothing() -> None:
    storage = filled(4)
    place = storage.read()[0].data_ptr()
    storage.move(torch.device("cpu"))
    assert storage.read()[0].data_ptr() == place
    Dense().open().move(torch.device("cpu"))


def test_an_empty_storage_holds_no_bytes() -> None:
    assert Dense().open().nbytes() == 0


@pytest.mark.parametrize("growth", [1.0, 0.5, 4.1], ids=str)
def test_a_growth_that_does_not_grow_is_refused(growth: float) -> None:
    with pytest.raises(ValidationError):
        Dense(growth=growth)
