"""Which queries come after the last image, and what they look at."""

import pytest
import torch
from kvcomp_strategies.observations.post_vision import PostVisionSums, rows_after_vision
from kvcomp_strategies.observations.sparsity import Sparsity

from kvcomp import Modality
from kvcomp.core.attention import observe
from kvcomp.testing import make_sample

TEXT, IMAGE, VIDEO = int(Modality.TEXT), int(Modality.IMAGE), int(Modality.VIDEO)
PROMPTS = {
    "text after an image": ([TEXT, IMAGE, IMAGE, TEXT, TEXT], [3, 4]),
    "text between images does not count": ([IMAGE, TEXT, VIDEO, TEXT, TEXT], [3, 4]),
    "an image at the end": ([TEXT, TEXT, TEXT, IMAGE], [2, 3]),
    "text only": ([TEXT, TEXT, TEXT, TEXT], [2, 3]),
    "images only": ([IMAGE, IMAGE], [0, 1]),
    "one token": ([TEXT], [0]),
}


@pytest.mark.parametrize("case", PROMPTS)
def test_rows_after_vision(case: str) -> None:
    modality, expected = PROMPTS[case]
    valid = torch.ones(1, len(modality), dtype=torch.bool)
    assert rows_after_vision(valid, torch.tensor([modality]), window=2).tolist() == [expected]


def test_padding_is_no_query_and_shorter_tails_are_padded_in_front() -> None:
    valid = torch.tensor([[False, True, True, True, True], [True, True, True, True, True]])
    modality = torch.tensor([[IMAGE, IMAGE, TEXT, TEXT, TEXT], [TEXT, TEXT, TEXT, IMAGE, TEXT]])
    assert rows_after_vision(valid, modality, window=2).tolist() == [[2, 3, 4], [-1, -1, 4]]


def test_the_sums_are_of_these_rows_alone() -> None:
    sample = make_sample(3, (20,))
    rows = rows_after_vision(sample.valid[:, 0], sample.modality[:, 0], window=32)[0]
    observed = observe(sample.inputs(), [PostVisionSums()])[PostVisionSums()]
    total = observed.sum(dim=-1)
    torch.testing.assert_close(total, torch.full_like(total, len(rows)))  # each row gives 1
    assert bool((observed[..., rows[-1] + 1 :] == 0).all())


def test_uniform_attention_is_dense_and_a_single_peak_is_sparse() -> None:
    sample = make_sample(0, (10,), fill="zero", modalities=(Modality.TEXT,))
    assert bool((observe(sample.inputs(), [Sparsity(window=1)])[Sparsity(window=1)] == 0).all())
    sample.keys[:, :, 3] = 1.0
    sample.queries[:] = 5.0  # one key of ten takes nearly everything
    peaked = observe(sample.inputs(), [Sparsity(window=1)])[Sparsity(window=1)]
    torch.testing.assert_close(peaked, torch.full_like(peaked, 0.9))
