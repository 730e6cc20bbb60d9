"""Scores and protection, by hand on small examples and by the oracle."""

from __future__ import annotations

from dataclasses import replace

import oracles
import oracles_evict
import pytest
import torch
from kvcomp_strategies.scorers.early_layer import EarlyLayer
from kvcomp_strategies.scorers.key_diversity import KeyDiversity
from kvcomp_strategies.scorers.key_norm import KeyNorm
from kvcomp_strategies.scorers.last_query import LastQuery
from kvcomp_strategies.scorers.position import Position
from kvcomp_strategies.scorers.post_vision import PostVision
from kvcomp_strategies.scorers.proxy_attention import ProxyAttention
from kvcomp_strategies.scorers.random import Random
from kvcomp_strategies.scorers.received_attention import ReceivedAttention
from kvcomp_strategies.scorers.reconstruction import Reconstruction
from kvcomp_strategies.scorers.text_first import TextFirst
from kvcomp_strategies.scorers.window_attention import WindowAttention
from torch import Tensor

from kvcomp import LayerView, Scorer
from kvcomp.core.attention import observe
from kvcomp.testing import Sample, make_sample

SLOTS = [1, 2, 3, 7, 20, 64, 70]


def seen_by(scorer: Scorer, sample: Sample) -> LayerView:
    return replace(sample.view(), observations=observe(sample.inputs(), scorer.observations()))


def attention(sample: Sample, head: int = 0) -> list[Tensor]:
    """The rows of the query group of a KV head, of the first row of the batch."""
    group = sample.queries.shape[1] // sample.keys.shape[1]
    return [
        oracles.softmax_attention(sample.queries[0, head * group + member], sample.keys[0, head])
        for member in range(group)
    ]


def protected(scorer: Scorer, tokens: int, slots: int) -> list[int]:
    mask = scorer.protect(seen_by(scorer, make_sample(0, (tokens,), kv_heads=1)), torch.tensor([slots]))
    return [] if mask is None else mask[0, 0].nonzero().flatten().tolist()


PROTECTED = {
    "streaming, more slots than sinks": (Position(), 9, 5, [0, 1, 2, 3]),
    "streaming, as many slots as sinks": (Position(), 9, 4, []),
    "streaming, fewer tokens than sinks": (Position(sinks=8), 3, 9, [0, 1, 2]),
    "h2o, odd": (ReceivedAttention(), 9, 5, [7, 8]),
    "h2o, one slot": (ReceivedAttention(), 9, 1, []),
    "h2o, a quarter": (ReceivedAttention(recent=0.25), 9, 8, [7, 8]),
    "h2o, all recent": (ReceivedAttention(recent=1.0), 9, 3, [6, 7, 8]),
    "snapkv, one slot": (WindowAttention(), 9, 1, []),
    "snapkv, half": (WindowAttention(), 9, 7, [6, 7, 8]),
    "snapkv, at most the window": (WindowAttention(window=2), 9, 8, [7, 8]),
    "flowmm, one slot": (ProxyAttention(), 9, 1, []),
    "flowmm, half": (ProxyAttention(), 9, 7, [6, 7, 8]),
    "flowmm, at most the proxies": (ProxyAttention(), 100, 80, list(range(68, 100))),
    "flowmm, a recent window": (ProxyAttention(proxies=1, recent=0.5), 9, 6, [6, 7, 8]),
    "flowmm, sinks": (ProxyAttention(sinks=2), 9, 2, [0, 1, 8]),
    "random": (Random(), 9, 4, []),
    "tova": (LastQuery(), 9, 4, []),
    "tova, as kvpress has it": (LastQuery(recent=1), 9, 4, [8]),
    "vl-cache, a tenth": (PostVision(), 40, 29, [38, 39]),
    "vl-cache, few slots": (PostVision(), 40, 9, []),
    "prefixkv": (ReceivedAttention(recent=0.0, sinks=4, latest=1), 9, 7, [0, 1, 2, 3, 8]),
    "key norm": (KeyNorm(), 9, 4, []),
}


