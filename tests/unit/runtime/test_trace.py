"""What became of every token, against cases worked out by hand."""

import pytest
import torch

from kvcomp.core.types import Assignment, LayerView, MergePlan, Pivots
from kvcomp.runtime.trace import EVICTED, Trace

RHO = torch.zeros(1)


def view(indices, layer=0):
    """A layer of one row and one head that holds these positions."""
    held = torch.tensor([[indices]], dtype=torch.int32)
    zeros = torch.zeros(1, 1, len(indices), 2)
    return LayerView(zeros, zeros, held, held >= 0, held, held.float(), held[None], layer=layer)


def plan(pivots, sources, targets, weights, mask=None):
    kept = Pivots(torch.tensor([[pivots]]), None if mask is None else torch.tensor([[mask]]))
    edges = [torch.tensor([[side]]) for side in (sources, targets, weights)]
    return MergePlan(kept, Assignment(edges[0], edges[1], edges[2].float()), RHO)


def test_a_token_is_kept_or_merged_or_gone():
    trace = Trace()
    trace.compressed(view([0, 1, 2, 3, 4]), plan([0, 3], [1, 2, 4], [[1], [-1], [0]], [[1], [0], [1]]))
    assert trace.homes[0].tolist() == [[[0, 3, EVICTED, 3, 0]]]


def test_of_several_slots_the_one_with_the_largest_weight_counts():
    trace = Trace()
    trace.compressed(view([0, 1, 2, 3]), plan([0, 1, 2], [3], [[0, 2, -1]], [[0.4, 0.6, 0.0]]))
    assert trace.homes[0].tolist() == [[[0, 1, 2, 2]]]


def test_padding_and_heads_that_keep_fewer_take_no_token():
    trace = Trace()
    # a pad first; the second pivot is an empty slot that points at token 0; one source is padding
    made = plan([1, 0], [2, -1], [[0], [-1]], [[1], [0]], mask=[True, False])
    trace.compressed(view([-1, 0, 1]), made)
    assert trace.homes[0].tolist() == [[[0, 0]]]


def test_a_second_compression_takes_along_what_was_merged_before():
    trace = Trace()
    trace.compressed(view([0, 1, 2, 3]), plan([0, 2], [1, 3], [[1], [-1]], [[1], [0]]))
    assert trace.homes[0].tolist() == [[[0, 2, 2, EVICTED]]]
    # slots 0 and 2 are left, tokens 4 and 5 are new; 2 goes into 0, 5 is evicted
    trace.compressed(view([0, 2, 4, 5]), plan([0, 2], [1, 3], [[0], [-1]], [[1], [0]]))
    assert trace.homes[0].tolist() == [[[0, 0, 0, EVICTED, 4, EVICTED]]]


def test_later_tokens_are_at_home_and_untrimmed_layers_unknown():
    trace = Trace()
    trace.compressed(view([0, 1], layer=3), plan([1], [0], [[0]], [[1]]))
    found = trace.of(3, 4)
    assert found is not None
    assert found.tolist() == [[[1, 1, 2, 3]]]
    assert trace.of(3, 1).tolist() == [[[1]]]
    assert trace.of(0, 4) is None


def test_without_a_plan_everything_stays():
    trace = Trace()
    trace.compressed(view([0, 1, -1]), MergePlan(None, None, RHO))
    assert trace.homes[0].tolist() == [[[0, 1]]]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_weights_may_be_short_numbers(dtype):
    trace = Trace()
    made = plan([0, 1], [2], [[0, 1]], [[0.25, 0.75]])
    edges = made.assignment
    trace.compressed(
        view([0, 1, 2]), MergePlan(made.pivots, Assignment(edges.sources, edges.targets, edges.weights.to(dtype)), RHO)
    )
    assert trace.homes[0].tolist() == [[[0, 1, 1]]]
