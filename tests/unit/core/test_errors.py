"""The error tree: everything derives from one base and from the natural builtin."""

import inspect
import warnings

import pytest

import kvcomp
from kvcomp.core import errors

ERRORS = [member for name in errors.__all__ if issubclass(member := getattr(errors, name), Exception)]
BUILTINS = {
    "ConfigError": ValueError,
    "DataError": ValueError,
    "UnknownNameError": LookupError,
    "DuplicateNameError": ValueError,
    "BudgetError": ValueError,
    "InputError": ValueError,
    "ResultsError": OSError,
    "WorkerError": RuntimeError,
    "UnsupportedModelError": TypeError,
    "UnsupportedUseError": RuntimeError,
}


@pytest.mark.parametrize("name", BUILTINS)
def test_an_error_is_a_kvcomp_error_and_the_natural_builtin(name: str) -> None:
    error = getattr(errors, name)
    assert issubclass(error, errors.KVCompError)
    assert issubclass(error, BUILTINS[name])
    assert not issubclass(error, KeyError), "str() of a KeyError shows the escaped repr"


def test_the_tree_is_complete() -> None:
    members = vars(errors).items()
    defined = {name for name, member in members if inspect.isclass(member) and member.__module__ == errors.__name__}
    assert defined == set(errors.__all__)
    tests = {"KVCompError", "KVCompWarning", "PluginWarning", "IgnoredSettingWarning", "UnusedCacheWarning"}
    assert defined - tests == set(BUILTINS)


@pytest.mark.parametrize("member", ERRORS, ids=lambda member: member.__name__)
def test_every_error_is_drawn_in_the_tree_and_exported(member: type) -> None:
    assert member.__name__ in (errors.__doc__ or "")
    assert getattr(kvcomp, member.__name__) is member


@pytest.mark.parametrize("name", ["PluginWarning", "IgnoredSettingWarning", "UnusedCacheWarning"])
def test_a_warning_is_a_kvcomp_warning_and_a_user_warning(name: str) -> None:
    category = getattr(errors, name)
    assert issubclass(category, errors.KVCompWarning)
    assert issubclass(category, UserWarning)
    with pytest.warns(category, match="heard"):
        warnings.warn("heard", category, stacklevel=1)


def test_a_config_error_lists_every_fault_and_counts_them() -> None:
    error = errors.ConfigError(["a: one", "b: two"], source="recipe 'x'")
    assert error.faults == ("a: one", "b: two")
    assert str(error) == "recipe 'x' has 2 faults:\n  a: one\n  b: two"
    assert "has 1 fault:\n" in str(errors.ConfigError(["a: one"]))


def test_a_data_error_holds_every_fault_and_shows_the_first_50() -> None:
    error = errors.DataError((f"fault {number}" for number in range(60)), source="data")
    assert len(error.faults) == 60
    assert str(error).startswith("data has 60 faults:\n  fault 0\n")
    assert str(error).endswith("  fault 49\n  and 10 more")
    assert str(errors.DataError(["a"], source="data")) == "data has 1 fault:\n  a"


def test_a_budget_error_says_what_would_do() -> None:
    assert errors.BudgetError("too small", smallest=0.25).smallest == 0.25
    assert errors.BudgetError("too small").smallest is None


@pytest.mark.parametrize(
    ("name", "available", "expected"),
    [
        ("proxi", ["random", "proxy"], "Did you mean 'proxy'? Available: proxy, random."),
        ("zzz", ["random", "proxy"], "Available: proxy, random."),
        ("zzz", [], "Available: none."),
        ("TOPK", ["top-k"], "Did you mean 'top-k'? Available: top-k."),
        (
            "mini/recal",
            ["mini/order", "mini/recall"],
            "Did you mean 'mini/recall'? Available: mini/order, mini/recall.",
        ),
        ("mini/nothing", ["mini/order"], "Available: mini/order."),
    ],
    ids=["near", "far", "nothing", "case", "near after a slash", "far after a slash"],
)
def test_suggest(name: str, available: list[str], expected: str) -> None:
    assert errors.suggest(name, available) == expected
