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
    "tova": ["uniform", "last-query", "uniform", "top-k", "none", "drop", "dense"],
    "pyramidkv": ["uniform", "window-attention", "pyramid", "top-k", "none", "drop", "dense"],
    "ada-kv": ["uniform", "window-attention", "ada-heads", "top-k", "none", "drop", "ragged"],
    "vl-cache": ["uniform", "post-vision", "sparsity", "top-k", "none", "drop", "dense"],
    "prefixkv": ["uniform", "received-attention", "prefix", "top-k", "none", "drop", "dense"],
    "key-norm": ["uniform", "key-norm", "uniform", "top-k", "none", "drop", "dense"],
    "keydiff": ["uniform", "key-diversity", "uniform", "top-k", "none", "drop", "dense"],
    "fastv": ["uniform", "early-layer", "protected-first", "top-k", "none", "drop", "dense"],
    "recency": ["uniform", "position", "uniform", "top-k", "none", "drop", "dense"],
    "look-m": ["uniform", "text-first", "uniform", "top-k", "nearest", "pivot-mean", "dense"],
    "look-m-mean": ["uniform", "text-first", "uniform", "top-k", "similarity-threshold", "mean", "dense"],
    "look-m-weighted": ["uniform", "text-first", "uniform", "top-k", "similarity-threshold", "weighted", "dense"],
    "look-m-evict": ["uniform", "text-first", "uniform", "top-k", "none", "drop", "dense"],
    "d2o": ["uniform", "received-attention", "variance", "top-k", "similarity-threshold", "weighted", "dense"],
    "meda": ["uniform", "text-first", "entropy", "top-k", "similarity-threshold", "mean", "dense"],
    "kvmerge": ["uniform", "received-attention", "uniform", "adjacent-clusters", "same-cluster", "gaussian", "dense"],
    "cam": ["uniform", "position", "uniform", "top-k", "following-window", "values-only", "dense"],
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
    assert strategy.budget == Budget.parse({"full": 1.0, "fastv": "0.6 or smallest"}.get(recipe, 0.2))


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


def test_the_defaults_of_the_cards_of_merging_methods() -> None:
    look_m, mean, weighted = (kvcomp.strategy(name) for name in ("look-m", "look-m-mean", "look-m-weighted"))
    inside = look_m.scorer.scorer
    assert (inside.use, inside.recent, inside.window, inside.sinks) == ("received-attention", 0.5, "open", 0)
    assert not look_m.selector.overflow
    assert mean.matcher.beta == weighted.matcher.beta == 1.0
    assert weighted.merger.weighting == "cosine_mean"
    d2o, kvmerge, cam = (kvcomp.strategy(name) for name in ("d2o", "kvmerge", "cam"))
    assert (d2o.scorer.recent, d2o.scorer.sinks, d2o.scorer.window) == (0.5, 4, "open")
    assert (d2o.matcher.beta, d2o.matcher.filter, d2o.merger.weighting) == (0.7, "head", "exp")
    assert d2o.allocator.skip_layers == ()
    assert kvcomp.strategy("meda").allocator.over == "all"
    assert (kvmerge.scorer.recent, kvmerge.selector.sensitive, kvmerge.selector.mode) == (0.35, 0.25, "budget")
    assert (kvmerge.merger.sigma, kvmerge.merger.value_scale) == ("distance", "none")
    assert (cam.scorer.sinks, cam.scorer.start, cam.matcher.window, cam.matcher.seed) == (0, 0.5, 32, 0)
    assert cam.merger.merger.use == "sum"
