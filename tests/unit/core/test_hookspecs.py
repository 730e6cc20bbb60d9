"""Everything that a plugin can contribute."""

import inspect

import kvcomp
from kvcomp.core import hookspecs

HOOKS = ("kvcomp_adapters", "kvcomp_parts", "kvcomp_recipes", "kvcomp_tasks", "kvcomp_testbeds")


def test_the_hooks_are_these_five_and_take_nothing() -> None:
    found = {name: hook for name, hook in vars(hookspecs).items() if name.startswith("kvcomp_")}
    assert tuple(sorted(found)) == HOOKS
    assert all(not inspect.signature(hook).parameters for hook in found.values())
    assert all(hook.__doc__.startswith("Return") for hook in found.values())


def test_hookimpl_is_public() -> None:
    assert kvcomp.hookimpl is hookspecs.hookimpl
