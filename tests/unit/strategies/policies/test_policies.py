"""Which rule a layer gets: flow-guided, misaligned, uniform."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from kvcomp_strategies.observations.cross_modal_flow import CrossModalFlow
from kvcomp_strategies.policies.flow_guided import FlowGuided
from kvcomp_strategies.policies.misaligned import Misaligned
from kvcomp_strategies.policies.uniform import UniformPolicy
from pydantic import ValidationError

from kvcomp import LayerView, Modality, Rule
from kvcomp.testing import make_sample


def view(
    *rho: float, policy: FlowGuided | None = None, modalities: tuple[Modality, ...] = (Modality.TEXT, Modality.IMAGE)
) -> LayerView:
    """Rows whose two heads have this rho on average."""
    made = make_sample(0, (20,) * len(rho), modalities=modalities).view()
    flow = torch.tensor(rho)[:, None] + torch.tensor([0.125, -0.125])
    (observation,) = (policy or FlowGuided()).observations()
    return replace(made, observations={observation: flow})


def rules(policy: FlowGuided, *rho: float) -> list[Rule]:
    return [Rule(rule) for rule in policy.plan(view(*rho, policy=policy)).rule.tolist()]


CROSS, INTRA, HETERO = Rule.CROSS, Rule.INTRA, Rule.HETERO


@pytest.mark.parametrize(
    ("policy", "expected"),
    [
        (FlowGuided(), [INTRA, INTRA, CROSS]),
        (FlowGuided(cross="hetero"), [INTRA, INTRA, HETERO]),
        (FlowGuided(threshold=0.0), [CROSS] * 3),
        (FlowGuided(threshold=1.0), [INTRA] * 3),
        (Misaligned(), [HETERO, HETERO, INTRA]),
        (Misaligned(cross="any"), [CROSS, CROSS, INTRA]),
    ],
    ids=["default", "hetero", "zero", "one", "misaligned", "misaligned any"],
)
def test_the_rule_goes_by_the_mean_over_heads_and_equality_is_below(policy: FlowGuided, expected: list[Rule]) -> None:
    assert rules(policy, 0.125, 0.25, 0.5) == expected


def test_rho_and_share_are_reported_per_row() -> None:
    plan = FlowGuided().plan(view(0.25, 0.5))
    assert plan.rho.tolist() == [0.25, 0.5]
    assert plan.share.tolist() == [1.0, 1.0]
    assert plan.rule.dtype == torch.int8


@pytest.mark.parametrize("modality", [Modality.TEXT, Modality.IMAGE])
@pytest.mark.parametrize(
    ("policy", "expected"), [(FlowGuided(), INTRA), (FlowGuided(absent="any"), CROSS), (Misaligned(), INTRA)]
)
def test_one_modality_has_no_rho(modality: Modality, policy: FlowGuided, expected: Rule) -> None:
    plan = policy.plan(view(0.9, policy=policy, modalities=(modality,)))
    assert math.isnan(plan.rho.item())
    assert plan.rule.tolist() == [expected]


def test_the_modality_of_padding_does_not_count() -> None:
    """A row of images behind pads that look like text has one modality."""
    made = view(0.5, 0.5)
    modality, valid = made.modality.clone(), made.valid.clone()
    modality[0, :, :10], modality[0, :, 10:] = 0, 1
    valid[0, :, :10] = False
    plan = FlowGuided().plan(replace(made, modality=modality, valid=valid))
    assert plan.rho.isnan().tolist() == [True, False]


def test_a_modality_that_only_one_head_still_holds_counts() -> None:
    made = view(0.5)
    modality = torch.zeros_like(made.modality)
    modality[0, 1, 3] = 1
    assert FlowGuided().plan(replace(made, modality=modality)).rho.tolist() == [0.5]


def test_settings_reach_the_observation() -> None:
    policy = FlowGuided(rows="all", exact=64, strata=16)
    assert policy.observations() == (CrossModalFlow(rows_used="all", exact=64, strata=16),)
    assert Misaligned().observations() == FlowGuided().observations()


def test_uniform_lets_every_row_cross_and_measures_nothing() -> None:
    plan = UniformPolicy().plan(make_sample(0, (5, 3)).view())
    assert plan.rule.tolist() == [Rule.CROSS] * 2
    assert plan.rho.isnan().all()
    assert UniformPolicy().observations() == ()


@pytest.mark.parametrize("threshold", [-0.01, 1.01, "0.2"])
def test_a_threshold_that_is_no_share_is_refused(threshold: object) -> None:
    with pytest.raises(ValidationError):
        FlowGuided(threshold=threshold)  # type: ignore[arg-type]
