"""The same number of slots for every head of every layer."""

import torch
from kvcomp_strategies.allocators.uniform import UniformAllocator

import kvcomp
from kvcomp.testing import make_sample, run


def test_every_head_of_every_layer_gets_the_share_of_its_row() -> None:
    view = make_sample(0, (5, 3), kv_heads=3).view()
    slots = UniformAllocator().allocate(torch.tensor([2, 1]), [view, view], [])
    assert slots.tolist() == [[[2, 2, 2], [1, 1, 1]]] * 2
    assert slots.device.type == "cpu"


def test_it_decides_layer_by_layer() -> None:
    assert UniformAllocator.scope == "layer"
    seen = run(kvcomp.strategy("h2o", "4t"), make_sample(0, (9,)))
    assert seen.slots.tolist() == [[4, 4]]
