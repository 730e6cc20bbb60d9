"""A pipeline around a lone part: the plainest neighbours with which it can work."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kvcomp.core.budget import Budget
from kvcomp.core.config import PART_KEYS, strategy
from kvcomp.core.errors import InputError
from kvcomp.core.interfaces import Matcher, Merger, Observation, Part, Store
from kvcomp.core.registry import registry
from kvcomp.core.strategy import Strategy

NEIGHBOURS = {
    "policy": "uniform",
    "scorer": "proxy-attention",
    "allocator": "uniform",
    "selector": "top-k",
    "matcher": "nearest",
    "merger": "pivot-mean",
    "store": "dense",
}

Subject = type[Part] | Part | Strategy | str | Path | Mapping[str, Any]


def as_part(subject: Subject) -> Part | None:
    """Return the part that a class or instance is; None for a recipe.

    Raises:
        InputError: a class that cannot be built without arguments, or an interface.
    """
    if isinstance(subject, Part):
        return subject
    if not isinstance(subject, type):
        return None
    missing = sorted(name for name, field in subject.model_fields.items() if field.is_required())
    if inspect.isabstract(subject) or missing:
        need = f"gives {', '.join(missing)}" if missing else "implements its abstract method"
        raise InputError(f"check({subject.__name__}) must be given a part that {need}; pass an instance")
    return subject()


def pipeline_around(subject: Subject) -> Strategy:
    """Return a recipe as its strategy, a lone part in a pipeline of built-in neighbours.

    A neighbour that a part requires and the plain pipeline does not provide is looked for in the registry. A store that
    keeps every token in the budget's bytes stands without a selector.
    """
    part = as_part(subject)
    if part is None:
        assert not isinstance(subject, type | Part)
        return strategy(subject)
    parts: dict[str, Any] = {kind: registry.find(kind, name).value() for kind, name in NEIGHBOURS.items()}
    if isinstance(part, Merger) and "merging" not in part.gives():
        parts["matcher"] = registry.find("matcher", "none").value()
    if isinstance(part, Matcher) and "edges" not in part.gives():
        parts["merger"] = registry.find("merger", "drop").value()
    if not isinstance(part, Observation):
        parts[part.kind] = part
    parts = _completed(parts, part)
    if isinstance(part, Store) and part.fits and not part.evicts:
        parts["selector"] = None
    return Strategy(name=f"around-{part.use}", budget=Budget.parse(0.2), **parts)


def _completed(parts: dict[str, Any], fixed: Part) -> dict[str, Any]:
    """Return the parts with neighbours exchanged until everything that is required is provided."""
    for kind in PART_KEYS:
        provided = frozenset().union(*(part.gives() for part in parts.values()))
        required = frozenset().union(*(part.requires for part in parts[kind].family()))
        for need in sorted(required - provided):
            for entry in registry.entries():
                if entry.kind in PART_KEYS and entry.kind != fixed.kind and need in entry.value.provides:
                    parts[entry.kind] = entry.value()
                    break
    return parts
