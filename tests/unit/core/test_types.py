"""The data that flows through a pipeline."""

from dataclasses import FrozenInstanceError

import pytest
import torch

from kvcomp import Assignment, Modality, Pivots, Rule
from kvcomp.testing import make_sample


def test_gather_takes_scalars_and_vectors_at_the_pivots() -> None:
    pivots = Pivots(torch.tensor([[[0, 2], [1, 3]]]))
    scalars = torch.arange(8).view(1, 2, 4)
    assert pivots.gather(scalars).tolist() == [[[0, 2], [5, 7]]]
    vectors = torch.stack([scalars, -scalars], dim=-1)
    assert pivots.gather(vectors).tolist() == [[[[0, 0], [2, -2]], [[5, -5], [7, -7]]]]


def test_filled_is_the_mask_or_everything() -> None:
    indices = torch.tensor([[[0, 2]]])
    assert Pivots(indices).filled().tolist() == [[[True, True]]]
    mask = torch.tensor([[[True, False]]])
    assert torch.equal(Pivots(indices, mask).filled(), mask)


def test_merged_sources_are_those_with_any_target() -> None:
    targets = torch.tensor([[[[0, -1], [-1, -1], [-1, 1]]]])
    edges = Assignment(torch.tensor([[[1, 3, -1]]]), targets, (targets >= 0).float())
    assert edges.merged.tolist() == [[[True, False, True]]]


def test_a_view_knows_its_shape_and_cannot_be_assigned_to() -> None:
    view = make_sample(0, (5, 3), kv_heads=2).view()
    assert view.shape == (2, 2, 5)
    with pytest.raises(FrozenInstanceError):
        view.keys = view.values  # type: ignore[misc]


def test_numbers_of_modalities_and_rules_are_fixed() -> None:
    """Tensors and saved caches hold them."""
    assert [(member.name, int(member)) for member in Modality] == [
        ("TEXT", 0),
        ("IMAGE", 1),
        ("VIDEO", 2),
        ("AUDIO", 3),
    ]
    assert [(member.name, int(member)) for member in Rule] == [("CROSS", 0), ("INTRA", 1), ("HETERO", 2), ("NONE", 3)]
