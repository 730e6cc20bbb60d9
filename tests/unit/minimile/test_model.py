"""An untrained model already looks back at the tokens that names stand in."""

import pytest
import torch

from kvcomp.minimile.model import LOOK_BACK, build_model
from kvcomp.minimile.vocabulary import IMAGE, SPECIALS, TOKEN_IDS, WORDS


@pytest.mark.parametrize("seed", [0, 1])
def test_each_head_of_the_first_layer_looks_back_whatever_the_tokens_are(seed):
    model = build_model(seed).eval()
    model.set_attn_implementation("eager")
    ids = torch.randint(len(SPECIALS), len(WORDS), (2, 40), generator=torch.Generator().manual_seed(seed))
    assert TOKEN_IDS[IMAGE] < len(SPECIALS)
    with torch.no_grad():
        first, later, *_ = model(input_ids=ids, output_attentions=True).attentions
    for head, back in enumerate(LOOK_BACK):
        assert first[:, head].diagonal(-back, 1, 2)[:, 8:].mean() > 0.7
        assert later[:, head].diagonal(-back, 1, 2)[:, 8:].mean() < 0.2


def test_a_seed_decides_every_weight():
    one, same, other = (build_model(seed).state_dict() for seed in (3, 3, 4))
    matrices = [name for name, weight in one.items() if weight.ndim > 1]
    assert matrices
    assert all(one[name].equal(same[name]) and not one[name].equal(other[name]) for name in matrices)
