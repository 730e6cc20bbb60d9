"""The public surface: what `kvcomp` exports is there, documented, and all there is."""

from __future__ import annotations

import importlib
import inspect
import types

import pytest

import kvcomp
import kvcomp.testing

# the interfaces, the types, every error class, and the functions
PROMISED = {
    *("compress", "attach", "strategy", "load_cache", "hookimpl", "Budget", "Strategy"),
    *("LayerPolicy", "BudgetAllocator", "Scorer", "PivotSelector", "Matcher", "Merger", "Store", "Observation"),
    *("ModelAdapter", "SlotStorage", "LayerView", "Scores", "LayerPlan", "Pivots", "Assignment", "AttentionBlock"),
    *("MergePlan", "CompressedLayer", "Modality", "Rule"),
}


@pytest.mark.parametrize("module", ["kvcomp", "kvcomp.testing"])
def test_all_is_exactly_what_is_imported_by_name(module: str) -> None:
    package = importlib.import_module(module)
    public = {
        name
        for name, value in vars(package).items()
        if not name.startswith("_") and not isinstance(value, types.ModuleType)
    }
    assert public == {name for name in package.__all__ if not name.startswith("_")}
    assert len(package.__all__) == len(set(package.__all__))


@pytest.mark.parametrize("name", sorted(PROMISED))
def test_the_design_promises_it(name: str) -> None:
    assert name in kvcomp.__all__
    assert hasattr(kvcomp, name)


@pytest.mark.parametrize("name", kvcomp.__all__)
def test_every_public_object_has_a_docstring_of_its_own(name: str) -> None:
    value = getattr(kvcomp, name)
    if inspect.isclass(value):
        assert (vars(value).get("__doc__") or "").strip()
    elif callable(value) and not isinstance(value, types.FunctionType):
        assert value.__doc__
    elif callable(value):
        assert value.__doc__.strip()
    else:
        assert name == "__version__"


@pytest.mark.parametrize("name", kvcomp.__all__)
def test_every_public_method_has_a_docstring(name: str) -> None:
    value = getattr(kvcomp, name)
    if not inspect.isclass(value) or not value.__module__.startswith("kvcomp"):
        assert value is not None
        return
    bare = [
        method
        for method, function in vars(value).items()
        if isinstance(function, types.FunctionType | property | classmethod)
        and not method.startswith("_")
        and not inspect.getdoc(getattr(value, method))
    ]
    assert bare == []


def test_every_error_class_is_public() -> None:
    assert set(importlib.import_module("kvcomp.core.errors").__all__) <= set(kvcomp.__all__)