@pytest.mark.parametrize("case", PROTECTED)
def test_what_is_protected(case: str) -> None:
    scorer, tokens, slots, expected = PROTECTED[case]
    assert protected(scorer, tokens, slots) == expected


@pytest.mark.parametrize(
    "scorer", [Position(), ReceivedAttention(), WindowAttention(), ProxyAttention(sinks=1)], ids=lambda s: s.use
)
def test_protection_can_differ_by_head(scorer: Scorer) -> None:
    view = seen_by(scorer, make_sample(0, (12,)))
    both = scorer.protect(view, torch.tensor([[2, 9]]))
    for head, slots in enumerate((2, 9)):
        alone = scorer.protect(view, torch.tensor([slots]))
        assert both is not None
        assert alone is not None
        assert torch.equal(both[:, head], alone[:, head])


def test_position_scores_by_recency() -> None:
    scores = Position().score(make_sample(0, (5,), kv_heads=1).view(), torch.tensor([2]))
    assert scores.diff(dim=-1).min() > 0


@pytest.mark.parametrize("head", [0, 1])
def test_received_attention_is_the_column_sum(head: int) -> None:
    sample = make_sample(1, (40,))
    scores = ReceivedAttention().score(seen_by(ReceivedAttention(), sample), torch.tensor([8]))
    expected = oracles.h2o_scores(attention(sample, head))
    torch.testing.assert_close(scores[0, head].tolist(), expected, rtol=1e-4, atol=1e-4)


