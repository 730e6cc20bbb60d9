"""An untrained model already looks back at the tokens that names stand in."""

import pytest
import torch

from kvcomp.minimile.model import LOOK_BACK, build_model
from kvcomp.minimile.vocabulary import IMAGE, SPECIALS, TOKEN_IDS, WORDS


@pytest.mark.parametrize(("seed", "size"), [(0, "xs"), (1, "xs"), (0, "s")])
def test_each_head_of_the_first_layer_looks_back_whatever_the_tokens_are(seed, size):
    model = build_model(seed, size).eval()
    model.set_attn_implementation("eager")
    ids = torch.randint(len(SPECIALS), len(WORDS), (2, 40), generator=torch.Generator().manual_seed(seed))
    assert TOKEN_IDS[IMAGE] < len(SPECIALS)
    with torch.no_grad():
        first, later, *_ = model(input_ids=ids, output_attentions=True).attentions
    for head, back in enumerate(LOOK_BACK * (first.shape[1] // len(LOOK_BACK))):
        assert first[:, head].diagonal(-back, 1, 2)[:, 8:].mean() > 0.7
        assert later[:, head].diagonal(-back, 1, 2)[:, 8:].mean() < 0.2


def test_a_seed_decides_every_weight():
    one, same, other = (build_model(seed).state_dict() for seed in (3, 3, 4))
    matrices = [name for name, weight in one.items() if weight.ndim > 1]
    assert matrices
    assert all(one[name].equal(same[name]) and not one[name].equal(other[name]) for name in matrices)


@pytest.mark.parametrize(("size", "parameters"), [("xs", 1_074_112), ("s", 7_000_000)])
def test_sizes(size, parameters):
    model = build_model(0, size)
    assert sum(parameter.numel() for parameter in model.parameters()) == pytest.approx(parameters, rel=0.05)
