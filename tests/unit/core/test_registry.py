"""The registry: plugins come and go, clashes and faults are named, nothing else breaks."""

from __future__ import annotations

import threading
import types
import warnings
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest
from torch import Tensor

import kvcomp
from kvcomp import DuplicateNameError, LayerView, PluginWarning, UnknownNameError, hookimpl
from kvcomp.core.registry import Registry, registry


class KeyNorm(kvcomp.Scorer, use="key-norm-of-this-test"):
    """Small-norm keys draw the most attention."""

    def score(self, layer: LayerView, slots: Tensor) -> Tensor:
        return -layer.keys.float().norm(dim=-1)


class Plugin:
    """A plugin with one part and one recipe."""

    @hookimpl
    def kvcomp_parts(self) -> list[type]:
        return [KeyNorm]

    @hookimpl
    def kvcomp_recipes(self) -> list[dict]:
        return [{"name": "norms-of-this-test", "scorer": "key-norm-of-this-test", "selector": "top-k"}]


def plugin(**hooks: object) -> types.ModuleType:
    """A module with these hooks, each returning what is given (or raising it)."""
    module = types.ModuleType("made_by_a_test")
    for name, value in hooks.items():
        module.__dict__[name] = hookimpl(_returning(value))
    return module


def _returning(value: object):  # type: ignore[no-untyped-def]
    def hook() -> object:
        if isinstance(value, Exception):
            raise value
        return value

    return hook


class Point:
    """An entry point that was never installed."""

    def __init__(self, name: str, loaded: object, package: str = "kvcomp-made-up") -> None:
        self.name, self.module, self._loaded = name, name, loaded
        self.dist = types.SimpleNamespace(name=package, version="1.2")

    def load(self) -> object:
        if isinstance(self._loaded, Exception):
            raise self._loaded
        return self._loaded


def offline(*points: object) -> Registry:
    return Registry(discover=lambda: list(points))  # type: ignore[arg-type]


def test_a_plugin_registers_is_used_by_name_and_goes() -> None:
    registry.register(Plugin(), name="of-this-test", package="kvcomp-test", version="9")
    try:
        strategy = kvcomp.strategy("norms-of-this-test", 0.5)
        entry = registry.find("scorer", "key-norm-of-this-test")
        assert isinstance(strategy.scorer, KeyNorm)
        assert entry.describe() == {
            "name": "key-norm-of-this-test",
            "kind": "scorer",
            "package": "kvcomp-test",
            "version": "9",
        }
    finally:
        registry.unregister("of-this-test")
    with pytest.raises(UnknownNameError, match="no scorer named 'key-norm-of-this-test'"):
        registry.find("scorer", "key-norm-of-this-test")


def test_the_built_in_parts_come_through_the_same_door() -> None:
    entry = registry.find("scorer", "proxy-attention")
    assert (entry.package, entry.kind) == ("kvcomp", "scorer")
    assert entry.version == kvcomp.__version__


def test_entries_are_sorted_and_filtered_by_kind() -> None:
    everything = registry.entries()
    keys = [(entry.kind, entry.name) for entry in everything]
    assert keys == sorted(keys)
    assert [entry for entry in everything if entry.kind == "recipe"] == list(registry.entries("recipe"))


def test_an_unknown_name_suggests_the_nearest() -> None:
    with pytest.raises(UnknownNameError, match=r"no scorer named 'proxi-attention'\. Did you mean 'proxy-attention'\?"):
        registry.find("scorer", "proxi-attention")


def test_nothing_loads_before_the_first_look_up() -> None:
    loaded = []
    door = Registry(discover=lambda: loaded.append(1) or [])  # type: ignore[func-returns-value]
    assert loaded == []
    door.entries()
    door.entries()
    assert loaded == [1]


def test_two_plugins_that_claim_a_name_are_both_named() -> None:
    door = offline(
        Point("one", plugin(kvcomp_parts=[KeyNorm]), "kvcomp-one"),
        Point("two", plugin(kvcomp_parts=[KeyNorm]), "kvcomp-two"),
    )
    with pytest.raises(DuplicateNameError, match=r"'key-norm-of-this-test': kvcomp-one 1\.2 and kvcomp-two 1\.2"):
        door.entries()


