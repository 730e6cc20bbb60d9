"""Strategies from names, files and mappings; every fault in one go, each with its path."""

from __future__ import annotations

from pathlib import Path

import pytest

import kvcomp
from kvcomp import Budget, ConfigError, InputError, UnknownNameError
from kvcomp.core.config import DEFAULT_PARTS, load_document, recipe_document
from kvcomp.core.registry import registry

TOP_K = {"scorer": "position", "selector": "top-k"}


def faults(source: object, *args: object, **overrides: object) -> tuple[str, ...]:
    with pytest.raises(ConfigError) as caught:
        kvcomp.strategy(source, *args, **overrides)  # type: ignore[arg-type]
    return caught.value.faults


BAD = {
    "field out of range": (
        {**TOP_K, "matcher": {"use": "sensitivity-gated", "quantile": 1.4}, "merger": "mean"},
        "matcher.quantile: *got 1.4",
    ),
    "unknown field": (
        {**TOP_K, "policy": {"use": "flow-guided", "treshold": 0.2}},
        "policy.treshold: 'flow-guided' has no field 'treshold'. Did you mean 'threshold'?",
    ),
    "wrong type": (
        {"scorer": {"use": "position", "sinks": "four"}, "selector": "top-k"},
        "scorer.sinks: *integer, got 'four'",
    ),
    "no coercion": (
        {"scorer": {"use": "position", "sinks": "4"}, "selector": "top-k"},
        "scorer.sinks: *integer, got '4'",
    ),
    "unknown part": ({"scorer": "positon", "selector": "top-k"}, "scorer.use: no scorer named 'positon'. Did you mean"),
    "unknown choice": (
        {**TOP_K, "policy": {"use": "flow-guided", "cross": "all"}},
        "policy.cross: *'any' or 'hetero', got 'all'",
    ),
    "unknown key": ({**TOP_K, "scorers": "position"}, "scorers: no such key. Did you mean 'scorer'?"),
    "part without use": ({"scorer": {"sinks": 4}, "selector": "top-k"}, "scorer: must be a name or {use: NAME"),
    "part is a number": (
        {"scorer": 3, "selector": "top-k"},
        "scorer: must be a name or {use: NAME, field: value}, got 3",
    ),
    "budget": ({**TOP_K, "budget": 3}, "budget: a bare budget is a ratio in (0, 1], got 3"),
    "turns": ({**TOP_K, "turns": "never"}, "turns: must be one of recompress, append, got 'never'"),
    "mass_preserving": ({**TOP_K, "mass_preserving": 1}, "mass_preserving: must be one of false, true, got 1"),
    "base": ({"base": "flowm"}, "base: no recipe named 'flowm'. Did you mean 'flowmm'?"),
    "set": ({"base": "flowmm", "set": [1]}, "set: must be a mapping of overrides, got [1]"),
    "set path": (
        {"base": "flowmm", "set": {"polcy.threshold": 1}},
        "polcy.threshold: no part named 'polcy'. Did you mean",
    ),
    "field of a setting": (
        {"base": "flowmm", "set": {"trigger.every": 4}},
        "trigger.every: 'trigger' is no part and has no fields; give it whole, as trigger=VALUE",
    ),
    "settings that disagree": (
        {**TOP_K, "matcher": {"use": "sensitivity-gated", "units": "mean"}, "merger": "mean"},
        "matcher: threshold must be given with units 'mean' or 'absolute', and only then",
    ),
    "part inside a part": (
        {**TOP_K, "matcher": "nearest", "merger": {"use": "values-only", "merger": {"use": "pivot-men"}}},
        "merger.merger.use: no merger named 'pivot-men'. Did you mean 'pivot-mean'?",
    ),
    "part inside a part is a number": (
        {**TOP_K, "matcher": "nearest", "merger": {"use": "values-only", "merger": 3}},
        "merger.merger: must be a name or {use: NAME, field: value}, got 3",
    ),
    "part inside a part without use": (
        {**TOP_K, "matcher": "nearest", "merger": {"use": "values-only", "merger": {"growth": 2}}},
        "merger.merger: must be a name or {use: NAME, field: value}, got",
    ),
    "field of a part inside a part": (
        {**TOP_K, "matcher": "nearest", "merger": {"use": "values-only", "merger": {"use": "mean", "floor": 2}}},
        "merger.merger.floor: 'mean' has no field 'floor'.",
    ),
    "part inside a part that does not fit": (
        {**TOP_K, "matcher": "nearest", "merger": {"use": "values-only", "merger": "drop"}},
        "merger.merger: must be a merger that merges, and 'drop' does not",
    ),
    "even kernel": (
        {"scorer": {"use": "window-attention", "kernel": 4}, "selector": "top-k"},
        "scorer.kernel: must be odd, so that the pooled score stays at its token, got 4",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_a_fault_is_named_by_its_path(case: str) -> None:
    document, expected = BAD[case]
    found = faults(document)
    path, _, message = expected.partition("*")
    assert any(fault.startswith(path) and message in fault for fault in found), found


def test_all_faults_come_in_one_go() -> None:
    document = {
        "budget": 7,
        "policy": {"use": "flow-guided", "threshold": 2.0, "crss": "any"},
        "scorer": "positon",
        "selector": "top-k",
        "merge": "mean",
    }
    found = faults(document, **{"polic.threshold": 1})
    starts = ["budget:", "merge:", "polic.threshold:", "policy.crss:", "policy.threshold:", "scorer.use:"]
    assert [fault.split(" ")[0] for fault in found] == starts
    assert found == tuple(sorted(found))


def test_a_fault_in_a_named_recipe_says_which() -> None:
    with pytest.raises(ConfigError, match=r"^recipe 'flowmm' has 1 fault"):
        kvcomp.strategy("flowmm", **{"policy.threshold": 1.5})


def test_an_unknown_recipe_suggests_the_nearest() -> None:
    with pytest.raises(UnknownNameError, match=r"no recipe named 'snap-kv'\. Did you mean 'snapkv'\?"):
        kvcomp.strategy("snap-kv")


def test_defaults_make_two_parts_a_strategy() -> None:
    strategy = kvcomp.strategy(TOP_K)
    assert strategy.name == "custom"
    assert strategy.budget == Budget.parse(1.0)
    assert [part.use for part in strategy.parts] == ["uniform", "position", "uniform", "top-k", "none", "drop", "dense"]
    assert (strategy.turns, strategy.mass_preserving) == ("recompress", False)


def test_a_dotted_override_changes_a_field_of_the_part_that_is_there() -> None:
    before = kvcomp.strategy("flowmm", **{"scorer.kernel": 3})
    after = kvcomp.strategy(before, **{"scorer.proxies": 16})
    assert (after.scorer.proxies, after.scorer.kernel) == (16, 3)
    assert (before.scorer.proxies, before.scorer.kernel) == (32, 3)


def test_a_dotted_override_reaches_a_part_given_by_its_name_alone() -> None:
    assert kvcomp.strategy(TOP_K, **{"scorer.sinks": 1}).scorer.sinks == 1
    assert kvcomp.strategy(TOP_K, **{"store.growth": 2.0}).store.growth == 2.0


@pytest.mark.parametrize("merger", ["mean", {"use": "mean"}], ids=["name", "mapping"])
def test_a_bare_override_replaces_the_part(merger: object) -> None:
    assert kvcomp.strategy("flowmm", merger=merger).merger.use == "mean"


def test_settings_are_overrides_too() -> None:
    strategy = kvcomp.strategy("h2o", 0.5, turns="append", mass_preserving=True, name="mine")
    assert (strategy.turns, strategy.mass_preserving, strategy.name) == ("append", True, "mine")
    assert strategy.budget == Budget.parse(0.5)


def test_a_key_that_is_a_field_of_a_part_is_named_with_its_part() -> None:
    """A field of two parts with both; one of no part that is there as any other key."""
    assert faults("flowmm", quantile=0.5) == ("quantile: no such key. Did you mean 'matcher.quantile'?",)
    both = ("threshold: no such key. Did you mean 'policy.threshold' or 'matcher.threshold'?",)
    assert faults("flowmm", threshold=0.3) == both
    assert "Did you mean" not in faults("h2o", quantile=0.5)[0]


def test_a_missing_part_has_no_field_to_change() -> None:
    assert faults("full", **{"scorer.sinks": 2}) == ("scorer.sinks: this strategy has no scorer to change",)


def test_base_and_set_change_two_fields_of_a_recipe() -> None:
    strategy = kvcomp.strategy({"base": "flowmm", "name": "mine", "set": {"policy.threshold": 0.3, "merger": "mean"}})
    assert (strategy.name, strategy.policy.threshold, strategy.merger.use) == ("mine", 0.3, "mean")
    assert strategy.scorer == kvcomp.strategy("flowmm").scorer


def test_a_base_may_have_a_base() -> None:
    strategy = kvcomp.strategy({"base": "flowmm-no-flow", "set": {"matcher": "nearest"}})
    ablation = kvcomp.strategy("flowmm-no-flow-no-gate")
    assert (strategy.policy, strategy.matcher, strategy.merger) == (ablation.policy, ablation.matcher, ablation.merger)


def test_a_base_with_its_own_keys_prefers_them() -> None:
    assert kvcomp.strategy({"base": "h2o", "budget": 0.4}).budget == Budget.parse(0.4)


def test_a_source_is_not_changed() -> None:
    document = {"base": "flowmm", "set": {"policy.threshold": 0.3}, "scorer": {"use": "proxy-attention"}}
    copy = {**document, "set": dict(document["set"]), "scorer": dict(document["scorer"])}
    kvcomp.strategy(document, 0.1, **{"scorer.proxies": 8})
    assert document == copy


def test_a_registered_recipe_is_not_changed_by_overrides() -> None:
    kvcomp.strategy("flowmm", **{"policy.threshold": 0.9})
    assert kvcomp.strategy("flowmm").policy.threshold == 0.25


def test_a_file_is_named_by_its_stem(tmp_path: Path) -> None:
    file = tmp_path / "my-method.yaml"
    file.write_text("budget: {tokens: 8}\nscorer: {use: position, sinks: 2}\nselector: top-k\n")
    for source in (file, str(file)):
        strategy = kvcomp.strategy(source)
        assert (strategy.name, strategy.budget, strategy.scorer.sinks) == ("my-method", Budget(tokens=8), 2)


FILES = {
    "python object": ("scorer: !!python/object/apply:os.system ['echo unsafe']", "a strategy file must be YAML"),
    "no YAML": ("scorer: [", "a strategy file must be YAML"),
    "a list": ("- 1\n- 2\n", "must hold a mapping of parts, got list"),
    "empty": ("", "must hold a mapping of parts, got nothing"),
    "a word": ("flowmm", "must hold a mapping of parts, got str"),
}


@pytest.mark.parametrize("case", FILES)
def test_a_file_that_is_no_strategy_is_refused(case: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    text, message = FILES[case]
    file = tmp_path / "bad.yaml"
    file.write_text(text)
    with pytest.raises(InputError, match=message) as caught:
        load_document(file)
    assert str(file) in str(caught.value)
    assert "unsafe" not in capfd.readouterr().out


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"must be readable text: .*nowhere"):
        kvcomp.strategy(tmp_path / "nowhere.yaml")


def test_a_binary_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "image.yaml").write_bytes(b"\xff\xfe\x00\x01")
    with pytest.raises(InputError, match="must be readable text"):
        kvcomp.strategy(tmp_path / "image.yaml")


def test_a_recipe_document_has_its_name() -> None:
    document = recipe_document("flowmm")
    assert document["name"] == "flowmm"
    assert document["policy"] == {"use": "flow-guided", "threshold": 0.25}


def test_the_recipe_of_the_design_is_the_recipe_of_the_registry() -> None:
    strategy = kvcomp.strategy(
        {
            "name": "flowmm",
            "budget": 0.2,
            "policy": {"use": "flow-guided", "threshold": 0.25},
            "scorer": {"use": "proxy-attention", "proxies": 32},
            "selector": {"use": "top-k"},
            "matcher": {"use": "sensitivity-gated", "quantile": 0.8},
            "merger": {"use": "pivot-mean"},
        }
    )
    assert strategy == kvcomp.strategy("flowmm")


def test_a_strategy_with_a_base_that_is_itself_is_refused(tmp_path: Path) -> None:
    class Plugin:
        @kvcomp.hookimpl
        def kvcomp_recipes(self) -> list[dict]:
            return [{"name": "snake", "base": "snake"}]

    registry.register(Plugin(), name="snake-plugin")
    try:
        with pytest.raises(ConfigError, match=r"base: .*snake"):
            kvcomp.strategy("snake")
    finally:
        registry.unregister("snake-plugin")


@pytest.mark.parametrize("source", [3, None, ["flowmm"]], ids=str)
def test_a_source_of_no_known_kind_is_refused(source: object) -> None:
    with pytest.raises(kvcomp.KVCompError, match="recipe name"):
        kvcomp.strategy(source)  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", ["policy", "allocator", "matcher", "merger", "store"])
def test_an_empty_part_is_the_default(kind: str) -> None:
    document = {"budget": 0.5, "scorer": "random", "selector": "top-k", kind: None}
    assert kvcomp.strategy(document) == kvcomp.strategy({**document, kind: DEFAULT_PARTS[kind]})


def test_a_key_that_stands_twice_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "twice.yaml"
    path.write_text("scorer: random\nscorer: position\nselector: top-k\n")
    with pytest.raises(kvcomp.InputError, match="the key 'scorer' stands twice"):
        kvcomp.strategy(path)


def test_conflicts_are_listed_with_the_other_faults() -> None:
    with pytest.raises(kvcomp.ConfigError) as caught:
        kvcomp.strategy({"budget": 1.4, "scorer": "random", "selector": "top-k", "matcher": "nearest", "name": [1]})
    assert len(caught.value.faults) == 3
    assert "matcher: 'nearest' needs merging" in str(caught.value)


def test_an_override_of_a_part_that_is_no_part_is_a_fault() -> None:
    with pytest.raises(kvcomp.ConfigError, match="scorer: must be a name"):
        kvcomp.strategy({"scorer": [1], "selector": "top-k"}, **{"scorer.seed": 3})


@pytest.mark.parametrize("change", [{"scorer.kernel": 4}, {"policy.strata": 0}])
def test_settings_that_would_fail_later_are_refused_now(change: dict[str, int]) -> None:
    with pytest.raises(kvcomp.ConfigError, match="must be"):
        kvcomp.strategy("flowmm", **change)


def test_all_faults_of_a_part_inside_a_part_come_with_those_of_its_holder() -> None:
    merger = {"use": "values-only", "mergr": 1, "merger": {"use": "values-only", "merger": {"use": "men"}, "x": 1}}
    found = faults({**TOP_K, "matcher": "nearest", "merger": merger})
    assert [fault.split(" ")[0] for fault in found] == [
        "merger.merger.merger.use:",
        "merger.merger.x:",
        "merger.mergr:",
    ]


INSIDE = {**TOP_K, "matcher": "nearest", "merger": "values-only"}


def test_a_part_inside_a_part_is_a_name_or_a_mapping() -> None:
    by_name = kvcomp.strategy({**INSIDE, "merger": {"use": "values-only", "merger": "mean"}})
    by_mapping = kvcomp.strategy({**INSIDE, "merger": {"use": "values-only", "merger": {"use": "mean"}}})
    assert by_name.merger == by_mapping.merger
    assert by_name.merger.merger.use == "mean"
    assert kvcomp.strategy(by_name.dump()) == by_name


def test_an_override_reaches_into_a_part_inside_a_part() -> None:
    deep = {"use": "values-only", "merger": {"use": "unrotated"}}
    changed = kvcomp.strategy({**INSIDE, "merger": deep}, **{"merger.merger.merger": "mean"})
    assert [part.use for part in changed.merger.family()] == ["values-only", "unrotated", "mean"]
    assert deep == {"use": "values-only", "merger": {"use": "unrotated"}}


def test_an_override_reaches_a_part_inside_a_part_that_the_file_leaves_to_its_default() -> None:
    assert kvcomp.strategy(INSIDE, **{"merger.merger.use": "mean"}).merger.merger.use == "mean"


@pytest.mark.parametrize("path", ["merger.merge.floor", "scorer.sinks.much"])
def test_an_override_of_a_part_that_is_not_inside_is_a_fault(path: str) -> None:
    name = path.partition(".")[2]
    (fault,) = faults(INSIDE, **{path: 1})
    assert fault.startswith(f"{path}: ")
    assert f"has no field '{name}'" in fault


def test_what_a_part_inside_a_part_needs_is_needed() -> None:
    (fault,) = faults({**TOP_K, "merger": "values-only"})
    assert fault == "merger: 'pivot-mean' needs edges, which no part of this pipeline provides"
