"""The tokens that do not stay."""

import torch
from kvcomp_strategies.matching import other_tokens

from kvcomp import Pivots
from kvcomp.testing import make_sample


def test_other_tokens_are_valid_and_not_kept() -> None:
    view = make_sample(0, (4, 6), kv_heads=1).view()
    pivots = Pivots(torch.tensor([[[2, 0, 0]], [[0, 1, 5]]]), torch.tensor([[[True, False, False]], [[True] * 3]]))
    assert other_tokens(view, pivots).tolist() == [[[3, 4, 5]], [[2, 3, 4]]]


def test_an_empty_slot_does_not_hide_the_first_token() -> None:
    """Empty slots point at token 0, which may be a token that goes, or one that stays."""
    view = make_sample(0, (4, 4), kv_heads=1).view()
    mask = torch.tensor([[[True, False]], [[True, True]]])
    gone = other_tokens(view, Pivots(torch.tensor([[[3, 0]], [[0, 1]]]), mask))
    assert gone.tolist() == [[[0, 1, 2]], [[2, 3, -1]]]
    stays = other_tokens(view, Pivots(torch.tensor([[[0, 0]], [[0, 1]]]), mask))
    assert stays.tolist() == [[[1, 2, 3]], [[2, 3, -1]]]
