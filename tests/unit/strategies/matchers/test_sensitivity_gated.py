"""FlowMM's gate: which pivots are open, by hand and by the oracle."""

from __future__ import annotations

from dataclasses import replace

import oracles
import pytest
import torch
from kvcomp_strategies.matchers.sensitivity_gated import SensitivityGated
from pydantic import ValidationError

from kvcomp import LayerView, Pivots, Rule, Scores
from kvcomp.testing import make_sample

TOKENS, KEPT = 12, [0, 2, 4, 6, 8, 10]


def view(seed: int = 0, modality: int | None = None) -> LayerView:
    made = make_sample(seed, (TOKENS,), kv_heads=1, head_dim=4).view()
    return made if modality is None else replace(made, modality=torch.full_like(made.modality, modality))


def targets(
    importance: list[float],
    protected: tuple[int, ...] = (),
    seen: LayerView | None = None,
    rule: Rule = Rule.CROSS,
    **fields: object,
) -> dict[int, int]:
    """Which pivot (its token) each source goes to."""
    values, locked = torch.zeros(1, 1, TOKENS), torch.zeros(1, 1, TOKENS, dtype=torch.bool)
    values[0, 0, KEPT] = torch.tensor(importance, dtype=torch.float32)
    locked[0, 0, list(protected)] = True
    matcher = SensitivityGated(**fields)  # type: ignore[arg-type]
    pivots = Pivots(torch.tensor([[KEPT]]))
    edges = matcher.match(seen or view(), pivots, Scores(values, locked), torch.tensor([int(rule)]))
    pairs = zip(edges.sources[0, 0].tolist(), edges.targets[0, 0, :, 0].tolist(), strict=True)
    return {source: KEPT[target] for source, target in pairs if target >= 0}


def expected(open_pivots: list[int], seen: LayerView | None = None) -> dict[int, int]:
    keys = (seen or view()).keys[0, 0]
    sources = [token for token in range(TOKENS) if token not in KEPT]
    return {source: pivot for source in sources if (pivot := oracles.nearest(source, open_pivots, keys)) is not None}


@pytest.mark.parametrize(
    ("quantile", "open_pivots"),
    [(0.0, [0]), (0.19, [0]), (0.2, [0, 2]), (0.5, [0, 2, 4]), (0.8, [0, 2, 4, 6, 8]), (1.0, KEPT)],
)
def test_tau_is_a_linear_quantile_of_the_scored_pivots(quantile: float, open_pivots: list[int]) -> None:
    assert targets([1, 2, 3, 4, 5, 6], quantile=quantile) == expected(open_pivots)


def test_tau_is_between_two_pivots_by_interpolation() -> None:
    """Of 1, 2, 3, 4, 5 the quantile 0.8 is 4.2: the last is locked."""
    assert targets([1, 2, 3, 4, 5, 9], protected=(10,)) == expected([0, 2, 4, 6])


def test_proxies_are_left_out_of_the_quantile_and_receive_nothing() -> None:
    """With their zeros in the quantile, tau would be lower; as receivers they would be the least important."""
    assert targets([3, 1, 2, 0, 0, 0], protected=(6, 8, 10), quantile=0.5) == expected([2, 4])


def test_equal_importance_locks_nothing() -> None:
    assert targets([2.0] * 6, quantile=0.8) == expected(KEPT)


def test_one_scored_pivot_is_open() -> None:
    assert targets([7, 0, 0, 0, 0, 0], protected=(2, 4, 6, 8, 10)) == expected([0])


def test_where_only_proxies_stay_everything_else_is_evicted() -> None:
    assert targets([0] * 6, protected=tuple(KEPT)) == {}


def test_units_mean() -> None:
    """The mean of 1..6 is 3.5."""
    assert targets([1, 2, 3, 4, 5, 6], units="mean", threshold=1.0) == expected([0, 2, 4])
    assert targets([1, 2, 3, 4, 5, 0], protected=(10,), units="mean", threshold=1.0) == expected([0, 2, 4])


def test_units_absolute() -> None:
    assert targets([1, 2, 3, 4, 5, 6], units="absolute", threshold=2.0) == expected([0, 2])
    assert targets([1, 2, 3, 4, 5, 6], units="absolute", threshold=0.5) == {}


def test_skip_evicts_what_is_nearest_to_a_locked_pivot() -> None:
    free = expected(KEPT)
    assert targets([1, 2, 3, 4, 5, 6], blocked="skip", quantile=0.5) == {
        s: p for s, p in free.items() if p in (0, 2, 4)
    }


def test_fallback_nearest_ignores_importance_but_not_protection() -> None:
    nothing_open = {"units": "absolute", "threshold": 0.0, "fallback": "nearest"}
    assert targets([1, 2, 3, 4, 5, 6], protected=(8, 10), **nothing_open) == expected([0, 2, 4, 6])


def test_fallback_evict_where_no_pivot_has_the_modality() -> None:
    seen = view(modality=0)
    kinds = seen.modality.clone()
    kinds[..., 1::2] = 1
    mixed = replace(seen, modality=kinds)
    assert targets([1] * 6, seen=mixed, rule=Rule.INTRA) == {}
    assert targets([1] * 6, seen=mixed, rule=Rule.HETERO) == expected(KEPT)
    assert targets([1] * 6, seen=mixed, rule=Rule.INTRA, fallback="nearest") == expected(KEPT)


@pytest.mark.parametrize("seed", range(5))
def test_the_oracle_agrees(seed: int) -> None:
    seen = view(seed)
    importance = torch.rand(6, generator=torch.Generator().manual_seed(seed)).tolist()
    scored = dict(zip(KEPT[:4], importance[:4], strict=True))
    table = [scored.get(token, 0.0) for token in range(8)]
    open_pivots = oracles.eligible_pivots(table, KEPT, 0.8)
    assert targets(importance, protected=(8, 10), seen=seen) == expected(open_pivots, seen)


REFUSED = {
    "quantile above one": {"quantile": 1.01},
    "negative quantile": {"quantile": -0.1},
    "mean without threshold": {"units": "mean"},
    "quantile with threshold": {"threshold": 1.0},
    "unknown units": {"units": "median"},
    "unknown fallback": {"fallback": "merge"},
    "floor below minus one": {"floor": -1.5},
}


@pytest.mark.parametrize("case", REFUSED)
def test_settings_that_make_no_sense_are_refused(case: str) -> None:
    with pytest.raises(ValidationError):
        SensitivityGated(**REFUSED[case])