def test_a_clash_with_a_built_in_recipe_is_refused() -> None:
    registry.register(plugin(kvcomp_recipes=[{"name": "h2o"}]), name="clash", package="kvcomp-clash")
    try:
        with pytest.raises(DuplicateNameError, match=r"recipe name 'h2o'.*kvcomp-clash"):
            kvcomp.strategy("h2o")
    finally:
        registry.unregister("clash")
    assert kvcomp.strategy("h2o").name == "h2o"


FAULTS = {
    "does not import": Point("broken", ImportError("no module named nonsense"), "kvcomp-broken"),
    "hook raises": Point("broken", plugin(kvcomp_parts=ValueError("no parts today")), "kvcomp-broken"),
    "hook returns no classes": Point("broken", plugin(kvcomp_parts=[3]), "kvcomp-broken"),
    "hook returns nothing": Point("broken", plugin(kvcomp_recipes=None), "kvcomp-broken"),
    "hook returns a part without a name": Point("broken", plugin(kvcomp_parts=[kvcomp.Scorer]), "kvcomp-broken"),
    "recipe without a name": Point("broken", plugin(kvcomp_recipes=[{"budget": 0.2}]), "kvcomp-broken"),
    "task without a name": Point("broken", plugin(kvcomp_tasks=[object()]), "kvcomp-broken"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_broken_plugin_is_named_and_skipped_and_the_others_load(fault: str) -> None:
    door = offline(FAULTS[fault], Point("healthy", plugin(kvcomp_parts=[KeyNorm])))
    with pytest.warns(PluginWarning, match=r"kvcomp-broken 1\.2 .*skipped: \w+Error"):
        names = [entry.name for entry in door.entries()]
    assert names == ["key-norm-of-this-test"]


def test_a_broken_plugin_is_reported_once() -> None:
    door = offline(FAULTS["hook raises"])
    with pytest.warns(PluginWarning):
        door.entries()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert door.entries() == ()


def test_a_plugin_with_an_unknown_hook_is_named_and_skipped() -> None:
    door = offline(Point("typo", plugin(kvcomp_part=[KeyNorm]), "kvcomp-typo"))
    with pytest.warns(PluginWarning, match="kvcomp-typo.*kvcomp_part"):
        assert door.entries() == ()


def test_registering_a_plugin_with_an_unknown_hook_leaves_the_registry_usable() -> None:
    door = offline(Point("healthy", plugin(kvcomp_parts=[KeyNorm])))
    with pytest.raises(Exception, match="kvcomp_part"):
        door.register(plugin(kvcomp_part=[KeyNorm]), name="typo")
    door.register(plugin(kvcomp_recipes=[{"name": "later"}]), name="later")
    assert [entry.name for entry in door.entries()] == ["later", "key-norm-of-this-test"]


def test_an_entry_point_without_a_distribution_is_named_by_its_module() -> None:
    point = EntryPoint(name="lost", value="no_such_module_of_kvcomp", group="kvcomp")
    with pytest.warns(PluginWarning, match="'lost' of no_such_module_of_kvcomp"):
        assert offline(point).entries() == ()


def test_recipes_are_named_by_their_file_or_their_name() -> None:
    door = offline(Point("one", plugin(kvcomp_recipes=[Path("/nowhere/by-file.yaml"), {"name": "by-name"}])))
    assert [entry.name for entry in door.entries("recipe")] == ["by-file", "by-name"]


def test_many_threads_see_the_same_entries() -> None:
    door = offline(Point("healthy", plugin(kvcomp_parts=[KeyNorm])))
    seen: list[object] = []
    threads = [threading.Thread(target=lambda: seen.append(door.entries())) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(seen) == 8
    assert len(set(map(len, seen))) == 1  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "hooks",
    [
        {"kvcomp_recipes": [{"name": 3}]},
        {"kvcomp_adapters": [types.SimpleNamespace(use="half")]},
        {"kvcomp_tasks": [types.SimpleNamespace(name="")]},
    ],
    ids=["a recipe's name is a number", "an adapter is none", "a task has no name"],
)
def test_a_plugin_that_gives_nonsense_is_named_and_skipped(hooks: dict) -> None:
    mine = Registry(discover=lambda: [])
    mine.register(plugin(**hooks), "nonsense", package="kvcomp-nonsense")
    mine.register(Plugin(), "sound")
    with pytest.warns(PluginWarning, match="kvcomp-nonsense"):
        assert [entry.name for entry in mine.entries("recipe")] == ["norms-of-this-test"]
