"""Drop, mean and pivot-mean: by hand, by the oracle, and what all of them share."""

from __future__ import annotations

from dataclasses import replace

import oracles
import pytest
import torch
from kvcomp_strategies.mergers.drop import Drop
from kvcomp_strategies.mergers.mean import Mean
from kvcomp_strategies.mergers.pivot_mean import PivotMean
from torch import Tensor

from kvcomp import Assignment, LayerView, Merger, Pivots
from kvcomp.testing import make_sample

PIVOTS = Pivots(torch.tensor([[[0, 3]]]))
EDGES = Assignment(
    torch.tensor([[[1, 2, 4]]]), torch.tensor([[[[0], [0], [-1]]]]), torch.tensor([[[[1.0], [1.0], [0.0]]]])
)
MERGERS = {"mean": (Mean(), oracles.plain_mean), "pivot-mean": (PivotMean(), oracles.pivot_mean)}


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
    merger, oracle = MERGERS[name]
    view = make_sample(1, (9, 9), kv_heads=2, dtype=dtype).view()
    generator = torch.Generator().manual_seed(1)
    pivots = Pivots(torch.tensor([2, 5, 8]).expand(2, 2, 3))
    sources = torch.tensor([0, 1, 3, 4, 6, 7]).expand(2, 2, 6)
    targets = torch.randint(-1, 3, (2, 2, 6, 1), generator=generator)
    seen = merger.merge(view, pivots, Assignment(sources, targets, (targets >= 0).float()))
    for row, head in ((0, 0), (0, 1), (1, 0), (1, 1)):
        for slot, pivot in enumerate((2, 5, 8)):
            members = sources[row, head][targets[row, head, :, 0] == slot]
            for after, before in zip(seen, (view.keys, view.values), strict=False):
                expected = oracle(before[row, head, pivot], list(before[row, head, members]))
                close(after[row, head, slot], expected, dtype)
            assert seen[2][row, head, slot] == 1 + len(members)


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
    """A half of 8 goes to each of two pivots at 0."""
    view = line(0, 8, 0, 0, 0)
    edges = Assignment(torch.tensor([[[1]]]), torch.tensor([[[[0, 1]]]]), torch.tensor([[[[0.5, 0.5]]]]))
    keys, _, counts = MERGERS[name][0].merge(view, PIVOTS, edges)
    weight = {"mean": 0.5 / 1.5, "pivot-mean": 0.5 * 0.5 / 1.5}[name]
    torch.testing.assert_close(keys.flatten(), torch.tensor([8 * weight] * 2))
    assert counts.flatten().tolist() == [1.5, 1.5]


@pytest.mark.parametrize("name", MERGERS)
def test_the_largest_float16_stays_finite(name: str) -> None:
    view = line(*[65504.0] * 5, dtype=torch.float16)
    view = replace(view, values=view.keys)
    keys, values, _ = MERGERS[name][0].merge(view, PIVOTS, EDGES)
    assert keys.half().isfinite().all()
    assert values.half().isfinite().all()
