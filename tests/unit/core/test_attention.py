"""Exact attention rows in blocks: against plain softmax, whatever the mask, softcap, sinks and block size."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import oracles
import pytest
import torch
from kvcomp_strategies.observations.cross_modal_flow import CrossModalFlow
from kvcomp_strategies.observations.received_attention import ReceivedSums
from kvcomp_strategies.observations.row_entropy import RowEntropy
from kvcomp_strategies.observations.sparsity import Sparsity
from kvcomp_strategies.observations.window_attention import WindowRows
from torch import Tensor

from kvcomp.core import attention
from kvcomp.core.attention import AttentionInputs, observe
from kvcomp.core.interfaces import Observation
from kvcomp.core.types import AttentionBlock
from kvcomp.testing import make_sample


class Rows(Observation, use="rows-of-this-test"):
    """All rows, one below the other."""

    def update(self, state: Tensor | None, block: AttentionBlock) -> Tensor:
        return block.probs if state is None else torch.cat([state, block.probs], dim=2)


class Places(Observation, use="places-of-this-test"):
    """Which query each row is, and whether it counts."""

    last: int | None = None

    def rows(self, valid: Tensor, modality: Tensor) -> Tensor | None:
        return None if self.last is None else WindowRows(count=self.last).rows(valid, modality)

    def update(self, state: Any, block: AttentionBlock) -> Any:
        return [*(state or []), block]

    def result(self, state: Any) -> Any:
        return state


def inputs(**changes: Any) -> AttentionInputs:
    """Two rows, the first padded by 3; 2 KV heads with groups of 2; 10 tokens."""
    return replace(make_sample(5, (7, 10)).inputs(), **changes)


def expected(seen: AttentionInputs, visible: Tensor | None = None, **options: Any) -> Tensor:
    """The rows of every head by the oracle, zero for pads; `visible` is `(batch, queries, tokens)`."""
    batch, heads = seen.queries.shape[:2]
    group = heads // seen.keys.shape[1]
    sinks = options.pop("sinks", None)
    rows = torch.zeros(*seen.queries.shape[:3], seen.keys.shape[2], dtype=torch.float64)
    for row in range(batch):
        for head in range(heads):
            extra = {} if sinks is None else {"sink": float(sinks[head])}
            seen_by = None if visible is None else visible[row]
            attended = oracles.softmax_attention(
                seen.queries[row, head],
                seen.keys[row, head // group],
                seen_by,
                scaling=seen.scaling,
                **options,
                **extra,
            )
            rows[row, head] = attended * seen.query_valid[row][:, None]
    return rows


def visible(seen: AttentionInputs) -> Tensor:
    return torch.ones(10, 10).tril().bool() & seen.valid[:, 0][:, None]


def assert_close(one: Tensor, other: Tensor) -> None:
    torch.testing.assert_close(one.double(), other, rtol=1e-5, atol=1e-6)


def test_rows_are_softmax_under_a_bool_mask() -> None:
    seen = inputs()
    rows = observe(seen, [Rows()])[Rows()]
    assert rows.dtype == torch.float32
    assert_close(rows, expected(seen, visible(seen)))


def test_no_mask_means_causal_by_columns() -> None:
    seen = inputs(mask=None, query_valid=torch.ones(2, 10, dtype=torch.bool))
    assert_close(observe(seen, [Rows()])[Rows()], expected(seen))


def test_columns_may_differ_by_row_and_head() -> None:
    """Slots that were kept have columns of their own: the query at column 5 sees all before it, not the one after."""
    sample = make_sample(1, (2,), held=2)
    columns = torch.tensor([[[0, 4, 5, 6], [2, 3, 5, 6]]])
    seen = replace(sample.inputs(), mask=None, query_columns=torch.tensor([5, 6]), key_columns=columns)
    rows = observe(seen, [Rows()])[Rows()]
    assert bool((rows[0, :, 0, 3] == 0).all())
    assert bool((rows[0, :, 0, :3] > 0).all())
    assert bool((rows[0, :, 1] > 0).all())
    torch.testing.assert_close(rows.sum(dim=-1), torch.ones(1, 4, 2))


def test_an_additive_mask_is_added() -> None:
    generator = torch.Generator().manual_seed(0)
    bias = torch.randn(2, 1, 10, 10, generator=generator)
    seen = inputs()
    lowest = torch.finfo(torch.float32).min
    mask = bias.masked_fill(~visible(seen)[:, None], lowest)
    rows = observe(replace(seen, mask=mask), [Rows()])[Rows()]
    for row in range(2):
        one = replace(seen, **{name: getattr(seen, name)[row : row + 1] for name in ("queries", "keys", "query_valid")})
        assert_close(rows[row : row + 1], expected(one, visible(seen)[row : row + 1], bias=bias[row, 0]))


@pytest.mark.parametrize("lowest", [torch.finfo(torch.float32).min, float("-inf")], ids=["lowest", "infinite"])
def test_an_additive_mask_hides_pads_and_stays_finite(lowest: float) -> None:
    seen = inputs()
    mask = torch.zeros(2, 1, 10, 10).masked_fill(~visible(seen)[:, None], lowest)
    rows = observe(replace(seen, mask=mask), [Rows()])[Rows()]
    assert rows.isfinite().all()
    assert_close(rows, expected(seen, visible(seen)))


def test_one_mask_serves_all_rows_and_heads() -> None:
    mask = torch.ones(10, 10).tril().bool()[None, None]
    seen = inputs(mask=mask, query_valid=torch.ones(2, 10, dtype=torch.bool))
    assert_close(observe(seen, [Rows()])[Rows()], expected(seen))


def test_softcap() -> None:
    seen = inputs(softcap=0.7, scaling=3.0)
    assert_close(observe(seen, [Rows()])[Rows()], expected(seen, visible(seen), softcap=0.7))


def test_sinks_take_probability() -> None:
    sinks = torch.tensor([0.0, 2.0, -1.0, 30.0])
    seen = inputs(sinks=sinks)
    rows = observe(seen, [Rows()])[Rows()]
    assert_close(rows, expected(seen, visible(seen), sinks=sinks))
    assert bool((rows[:, :3].sum(dim=-1)[:, :, 3:] < 1).all())


def test_bfloat16_is_computed_in_float32() -> None:
    half = inputs()
    half = replace(half, queries=half.queries.bfloat16(), keys=half.keys.bfloat16())
    assert_close(observe(half, [Rows()])[Rows()], expected(half, visible(half)))


@pytest.mark.parametrize(
    "elements", [1, 2 * 4 * 10 * 3, 2 * 4 * 10 * 7, 2**22], ids=["1 row", "3 rows", "7 rows", "all"]
)
def test_blocks_of_any_size_give_the_same(elements: int, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = [Rows(), ReceivedSums(), CrossModalFlow(), WindowRows(count=4), WindowRows(count=32)]
    whole = observe(inputs(), wanted)
    monkeypatch.setattr(attention, "BLOCK_ELEMENTS", elements)
    blocks = observe(inputs(), [*wanted, Places()])
    for observation in wanted:
        torch.testing.assert_close(blocks[observation], whole[observation], rtol=1e-6, atol=1e-6)
    assert sum(block.rows.shape[1] for block in blocks[Places()]) == 10
    assert max(block.probs.numel() for block in blocks[Places()]) <= max(elements, 2 * 4 * 10)


@pytest.mark.parametrize("elements", [1, 2 * 4 * 10 * 3, 2**22], ids=["1 row", "3 rows", "all"])
def test_blocks_without_a_mask_are_as_wide_as_their_rows_see(elements: int, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = inputs(mask=None, query_valid=torch.ones(2, 10, dtype=torch.bool))
    monkeypatch.setattr(attention, "BLOCK_ELEMENTS", elements)
    last = Places(last=6)
    found = observe(seen, [Rows(), Places(), WindowRows(count=6), last])
    assert_close(found[Rows()], expected(seen))
    assert_close(found[WindowRows(count=6)], expected(seen)[:, :, -6:])
    for block in [*found[Places()], *found[last]]:
        assert block.leading.shape[-1] == int(block.rows.max()) + 1
        assert block.probs.shape[-1] == 10


STATISTICS = (ReceivedSums(), CrossModalFlow(), RowEntropy(), RowEntropy(over="other-modality"), Sparsity(window=4))


@pytest.mark.parametrize("statistic", STATISTICS, ids=str)
def test_statistics_are_those_of_the_same_rows_under_a_mask(
    statistic: Observation, monkeypatch: pytest.MonkeyPatch
) -> None:
    masked = inputs(query_valid=torch.ones(2, 10, dtype=torch.bool), mask=torch.ones(10, 10).tril().bool()[None, None])
    monkeypatch.setattr(attention, "BLOCK_ELEMENTS", 1)
    plain = observe(replace(masked, mask=None), [statistic])[statistic]
    torch.testing.assert_close(plain, observe(masked, [statistic])[statistic])


def test_a_block_says_which_rows_it_holds() -> None:
    (block,) = observe(inputs(), [Places(last=8)])[Places(last=8)]
    assert block.rows.tolist() == [[-1, 3, 4, 5, 6, 7, 8, 9], [2, 3, 4, 5, 6, 7, 8, 9]]
    assert block.row_valid.tolist() == [[False, *[True] * 7], [True] * 8]
    assert bool((block.probs[0, :, 0] == 0).all())
    assert torch.equal(block.row_modality[1], inputs().query_modality[1, 2:])


def test_column_sums_are_those_of_full_softmax() -> None:
    sample = make_sample(2, (300,), kv_heads=1, group=2, head_dim=16)
    sums = observe(sample.inputs(), [ReceivedSums()])[ReceivedSums()]
    for head in range(2):
        attended = oracles.softmax_attention(sample.queries[0, head], sample.keys[0, 0])
        torch.testing.assert_close(sums[0, head].tolist(), oracles.column_sums(attended), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(sums.sum(dim=-1), torch.full((1, 2), 300.0))


def test_window_rows_are_the_last_rows_aligned_to_the_right() -> None:
    seen = inputs()
    rows, all_rows = (observe(seen, [wanted])[wanted] for wanted in (WindowRows(count=9), Rows()))
    assert rows.shape == (2, 4, 9, 10)
    torch.testing.assert_close(rows[1], all_rows[1, :, 1:])
    torch.testing.assert_close(rows[0, :, 2:], all_rows[0, :, 3:])
    assert bool((rows[0, :, :2] == 0).all())


def test_an_observation_is_computed_once_however_often_it_is_asked_for() -> None:
    class Counted(Rows, use="counted-of-this-test"):
        """Counts its updates."""

        def update(self, state: Tensor | None, block: AttentionBlock) -> Tensor:
            calls.append(1)
            return super().update(state, block)

    calls: list[int] = []
    assert len(observe(inputs(), [Counted(), Counted()])) == 1
    assert calls == [1]


def test_nothing_asked_for_is_nothing_done() -> None:
    assert observe(inputs(), []) == {}


def test_rho_with_sinks_is_the_share_of_all_attention() -> None:
    """Eq. 6 divides by the sum of the attention scores, which is below the number of rows where sinks take some."""
    sinks = torch.tensor([0.0, 2.0, -1.0, 3.0])
    seen = replace(make_sample(4, (12,)).inputs(), sinks=sinks)
    modality = seen.query_modality[0].tolist()
    rho = observe(seen, [CrossModalFlow()])[CrossModalFlow()]
    for head in range(4):
        attended = oracles.softmax_attention(seen.queries[0, head], seen.keys[0, head // 2], sink=float(sinks[head]))
        assert float(rho[0, head]) == pytest.approx(oracles.flow_ratio([attended], modality, modality), abs=1e-5)
