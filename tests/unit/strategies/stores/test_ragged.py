"""Heads packed one after the other, each as long as it is."""

from __future__ import annotations

import pytest
import torch
from kvcomp_strategies.stores.ragged import Ragged, RaggedStorage
from pydantic import ValidationError
from torch import Tensor

LENGTHS = [[4, 1, 2], [1, 3, 4]]
SLOTS = sum(map(sum, LENGTHS))
BYTES = 4 * 4 * 2  # of one slot of one head: head_dim, float32, keys and values


def numbered(tokens: int, start: int = 0) -> Tensor:
    """`(2, 3, tokens, 4)`: hundreds count rows and heads, units the slots."""
    heads = torch.arange(1.0, 7.0).view(2, 3, 1, 1) * 100
    return (heads + torch.arange(start, start + tokens)[:, None]).repeat(1, 1, 1, 4)


def filled(reserve: int | None = None, growth: float = 1.25) -> RaggedStorage:
    storage = Ragged(growth=growth).open(reserve)
    mask = torch.arange(4) < torch.tensor(LENGTHS)[..., None]
    storage.replace(numbered(4), -numbered(4), mask)
    return storage


def rows(storage: RaggedStorage) -> list[list[float]]:
    """What each head holds, in memory."""
    packed = storage.packed()
    assert packed is not None
    return [keys[0, 0, :, 0].tolist() for keys in packed.sequences()[0]]


def test_what_is_stored_takes_exactly_its_own_bytes() -> None:
    assert filled().nbytes() == SLOTS * BYTES


def test_heads_lie_one_after_the_other() -> None:
    packed = filled().packed()
    assert packed is not None
    expected = [100, 101, 102, 103, 200, 300, 301, 400, 500, 501, 502, 600, 601, 602, 603]
    assert packed.keys[:, 0].tolist() == expected
    assert packed.values[:, 3].tolist() == [-number for number in expected]
    assert packed.layout.starts == (0, 4, 5, 7, 8, 11)


def test_reading_puts_appended_slots_after_those_of_the_longest_head() -> None:
    storage = filled()
    storage.append(numbered(2, 50), -numbered(2, 50))
    keys, values = storage.read()
    assert keys[0, 1, :, 0].tolist() == [200, 0, 0, 0, 250, 251]
    assert keys[1, 2, :, 0].tolist() == [600, 601, 602, 603, 650, 651]
    assert torch.equal(keys, -values)
    assert rows(storage)[1] == [200, 250, 251]


def test_heads_of_one_length_are_held_as_views() -> None:
    storage = Ragged().open()
    storage.replace(numbered(4), -numbered(4), torch.ones(2, 3, 4, dtype=torch.bool))
    assert storage.packed() is None
    assert storage.read()[0].data_ptr() == storage.read()[0].data_ptr()
    assert storage.nbytes() == 24 * BYTES


def test_appending_writes_in_place_and_takes_room_for_the_mean_head() -> None:
    storage, places = filled(growth=2.0), set()
    for token in range(100):
        storage.append(numbered(1, token), -numbered(1, token))
        packed = storage.packed()
        assert packed is not None
        places.add(packed.keys.data_ptr())
    assert len(places) <= 6
    assert rows(storage)[1] == [200, *(200 + token for token in range(100))]
    assert storage.nbytes() <= 2.1 * (SLOTS + 600) * BYTES


def test_reserved_room_is_taken_at_the_first_append_and_exactly() -> None:
    storage = filled(reserve=30)
    assert storage.nbytes() == SLOTS * BYTES
    storage.append(numbered(1), -numbered(1))
    assert storage.nbytes() == (SLOTS + 6 * 30) * BYTES
    for token in range(29):
        storage.append(numbered(1, token), -numbered(1, token))
    assert storage.nbytes() == (SLOTS + 6 * 30) * BYTES


def test_a_snapshot_shares_memory_and_is_not_overwritten() -> None:
    storage = filled(reserve=8)
    storage.append(numbered(1, 10), -numbered(1, 10))
    trunk, held = storage.snapshot(), rows(storage)
    before = storage.packed()
    storage.append(numbered(1, 11), -numbered(1, 11))
    branch, longer = storage.snapshot(), rows(storage)
    storage.restore(trunk)
    after = storage.packed()
    assert before is not None
    assert after is not None
    assert after.keys.data_ptr() == before.keys.data_ptr()
    storage.append(numbered(1, 12), -numbered(1, 12))
    assert rows(storage)[0][-1] == 112
    storage.restore(branch)
    assert rows(storage) == longer
    other = Ragged().open()
    other.restore(trunk)
    other.append(numbered(1, 13), -numbered(1, 13))
    storage.restore(trunk)
    assert rows(storage) == held


def test_two_storages_go_on_from_one_snapshot_without_meeting() -> None:
    storage, other = filled(reserve=8), Ragged().open()
    storage.append(numbered(1, 10), -numbered(1, 10))
    other.restore(storage.snapshot())
    storage.append(numbered(1, 11), -numbered(1, 11))
    other.append(numbered(1, 12), -numbered(1, 12))
    assert rows(storage)[1] == [200, 210, 211]
    assert rows(other)[1] == [200, 210, 212]


def test_branches_of_one_storage_do_not_overwrite_each_other() -> None:
    storage = filled(reserve=8)
    storage.append(numbered(1, 10), -numbered(1, 10))
    trunk = storage.snapshot()
    storage.append(numbered(1, 11), -numbered(1, 11))
    branch = storage.snapshot()
    storage.restore(trunk)
    storage.append(numbered(1, 12), -numbered(1, 12))
    storage.restore(branch)
    assert rows(storage)[1] == [200, 210, 211]


def test_rows_are_taken_with_their_room() -> None:
    storage = filled(reserve=4)
    storage.append(numbered(1, 10), -numbered(1, 10))
    storage.select(torch.tensor([1, 1]))
    assert rows(storage) == [[400, 410], [500, 501, 502, 510], [600, 601, 602, 603, 610]] * 2
    assert storage.nbytes() == (2 * 8 + 6 * 4) * BYTES
    storage.append(numbered(3, 20), -numbered(3, 20))
    assert rows(storage)[0] == [400, 410, 120, 121, 122]


def test_what_the_caller_holds_stays() -> None:
    keys = numbered(4)
    storage = Ragged().open()
    storage.replace(keys, -keys, torch.arange(4) < torch.tensor(LENGTHS)[..., None])
    storage.append(numbered(2), -numbered(2))
    assert torch.equal(keys, numbered(4))


def test_slots_move_to_a_device_and_back() -> None:
    storage = filled()
    before = rows(storage)
    storage.move(torch.device("meta"))
    packed = storage.packed()
    assert packed is not None
    assert {packed.keys.device.type, packed.values.device.type, packed.layout.ends.device.type} == {"meta"}
    storage = filled()
    storage.move(torch.device("cpu"))
    assert rows(storage) == before


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_the_dtype_stays(dtype: torch.dtype) -> None:
    storage = Ragged().open()
    half = numbered(4).to(dtype)
    storage.replace(half, half, torch.arange(4) < torch.tensor(LENGTHS)[..., None])
    storage.append(half, half)
    assert storage.read()[0].dtype == dtype


@pytest.mark.parametrize("growth", [1.0, 0.5, 4.1], ids=str)
def test_a_growth_that_does_not_grow_is_refused(growth: float) -> None:
    with pytest.raises(ValidationError):
        Ragged(growth=growth)
