"""Every error and warning of kvcomp. Each error is a `KVCompError` and the natural builtin.

KVCompError
├── ConfigError (ValueError)             a strategy file or override with faults; lists all of them, each with its path
├── DataError (ValueError)               a folder of task data with faults; lists all of them, with file and sample
├── UnknownNameError (LookupError)       no part, recipe, adapter, task or testbed of that name
├── DuplicateNameError (ValueError)      two plugins claim one name
├── BudgetError (ValueError)             a budget that cannot be read or cannot be met; `smallest` says what could
├── InputError (ValueError)              an image file, a prompt or a folder that cannot be used
├── ResultsError (OSError)               a folder of results that cannot be read or written
├── WorkerError (RuntimeError)           processes that do the work of a sweep, and die again and again
├── UnsupportedModelError (TypeError)    a model that cannot be compressed
└── UnsupportedUseError (RuntimeError)   a supported model, used in a way that would give wrong results
KVCompWarning (UserWarning)
├── PluginWarning                        a plugin that failed to load, named and skipped
├── IgnoredSettingWarning                a setting that the recipe does not look at
└── UnusedCacheWarning                   `compress()` was entered and its cache never used
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence

__all__ = [
    "BudgetError",
    "ConfigError",
    "DataError",
    "DuplicateNameError",
    "IgnoredSettingWarning",
    "InputError",
    "KVCompError",
    "KVCompWarning",
    "PluginWarning",
    "ResultsError",
    "UnknownNameError",
    "UnsupportedModelError",
    "UnsupportedUseError",
    "UnusedCacheWarning",
    "WorkerError",
]


class KVCompError(Exception):
    """Base of every error that kvcomp raises on purpose."""


class ConfigError(KVCompError, ValueError):
    """A strategy that cannot be built. `faults` holds every fault found, as `path: what must hold, what was given`."""

    def __init__(self, faults: Iterable[str], source: str = "strategy") -> None:
        self.faults = tuple(faults)
        self.source = source
        super().__init__(_list_faults(source, self.faults))


class DataError(KVCompError, ValueError):
    """A folder of task data that cannot be used. `faults` holds every fault found, as `file: sample: key: what`.

    The message shows the first 50 of them.
    """

    SHOWN = 50

    def __init__(self, faults: Iterable[str], source: str) -> None:
        self.faults = tuple(faults)
        self.source = source
        more = len(self.faults) - self.SHOWN
        rest = f"\n  and {more} more" if more > 0 else ""
        super().__init__(_list_faults(source, self.faults, self.SHOWN) + rest)


class UnknownNameError(KVCompError, LookupError):
    """A name that nothing is registered under."""


class DuplicateNameError(KVCompError, ValueError):
    """A name that two plugins register."""


class BudgetError(KVCompError, ValueError):
    """A budget that cannot be read or met. `smallest` is the smallest ratio that works, where there is one."""

    def __init__(self, message: str, smallest: float | None = None) -> None:
        self.smallest = smallest
        super().__init__(message)


class InputError(KVCompError, ValueError):
    """An input file, prompt or folder that cannot be used."""


class ResultsError(KVCompError, OSError):
    """A folder of results that cannot be read or written."""


class UnsupportedModelError(KVCompError, TypeError):
    """A model whose cache kvcomp cannot compress."""


class UnsupportedUseError(KVCompError, RuntimeError):
    """A use of a compressed cache that would silently give wrong results."""


class WorkerError(KVCompError, RuntimeError):
    """Workers of a sweep that die again and again, or cannot be had."""


class KVCompWarning(UserWarning):
    """Base of every warning of kvcomp."""


class PluginWarning(KVCompWarning):
    """A plugin failed to load and was skipped."""


class IgnoredSettingWarning(KVCompWarning):
    """A setting has no effect on this recipe."""


class UnusedCacheWarning(KVCompWarning):
    """A cache was made and never used."""


def _list_faults(source: str, faults: Sequence[str], most: int | None = None) -> str:
    lines = "\n".join(f"  {fault}" for fault in faults[:most])
    return f"{source} has {len(faults)} fault{'s' if len(faults) != 1 else ''}:\n{lines}"


def suggest(name: str, available: Iterable[str]) -> str:
    """Return the end of an error message: the nearest of the available names, then all of them.

    >>> suggest("proxi-attention", ["random", "proxy-attention"])
    "Did you mean 'proxy-attention'? Available: proxy-attention, random."
    """
    names = sorted(available)
    near = nearest(name, names)
    hint = "" if near is None else f"Did you mean {near!r}? "
    return f"{hint}Available: {', '.join(names) or 'none'}."


def nearest(name: str, names: Iterable[str]) -> str | None:
    """Return the name that was probably meant, None where none is near. Case does not count, so that what a paper
    writes finds its recipe, nor does what stands before a `/`: all tasks of a package have it in common.

    >>> nearest("mini/recal", ["mini/recall", "mini/order"]), nearest("mini/nothing", ["mini/spot_diff"])
    ('mini/recall', None)
    >>> nearest("SnapKV", ["snapkv", "h2o"])
    'snapkv'
    """
    compared = {_ending(known): known for known in names}
    near = difflib.get_close_matches(_ending(str(name)), compared, n=1)
    return compared[near[0]] if near else None


def _ending(name: str) -> str:
    return name.rpartition("/")[2].casefold()
