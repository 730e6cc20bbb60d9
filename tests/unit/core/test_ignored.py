"""Settings that change nothing are named, each once, and no others."""

from __future__ import annotations

import warnings

import pytest

import kvcomp
from kvcomp.core.ignored import ignored_settings, warn_of_ignored
from kvcomp.core.registry import registry

EVICTING = {"scorer": "position", "selector": "top-k"}
MERGING = {**EVICTING, "matcher": "nearest", "merger": "mean"}
IGNORED = {
    "a budget": ({"budget": 0.2}, "has no selector, so it keeps everything and ignores the budget 0.2"),
    "a trigger": ({"trigger": "over-budget"}, "ignores the trigger over-budget"),
    "a scorer": ({"scorer": "position"}, "has no selector, so its scorer 'position' does nothing"),
    "an allocator": ({"base": "kivi", "allocator": "pyramid"}, "so its allocator 'pyramid' does nothing"),
    "a matcher": ({"base": "kivi", "matcher": "nearest"}, "so its matcher 'nearest' does nothing"),
    "a merger": ({"base": "kivi", "merger": "mean"}, "so its merger 'mean' does nothing"),
    "a policy that rules nothing": ({**EVICTING, "policy": "flow-guided"}, "its policy 'flow-guided' measures rho and"),
    "mass of what stays": ({"base": "kivi", "mass_preserving": True}, "has no selector, so every slot stands for one"),
    "mass": ({**EVICTING, "mass_preserving": True}, "stands for one token and mass_preserving changes nothing"),
}


@pytest.mark.parametrize("case", IGNORED)
def test_what_changes_nothing_is_named(case):
    document, sentence = IGNORED[case]
    (ignored,) = ignored_settings(kvcomp.strategy(document))
    assert sentence in ignored


def test_two_ignored_settings_are_two_warnings_at_the_caller():
    strategy = kvcomp.strategy("snapkv", selector=None, budget=0.3)
    with pytest.warns(kvcomp.IgnoredSettingWarning) as caught:
        warn_of_ignored(strategy, stacklevel=1)
    about = [str(warning.message) for warning in caught]
    assert ["ignores the budget 0.3" in about[0], "its scorer 'window-attention'" in about[1], len(about)] == [
        True,
        True,
        2,
    ]
    assert {warning.filename for warning in caught} == {__file__}


@pytest.mark.parametrize("recipe", [entry.name for entry in registry.entries("recipe")])
def test_no_recipe_ignores_a_setting_of_its_own(recipe):
    assert ignored_settings(kvcomp.strategy(recipe)) == ()


@pytest.mark.parametrize("changes", [{}, {"policy": "flow-guided"}, {"mass_preserving": True}], ids=str)
def test_nothing_is_said_of_what_has_an_effect(changes):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_of_ignored(kvcomp.strategy({**MERGING, "budget": 0.2, **changes}), stacklevel=1)
