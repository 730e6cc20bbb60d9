"""The mergers: by hand, by the oracle, and what all of them share."""

from __future__ import annotations

from dataclasses import replace
from math import e, exp

import oracles_merge
import pytest
import torch
from kvcomp_strategies import merging
from kvcomp_strategies.mergers.drop import Drop
from kvcomp_strategies.mergers.gaussian import Gaussian
from kvcomp_strategies.mergers.importance_weighted import ImportanceWeighted
from kvcomp_strategies.mergers.mean import Mean
from kvcomp_strategies.mergers.pivot_mean import PivotMean
from kvcomp_strategies.mergers.sum import Sum
from kvcomp_strategies.mergers.values_only import ValuesOnly
from kvcomp_strategies.mergers.weighted import Weighted
from kvcomp_strategies.merging import blend
from kvcomp_strategies.observations.received_attention import ReceivedSums
from torch import Tensor

from kvcomp import Assignment, LayerView, Merger, Pivots
from kvcomp.testing import make_sample

PIVOTS = Pivots(torch.tensor([[[0, 3]]]))
EDGES = Assignment(
    torch.tensor([[[1, 2, 4]]]), torch.tensor([[[[0], [0], [-1]]]]), torch.tensor([[[[1.0], [1.0], [0.0]]]])
)

MERGERS = {
    "mean": (Mean(), oracles_merge.mean_weights),
    "pivot-mean": (PivotMean(), oracles_merge.pivot_weights),
    "exp": (Weighted(), oracles_merge.exp_weights),
    "cosine_mean": (Weighted(weighting="cosine_mean"), oracles_merge.cosine_weights),
    "gaussian": (Gaussian(), oracles_merge.gaussian_weights),
    "paper's sigma": (Gaussian(sigma="paper"), oracles_merge.paper_gaussian_weights),
    "sum": (Sum(), oracles_merge.added_weights),
}


def line(*values: float, dtype: torch.dtype = torch.float32) -> LayerView:
    """One head with one coordinate per token; values are ten times the keys."""
    view = make_sample(0, (len(values),), kv_heads=1).view()
    keys = torch.tensor(values, dtype=dtype)[None, None, :, None]
    return replace(view, keys=keys, values=keys * 10, counts=torch.ones(1, 1, len(values)))


def merged(merger: Merger, view: LayerView, pivots: Pivots = PIVOTS, edges: Assignment = EDGES) -> list[list[float]]:
    keys, values, counts = merger.merge(view, pivots, edges)
    return [keys.flatten().tolist(), values.flatten().tolist(), counts.flatten().tolist()]


def test_drop_keeps_the_pivots_as_they_are() -> None:
    edges = replace(EDGES, targets=torch.full_like(EDGES.targets, -1), weights=torch.zeros_like(EDGES.weights))
    assert merged(Drop(), line(4, 1, 2, 7, 9), edges=edges) == [[4, 7], [40, 70], [1, 1]]


def test_mean_by_hand() -> None:
    """(4 + 1 + 1) / 3 = 2."""
    keys, values, counts = merged(Mean(), line(4, 1, 1, 7, 9))
    assert keys == pytest.approx([2, 7])
    assert values == pytest.approx([20, 70])
    assert counts == [3, 1]


def test_pivot_mean_by_hand() -> None:
    """4 (1 + 2/2) / 3 + (1 + 3) / 6 = 3.333."""
    keys, values, counts = merged(PivotMean(), line(4, 1, 3, 7, 9))
    assert keys == pytest.approx([10 / 3, 7])
    assert values == pytest.approx([100 / 3, 70])
    assert counts == [3, 1]


@pytest.mark.parametrize("sources", [1, 2, 7, 100])
def test_the_pivot_keeps_three_quarters_and_then_towards_half(sources: int) -> None:
    view = line(1.0, *[0.0] * sources)
    shape = (1, 1, sources)
    edges = Assignment(
        torch.arange(1, sources + 1).view(shape), torch.zeros(*shape, 1, dtype=torch.long), torch.ones(*shape, 1)
    )
    keys, _, counts = PivotMean().merge(view, Pivots(torch.tensor([[[0]]])), edges)
    assert keys.item() == pytest.approx((1 + sources / 2) / (sources + 1))
    assert keys.item() >= 0.5
    assert counts.item() == sources + 1


