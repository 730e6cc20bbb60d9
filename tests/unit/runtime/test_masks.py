"""From masks over columns to masks over slots."""

import pytest
import torch

from kvcomp.runtime.masks import (
    over_filled,
    over_sequences,
    over_slots,
    row_validity,
    shown_columns,
    visible,
    with_mass,
)
from kvcomp.runtime.slots import SlotTable

LOWEST = torch.finfo(torch.float32).min


def _table(columns: list[list[int]], mask: list[list[bool]] | None = None) -> SlotTable:
    """Return a table of one row with these columns per KV head."""
    entries = torch.tensor([columns], dtype=torch.int32)
    filled = None if mask is None else torch.tensor([mask])
    return SlotTable(entries, entries.clone(), torch.ones(entries.shape), entries.char() * 0, entries[None], filled)


def test_the_columns_of_each_heads_slots_are_gathered():
    mask = torch.tensor([[[[True, False, True, True], [False, True, False, True]]]])
    slots = over_slots(mask, _table([[0, 3], [1, 2]]), queries=2, seen=2, group=2)
    assert slots.tolist() == [[[[1, 1], [0, 1]], [[1, 1], [0, 1]], [[0, 1], [1, 0]], [[0, 1], [1, 0]]]]


def test_empty_slots_are_hidden_in_bool_and_additive_masks():
    table = _table([[0, 2], [1, 0]], mask=[[True, True], [True, False]])
    assert over_slots(torch.ones(1, 1, 1, 3, dtype=torch.bool), table, 1, 2, 1)[0, 1, 0].tolist() == [True, False]
    assert over_slots(torch.zeros(1, 1, 1, 3), table, 1, 2, 1)[0, 1, 0].tolist() == [0.0, LOWEST]
    assert over_slots(None, table, 1, 2, 1)[0, :, 0].tolist() == [[True, True], [True, False]]


def test_without_a_mask_several_queries_are_causal_by_columns():
    slots = over_slots(None, _table([[0, 4, 5, 6]]), queries=2, seen=5, group=1)
    assert slots[0, 0].tolist() == [[True, True, True, False], [True, True, True, True]]


def test_one_query_that_sees_every_slot_needs_no_mask():
    assert over_slots(None, _table([[0, 4]]), queries=1, seen=5, group=4) is None


def test_padding_is_read_from_the_last_query():
    mask = torch.ones(2, 1, 3, 3, dtype=torch.bool).tril()
    assert row_validity(mask, 2, 3) is None
    mask[1, :, :, 0] = False
    assert row_validity(mask, 2, 3).tolist() == [[True, True, True], [False, True, True]]
    additive = torch.zeros(mask.shape).masked_fill(~mask, LOWEST)
    assert torch.equal(visible(additive), mask)
    assert torch.equal(row_validity(additive, 2, 3), row_validity(mask, 2, 3))


def test_columns_that_the_last_query_sees_are_counted_once_for_all_layers():
    mask = torch.ones(2, 1, 3, 4, dtype=torch.bool).tril(1)
    mask[1, :, :, :2] = False
    assert shown_columns(mask).tolist() == [4, 2]
    assert shown_columns(torch.zeros(mask.shape).masked_fill(~mask, LOWEST)).tolist() == [4, 2]
    assert shown_columns(mask) is shown_columns(mask)


@pytest.mark.parametrize("like", [None, torch.ones(1, 1, 1, 4) > 0, torch.zeros(1, 1, 1, 4)])
def test_a_query_that_sees_all_is_kept_from_empty_slots_alone(like):
    table = _table([[0, 2], [1, 0]], mask=[[True, True], [True, False]])
    places = table.places.then(3, 1)
    expected = over_slots(None if like is None else like, places, queries=1, seen=3, group=2)
    shown = over_filled(table.mask, 1, 2, like)
    assert shown.dtype == expected.dtype
    assert torch.equal(shown, expected)


def test_mass_is_the_logarithm_of_the_count():
    counts = torch.tensor([[[1.0, 4.0]]])
    bias = with_mass(None, counts, group=2, dtype=torch.float32)
    assert torch.allclose(bias, torch.tensor([0.0, 4.0]).clamp(min=1).log().expand(1, 2, 1, 2))
    hidden = with_mass(torch.tensor([[[[True, False]]]]), counts, 1, torch.float32)
    assert hidden[0, 0, 0].tolist() == [0.0, LOWEST]
    assert with_mass(torch.tensor([[[[LOWEST, 0.0]]]]), counts, 1, torch.float32)[0, 0, 0, 0] == LOWEST


def test_one_query_over_packed_slots_sees_what_it_would_over_padded_ones():
    """Two rows of two heads with 3, 1, 2 and 4 slots, then a tail of 2: a head's mask is its part of the padded one."""
    held = torch.tensor([[[1, 1, 1, 0], [1, 0, 0, 0]], [[1, 1, 0, 0], [1, 1, 1, 1]]]).bool()
    columns = torch.tensor([[[0, 2, 5, 0], [4, 0, 0, 0]], [[1, 3, 0, 0], [2, 3, 4, 5]]], dtype=torch.int32)
    tail = torch.tensor([6, 7], dtype=torch.int32).expand(2, 2, 2)
    entries, mask = torch.cat([columns, tail], dim=2), torch.cat([held, torch.ones(2, 2, 2).bool()], dim=2)
    counts = torch.arange(1.0, 25.0).view(2, 2, 6).masked_fill(~mask, 0.0)
    counts[..., 4:] = 1.0
    table = SlotTable(entries, entries, counts, entries.char(), entries[None], mask)
    allowed = torch.rand(2, 1, 1, 8, generator=torch.Generator().manual_seed(0)) < 0.6
    additive = torch.zeros(allowed.shape).masked_fill(~allowed, LOWEST)
    for given in (None, allowed, additive, allowed[:1]):
        for mass in (False, True):
            expected = over_slots(given, table, 1, 7, 1)
            expected = with_mass(expected, counts, 1, torch.float32) if mass else expected
            found = over_sequences(
                given, columns[held], counts[..., :4][held] if mass else None, [3, 1, 2, 4], 2, 2, torch.float32
            )
            assert len(found) == 4
            for sequence, own in enumerate(found):
                row, head = divmod(sequence, 2)
                assert own.shape[:3] == (1, 1, 1)
                assert own.flatten().tolist() == expected[row, head, 0, mask[row, head]].tolist()
