"""Places of packed slots."""

import torch

from kvcomp.core.packed import PackedLayout, PackedSlots, runs

CPU = torch.device("cpu")


def test_runs_follow_each_other():
    assert runs([5, 0, 9], [2, 0, 1], CPU).tolist() == [5, 6, 9]
    assert runs([], [], CPU).tolist() == []


def test_every_sequence_has_room_at_its_end():
    layout = PackedLayout.of([3, 1], kv_heads=2, width=3, room=2, device=CPU)
    assert layout.starts == (0, 5)
    assert layout.ends.tolist() == [3, 6]
    assert layout.total == 8


def test_sequences_are_views_of_what_is_filled():
    layout = PackedLayout.of([3, 1], kv_heads=2, width=3, room=2, device=CPU)
    keys = torch.arange(8.0)[:, None]
    slots = PackedSlots(keys, -keys, layout, appended=1)
    assert [view.flatten().tolist() for view in slots.sequences()[0]] == [[0, 1, 2, 3], [5, 6]]
    assert [view.flatten().tolist() for view in slots.sequences()[1]] == [[0, -1, -2, -3], [-5, -6]]
    assert slots.sequences()[0][1].data_ptr() == keys[5:].data_ptr()