@pytest.mark.parametrize("name", MERGERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_the_oracle_agrees_on_every_head(name: str, dtype: torch.dtype) -> None:
    merger, weights = MERGERS[name]
    view = make_sample(1, (9, 9), kv_heads=2, dtype=dtype).view()
    generator = torch.Generator().manual_seed(1)
    pivots = Pivots(torch.tensor([2, 5, 8]).expand(2, 2, 3))
    sources = torch.tensor([0, 1, 3, 4, 6, 7]).expand(2, 2, 6)
    targets = torch.randint(-1, 3, (2, 2, 6, 1), generator=generator)
    seen = merger.merge(view, pivots, Assignment(sources, targets, (targets >= 0).float()))
    for row, head in ((0, 0), (0, 1), (1, 0), (1, 1)):
        for slot, pivot in enumerate((2, 5, 8)):
            members = sources[row, head][targets[row, head, :, 0] == slot]
            expected = weights(head_of(view, row, head), pivot, dict.fromkeys(members.tolist(), 1.0))
            for after, before in zip(seen, (view.keys, view.values), strict=False):
                close(after[row, head, slot], oracles_merge.weighted_sum(before[row, head], expected), dtype)
            assert seen[2][row, head, slot] == 1 + len(members)


def head_of(view: LayerView, row: int, head: int) -> oracles_merge.Head:
    return oracles_merge.Head([], view.keys[row, head], view.values[row, head])


def close(after: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    eps = 8 * torch.finfo(dtype).eps
    torch.testing.assert_close(after.double(), expected, rtol=eps, atol=eps)


@pytest.mark.parametrize("name", MERGERS)
def test_a_pivot_without_sources_keeps_its_bits(name: str) -> None:
    view = line(0.1, 0.2, 0.3, 1 / 3, 0.4)
    keys, values, _ = MERGERS[name][0].merge(view, PIVOTS, EDGES)
    assert torch.equal(keys[0, 0, 1], view.keys[0, 0, 3])
    assert torch.equal(values[0, 0, 1], view.values[0, 0, 3])


@pytest.mark.parametrize("name", MERGERS)
def test_counts_add_up_over_turns(name: str) -> None:
    """Slots that stand for several tokens bring all of them."""
    view = replace(line(4, 1, 1, 7, 9), counts=torch.tensor([[[2.0, 3.0, 1.0, 5.0, 4.0]]]))
    assert MERGERS[name][0].merge(view, PIVOTS, EDGES)[2].tolist() == [[[6, 5]]]


@pytest.mark.parametrize("name", MERGERS)
def test_a_source_can_be_shared_between_pivots(name: str) -> None:
    """A half of 8 goes to each of two pivots at 0, whose cosine is 0 and whose squared distance is 64."""
    view = line(0, 8, 0, 0, 0)
    edges = Assignment(torch.tensor([[[1]]]), torch.tensor([[[[0, 1]]]]), torch.tensor([[[[0.5, 0.5]]]]))
    keys, _, counts = MERGERS[name][0].merge(view, PIVOTS, edges)
    kernel = 0.5 * exp(-64 / (0.5 * 64 / 1.5))
    weight = {
        "mean": 0.5 / 1.5,
        "pivot-mean": 0.5 * 0.5 / 1.5,
        "exp": 0.5 / (e + 0.5),
        "cosine_mean": 0.0,
        "gaussian": kernel / (kernel + 1),
        "paper's sigma": 0.0,
        "sum": 0.5,
    }[name]
    torch.testing.assert_close(keys.flatten(), torch.tensor([8 * weight] * 2))
    assert counts.flatten().tolist() == [1.5, 1.5]


@pytest.mark.parametrize("name", MERGERS)
def test_the_largest_float16_stays_finite(name: str) -> None:
    view = line(*[65504.0] * 5, dtype=torch.float16)
    view = replace(view, values=view.keys)
    keys, values, _ = MERGERS[name][0].merge(view, PIVOTS, EDGES)
    assert keys.half().isfinite().all()
    assert values.half().isfinite().all()


def test_the_kernel_falls_with_the_distance_of_keys_and_weighs_values_too() -> None:
    """Distances 1 and 9, with the pivot's 0 a mean of 10/3: weights 1, exp(-0.3), exp(-2.7)."""
    keys, values, counts = merged(Gaussian(), line(4, 3, 1, 7, 9))
    weights = [1.0, exp(-0.3), exp(-2.7)]
    expected = (4 * weights[0] + 3 * weights[1] + 1 * weights[2]) / sum(weights)
    assert keys == pytest.approx([expected, 7])
    assert values == pytest.approx([10 * expected, 70])
    assert counts == [3, 1]


def test_scaled_values_make_up_for_the_size_of_the_set() -> None:
    plain, scaled = (merged(Gaussian(value_scale=scale), line(4, 3, 1, 7, 9)) for scale in ("none", "size"))
    assert scaled[0] == plain[0]
    assert scaled[1] == pytest.approx([3 * plain[1][0], 70])
    assert Gaussian(value_scale="size").convex == {"keys"}
    assert not Gaussian(value_scale="size").alike


@pytest.mark.parametrize("merger", [Sum(), Gaussian(value_scale="size")], ids=["sum", "size"])
def test_what_float16_cannot_hold_becomes_its_largest_number(merger: Merger) -> None:
    view = line(*[60000.0] * 5, dtype=torch.float16)
    _, values, _ = merger.merge(replace(view, values=-view.keys), PIVOTS, EDGES)
    assert values.half().flatten().tolist() == [-65504.0, -60000.0]


def test_importance_weighs_by_the_attention_of_the_query_group() -> None:
    """Mean attention 1, 2, 3 of tokens at 4, 1, 7."""
    view = line(4, 1, 7, 7, 9)
    seen = torch.tensor([[[1.0, 1, 2, 5, 5], [1.0, 3, 4, 5, 5]]])
    keys, values, counts = merged(ImportanceWeighted(), replace(view, observations={ReceivedSums(): seen}))
    assert keys == pytest.approx([(4 + 2 + 21) / 6, 7])
    assert values == pytest.approx([10 * (4 + 2 + 21) / 6, 70])
    assert counts == [3, 1]


def test_without_any_attention_importance_is_equal() -> None:
    view = replace(line(4, 1, 1, 7, 9), observations={ReceivedSums(): torch.zeros(1, 2, 5)})
    keys, _, _ = merged(ImportanceWeighted(), view)
    assert keys == pytest.approx([2, 7])


def test_values_only_takes_values_and_counts_of_the_merger_inside() -> None:
    assert merged(ValuesOnly(merger=Mean()), line(4, 1, 1, 7, 9)) == [[4, 7], [pytest.approx(20), 70], [3, 1]]


@pytest.mark.parametrize("merger", [merger for merger, _ in MERGERS.values()] + [Gaussian(value_scale="size")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_values_only_gives_the_same_values_without_blending_keys(
    merger: Merger, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    view = line(4, 1, 3, 7, 9, dtype=dtype)
    _, values, counts = merger.merge(view, PIVOTS, EDGES)
    blended: list[Tensor] = []
    monkeypatch.setattr(merging, "blend", lambda vectors, *rest: blended.append(vectors) or blend(vectors, *rest))
    alone = ValuesOnly(merger=merger).merge(view, PIVOTS, EDGES)
    assert [vectors is view.values for vectors in blended] == [True]
    assert torch.equal(alone[0], PIVOTS.gather(view.keys))
    assert torch.equal(alone[1], values)
    assert torch.equal(alone[2], counts)


class Halved(Mean, use="halved"):
    """Changes what its parent merges, and nothing else."""

    def merge(self, layer: LayerView, pivots: Pivots, assignment: Assignment) -> tuple[Tensor, Tensor, Tensor]:
        keys, values, counts = super().merge(layer, pivots, assignment)
        return keys, values / 2, counts


def test_values_only_follows_a_merger_that_only_says_how_it_merges_both() -> None:
    view = line(4, 1, 1, 7, 9)
    assert merged(ValuesOnly(merger=Halved()), view) == [[4, 7], [pytest.approx(10), 35], [3, 1]]


@pytest.mark.parametrize(
    ("merger", "convex", "alike"),
    [
        (Mean(), {"keys", "values"}, True),
        (Weighted(), {"keys", "values"}, True),
        (Weighted(weighting="cosine_mean"), set(), True),
        (Sum(), set(), True),
        (ValuesOnly(merger=Mean()), {"keys", "values"}, False),
        (ValuesOnly(merger=Sum()), {"keys"}, False),
    ],
    ids=lambda value: getattr(value, "use", ""),
)
def test_a_merger_says_what_stays_in_the_hull(merger: Merger, convex: set[str], alike: bool) -> None:
    assert merger.convex == convex
    assert merger.alike is alike


def test_raw_cosines_do_leave_the_hull() -> None:
    """Zero keys have a cosine of 0, so equal values shrink to a third."""
    view = replace(line(4, 0, 0, 7, 9), values=torch.full((1, 1, 5, 1), 10.0))
    keys, values, _ = merged(Weighted(weighting="cosine_mean"), view)
    assert keys[0] == pytest.approx(4 / 3)
    assert values[0] == pytest.approx(10 / 3)
