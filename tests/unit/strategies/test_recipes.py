"""The recipe files are the methods of the papers."""

import pytest

import kvcomp
from kvcomp import Budget

PARTS = {
    "full": ["uniform", "uniform", "none", "drop", "dense"],
    "random": ["uniform", "random", "uniform", "top-k", "none", "drop", "dense"],
    "streaming-llm": ["uniform", "position", "uniform", "top-k", "none", "drop", "dense"],
    "h2o": ["uniform", "received-attention", "uniform", "top-k", "none", "drop", "dense"],
    "snapkv": ["uniform", "window-attention", "uniform", "top-k", "none", "drop", "dense"],
    "flowmm": ["flow-guided", "proxy-attention", "uniform", "top-k", "sensitivity-gated", "pivot-mean", "dense"],
    "flowmm-misaligned": [
        "misaligned",
        "proxy-attention",
        "uniform",
        "top-k",
        "sensitivity-gated",
        "pivot-mean",
        "dense",
    ],
    "flowmm-no-flow": ["uniform", "proxy-attention", "uniform", "top-k", "sensitivity-gated", "pivot-mean", "dense"],
    "flowmm-no-gate": ["flow-guided", "proxy-attention", "uniform", "top-k", "nearest", "pivot-mean", "dense"],
    "flowmm-no-flow-no-gate": ["uniform", "proxy-attention", "uniform", "top-k", "nearest", "pivot-mean", "dense"],
}


@pytest.mark.parametrize("recipe", PARTS)
def test_a_recipe_is_made_of_these_parts(recipe: str) -> None:
    strategy = kvcomp.strategy(recipe)
    assert [part.use for part in strategy.parts] == PARTS[recipe]
    assert strategy.name == recipe
    assert strategy.budget == Budget.parse(1.0 if recipe == "full" else 0.2)


def test_the_defaults_of_the_card() -> None:
    flowmm = kvcomp.strategy("flowmm")
    assert (flowmm.policy.threshold, flowmm.policy.cross, flowmm.policy.absent) == (0.25, "any", "intra")
    assert (flowmm.scorer.proxies, flowmm.scorer.recent, flowmm.scorer.sinks) == (32, 0.0, 0)
    assert (flowmm.scorer.group, flowmm.scorer.kernel) == ("mean", 1)
    assert (flowmm.matcher.quantile, flowmm.matcher.units, flowmm.matcher.floor) == (0.8, "quantile", -1.0)
    assert (flowmm.matcher.fallback, flowmm.matcher.blocked) == ("evict", "next-best")
    snapkv, h2o = kvcomp.strategy("snapkv").scorer, kvcomp.strategy("h2o").scorer
    assert (snapkv.window, snapkv.kernel) == (32, 5)
    assert (h2o.recent, h2o.normalize) == (0.5, "none")
    assert kvcomp.strategy("streaming-llm").scorer.sinks == 4
