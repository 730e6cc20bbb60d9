"""When a smaller budget keeps a subset.

It does where neither scores nor protection change with the slots: `top-k` with fixed scores, `random` always, and
`streaming-llm` as soon as both budgets exceed its sinks. Scorers whose window is a share of the slots (`h2o`, `snapkv`,
`flowmm`) make no such promise: a larger window protects tokens that were evicted, and scores what it did not see.
"""

import pytest
import torch
from generators import SAMPLES
from hypothesis import assume, given
from hypothesis import strategies as st
from kvcomp_strategies.selectors.top_k import TopK

import kvcomp
from kvcomp import Scores
from kvcomp.testing import Sample, run

TWO_BUDGETS = st.tuples(st.integers(1, 45), st.integers(1, 45)).map(sorted)


def kept(strategy: str, sample: Sample, tokens: int) -> torch.Tensor:
    return run(kvcomp.strategy(strategy, {"tokens": tokens}), sample).kept()


@given(sample=SAMPLES, budgets=TWO_BUDGETS)
def test_random_keeps_a_subset(sample: Sample, budgets: list[int]) -> None:
    small, large = (kept("random", sample, tokens) for tokens in budgets)
    assert bool((large | ~small).all())


@given(sample=SAMPLES, budgets=TWO_BUDGETS)
def test_streaming_llm_keeps_a_subset_above_its_sinks(sample: Sample, budgets: list[int]) -> None:
    assume(budgets[0] > 4)
    small, large = (kept("streaming-llm", sample, tokens) for tokens in budgets)
    assert bool((large | ~small).all())


@pytest.mark.parametrize("levels", [2, 1000])
@given(sample=SAMPLES, budgets=TWO_BUDGETS, seed=st.integers(0, 100), share=st.sampled_from((0.0, 0.2)))
def test_top_k_keeps_a_subset_for_fixed_scores(
    levels: int, sample: Sample, budgets: list[int], seed: int, share: float
) -> None:
    view, generator = sample.view(), torch.Generator().manual_seed(seed)
    values = torch.randint(levels, view.shape, generator=generator).float()
    protected = (torch.rand(view.shape, generator=generator) < share) & view.valid
    held = view.valid.sum(dim=-1)
    small, large = (
        TopK().select(view, Scores(values, protected), torch.full_like(held, tokens).minimum(held))
        for tokens in budgets
    )
    for row in range(view.shape[0]):
        for head in range(view.shape[1]):
            few = small.indices[row, head][small.filled()[row, head]].tolist()
            many = large.indices[row, head][large.filled()[row, head]].tolist()
            assert set(few) <= set(many)
