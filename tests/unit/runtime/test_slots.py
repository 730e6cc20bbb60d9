"""Tables of slots."""

import pytest
import torch

from kvcomp.runtime.slots import PackedTable, SlotTable, new_tokens


def _table(same_columns: bool) -> SlotTable:
    """Return a table of two rows and two heads with empty slots at the end and between."""
    mask = torch.tensor([[[1, 1, 0, 1], [1, 0, 0, 1]], [[1, 1, 1, 1], [0, 0, 0, 1]]]).bool()
    indices = torch.arange(16, dtype=torch.int32).view(2, 2, 4).masked_fill(~mask, -1)
    return SlotTable(
        indices=indices,
        columns=indices if same_columns else (indices + 3).masked_fill(~mask, -1),
        counts=(indices + 1.0).masked_fill(~mask, 0.0),
        modality=(indices % 3).masked_fill(~mask, 0).to(torch.int8),
        positions=torch.stack([indices * 2, indices * 3]).masked_fill(~mask, 0),
        mask=mask,
    )


def test_a_packed_table_holds_what_is_filled_and_comes_back():
    for same_columns in (True, False):
        table = _table(same_columns)
        packed = PackedTable.of(table)
        assert packed.counts.tolist() == [1, 2, 4, 5, 8, 9, 10, 11, 12, 16]
        again = packed.unpacked()
        assert (again.columns is again.indices) == same_columns
        for name in ("indices", "columns", "counts", "modality", "positions", "mask"):
            assert torch.equal(getattr(again, name), getattr(table, name)), name
            assert getattr(again, name).dtype == getattr(table, name).dtype, name
        filled = sum(tensor.numel() for tensor in packed.tensors() if tensor is not packed.mask)
        assert filled == 10 * 6  # indices, columns, counts, modality and two axes of positions


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("more", [0, 3])
def test_places_are_the_columns_of_the_whole_table(packed, more):
    """What a mask is made of, without the rest of the table."""
    table = _table(same_columns=False)
    held = PackedTable.of(table) if packed else table
    later = new_tokens((2, 2, more), 19, torch.full((2,), 16), device=torch.device("cpu"))
    expected, places = table.extend(later) if more else table, held.places.then(19, more)
    assert places.columns.tolist() == expected.columns.tolist()
    assert places.valid.tolist() == expected.valid.tolist()