def test_received_attention_can_be_divided_by_the_rows_that_see_a_token() -> None:
    sample = make_sample(1, (40,))
    scorer = ReceivedAttention(normalize="rows")
    scores = scorer.score(seen_by(scorer, sample), torch.tensor([8]))
    raw = oracles.h2o_scores(attention(sample))
    torch.testing.assert_close(scores[0, 0].tolist(), [s / (40 - i) for i, s in enumerate(raw)], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("slots", SLOTS)
def test_window_attention_is_the_pooled_vote_of_the_window(slots: int) -> None:
    sample = make_sample(2, (80,), kv_heads=1, group=2)
    scores = WindowAttention().score(seen_by(WindowAttention(), sample), torch.tensor([slots]))[0, 0]
    expected = oracles.snapkv_scores(attention(sample), slots)
    torch.testing.assert_close(scores[: len(expected)].tolist(), expected, rtol=1e-4, atol=1e-5)
    assert bool((scores[len(expected) :] == 0).all())


@pytest.mark.parametrize("slots", SLOTS)
def test_proxy_attention_is_equation_eight(slots: int) -> None:
    sample = make_sample(2, (80,), kv_heads=1, group=2)
    scores = ProxyAttention().score(seen_by(ProxyAttention(), sample), torch.tensor([slots]))[0, 0]
    expected = oracles.flowmm_importance(attention(sample), slots)
    torch.testing.assert_close(scores[: len(expected)].tolist(), expected, rtol=1e-4, atol=1e-5)
    assert bool((scores[len(expected) :] == 0).all())


def test_proxy_attention_can_take_the_largest_of_the_group() -> None:
    sample = make_sample(2, (30,), kv_heads=1, group=3)
    scorer = ProxyAttention(group="max", proxies=4)
    scores = scorer.score(seen_by(scorer, sample), torch.tensor([8]))[0, 0, :26]
    votes = [oracles.last_rows_sum(head, 4) for head in attention(sample)]
    expected = [max(column) for column in zip(*votes, strict=True)][:26]
    torch.testing.assert_close(scores.tolist(), expected, rtol=1e-4, atol=1e-5)


def test_slots_are_counted_row_by_row() -> None:
    """A row votes with a window of its own, whatever the others have."""
    both = make_sample(4, (30, 30))
    for scorer in (ProxyAttention(), WindowAttention(), ReceivedAttention()):
        together = scorer.score(seen_by(scorer, both), torch.tensor([4, 20]))
        for row, slots in enumerate((4, 20)):
            alone = scorer.score(seen_by(scorer, both.rows([row])), torch.tensor([slots]))
            torch.testing.assert_close(together[row], alone[0])


def test_random_is_a_lottery_by_seed_layer_head_and_position() -> None:
    def scores(seed: int = 0, **fields: int) -> Tensor:
        return Random(seed=seed).score(make_sample(0, (400,), **fields).view(), torch.tensor([9]))[0]

    assert torch.equal(scores(), scores())
    draws = [scores()[0], scores()[1], scores(seed=1)[0], scores(layer=2)[0]]
    for number, one in enumerate(draws):
        assert one.unique().numel() == 400
        assert abs(float(one.mean()) - 0.5) < 0.06
        for other in draws[number + 1 :]:
            assert abs(float(torch.corrcoef(torch.stack([one, other]))[0, 1])) < 0.2


def test_random_keeps_every_token_equally_often() -> None:
    view = make_sample(0, (10,), kv_heads=1).view()
    best = torch.zeros(10)
    for seed in range(2000):
        best[Random(seed=seed).score(view, torch.tensor([1]))[0, 0].argmax()] += 1
    assert bool(((best > 140) & (best < 260)).all()), best.tolist()


def test_random_goes_by_logical_position_so_padding_does_not_matter() -> None:
    padded, alone = make_sample(0, (5, 9)), make_sample(0, (5, 9)).alone(0)
    one, other = (Random().score(sample.view(), torch.tensor([2])) for sample in (padded, alone))
    assert torch.equal(one[0, :, 4:], other[0])


def test_an_open_window_puts_recent_tokens_and_sinks_in_tiers_and_protects_nothing() -> None:
    view = make_sample(0, (8,), kv_heads=1).view()
    open_window = ReceivedAttention(recent=0.5, sinks=3, window="open")
    assert open_window.protect(view, torch.tensor([4])) is None
    assert open_window.tiers(view, torch.tensor([4])).tolist() == [[[3, 2, 1, 0, 0, 0, 4, 4]]]  # type: ignore[union-attr]
    assert open_window.tiers(view, torch.tensor([1])).tolist() == [[[3, 2, 1, 0, 0, 0, 0, 0]]]  # type: ignore[union-attr]


def test_a_locked_window_protects_recent_tokens_and_sinks_and_makes_no_tiers() -> None:
    locked = ReceivedAttention(recent=0.5, sinks=2)
    assert locked.tiers(make_sample(0, (8,)).view(), torch.tensor([4])) is None
    assert protected(locked, 8, 4) == [0, 1, 6, 7]


def test_tiers_follow_what_each_head_was_allotted() -> None:
    view = make_sample(0, (8,), kv_heads=2).view()
    tiers = ReceivedAttention(window="open").tiers(view, torch.tensor([[2, 6]]))
    assert tiers.tolist() == [[[0, 0, 0, 0, 0, 0, 0, 1], [0, 0, 0, 0, 0, 1, 1, 1]]]  # type: ignore[union-attr]


def test_text_comes_first_inside_each_tier_of_the_scorer_inside() -> None:
    view = make_sample(0, (6,), kv_heads=1).view()
    view = replace(view, modality=torch.tensor([[[0, 1, 2, 0, 3, 0]]], dtype=torch.int8))
    plain = TextFirst(scorer=Random())
    assert plain.tiers(view, torch.tensor([4])).tolist() == [[[1, 0, 0, 1, 0, 1]]]
    assert torch.equal(plain.score(view, torch.tensor([4])), Random().score(view, torch.tensor([4])))
    recent_first = TextFirst(scorer=ReceivedAttention(window="open"))
    assert recent_first.tiers(view, torch.tensor([4])).tolist() == [[[1, 0, 0, 1, 2, 3]]]
    assert recent_first.observations() == ReceivedAttention().observations()


def test_reconstruction_goes_by_the_largest_attention_or_by_the_root_of_its_squares() -> None:
    sample = make_sample(0, (5,), kv_heads=2)
    rows = [torch.stack(attention(sample, head)).flatten(0, 1) for head in range(2)]  # (group rows, tokens)
    largest, squares = Reconstruction(), Reconstruction(received="squares")
    for scorer, expected in (
        (largest, [head.amax(dim=0) for head in rows]),
        (squares, [head.square().sum(dim=0).sqrt() for head in rows]),
    ):
        scores = scorer.score(seen_by(scorer, sample), torch.tensor([2]))
        torch.testing.assert_close(scores[0].double(), torch.stack(expected).double(), rtol=1e-5, atol=1e-6)
    (observed,) = squares.observations()
    assert observed.join(torch.tensor(0.25), torch.tensor(0.5)) == 0.75


def test_text_first_protects_what_the_scorer_inside_protects() -> None:
    assert protected(TextFirst(scorer=Position(sinks=2)), 9, 5) == [0, 1]


def test_pads_are_in_no_tier() -> None:
    view = make_sample(0, (3, 6)).view()
    for scorer in (TextFirst(), ReceivedAttention(sinks=4, window="open")):
        tiers = scorer.tiers(view, torch.tensor([2, 2]))
        assert tiers is not None
        assert bool((tiers[~view.valid] == 0).all())


def test_the_last_query_speaks_for_all_heads_or_for_its_group() -> None:
    sample = make_sample(1, (20,))
    rows = [attention(sample, head) for head in (0, 1)]
    for heads, groups in (("all", [rows[0] + rows[1]] * 2), ("group", rows)):
        scorer = LastQuery(heads=heads)  # type: ignore[arg-type]
        scores = scorer.score(seen_by(scorer, sample), torch.tensor([4]))
        for head, group in enumerate(groups):
            torch.testing.assert_close(scores[0, head].tolist(), oracles_evict.last_row(group), rtol=1e-4, atol=1e-6)


def test_received_attention_can_be_the_same_for_all_heads() -> None:
    sample = make_sample(1, (20,))
    scorer = ReceivedAttention(heads="all")
    scores = scorer.score(seen_by(scorer, sample), torch.tensor([4]))
    assert torch.equal(scores[:, 0], scores[:, 1])
    expected = oracles.h2o_scores(attention(sample, 0) + attention(sample, 1))
    torch.testing.assert_close(scores[0, 0].tolist(), expected, rtol=1e-4, atol=1e-5)


def test_votes_can_be_pooled_by_their_largest() -> None:
    sample = make_sample(2, (30,), kv_heads=1, group=2)
    scorer = WindowAttention(window=4, kernel=7, pooling="max")
    scores = scorer.score(seen_by(scorer, sample), torch.tensor([12]))[0, 0]
    expected, _ = oracles_evict.window_votes(attention(sample), 12, 4, 7, "max")
    torch.testing.assert_close(scores.tolist(), expected, rtol=1e-4, atol=1e-6)


def test_small_and_unusual_keys_score_high() -> None:
    view = make_sample(0, (4,), kv_heads=1, head_dim=4).view()
    keys = torch.tensor([[3.0, 4.0, 0.0, 0.0], [0.0] * 4, [6.0, 8.0, 0.0, 0.0], [0.0, 0.0, -2.0, 0.0]])
    view = replace(view, keys=keys[None, None])
    assert KeyNorm().score(view, torch.tensor([2]))[0, 0].tolist() == [-5.0, 0.0, -10.0, -2.0]
    differences = KeyDiversity().score(view, torch.tensor([2]))[0, 0]
    torch.testing.assert_close(differences.tolist(), oracles_evict.key_differences(keys), rtol=1e-5, atol=1e-6)
    assert differences[1] == 0.0
    assert int(differences.argmax()) == 1


def test_padding_has_no_direction() -> None:
    sample = make_sample(0, (5, 9))
    padded, alone = (KeyDiversity().score(s.view(), torch.tensor([2])) for s in (sample, sample.alone(0)))
    torch.testing.assert_close(padded[0, :, 4:], alone[0])


FIXED = {WindowAttention(): True, ProxyAttention(): True, EarlyLayer(): True, PostVision(): False, Position(): False}


@pytest.mark.parametrize("scorer", FIXED, ids=lambda s: s.use)
def test_windows_that_vote_keep_their_size(scorer: Scorer) -> None:
    assert scorer.protects_by_share == FIXED[scorer]
