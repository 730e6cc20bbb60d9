"""Strategies from names, files and mappings. Every fault is found in one go, and named by its path."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from kvcomp.core.budget import Budget
from kvcomp.core.composition import conflicts, trigger_conflicts
from kvcomp.core.errors import BudgetError, ConfigError, InputError, UnknownNameError, suggest
from kvcomp.core.interfaces import PART_KINDS, Part
from kvcomp.core.making import make_part, with_field
from kvcomp.core.registry import registry
from kvcomp.core.strategy import Strategy
from kvcomp.core.trigger import PREFILL_END, Trigger

PART_KEYS = tuple(kind for kind in PART_KINDS if kind != "observation")
SETTING_KEYS = ("name", "budget", "mass_preserving", "turns", "trigger")
DEFAULT_PARTS = {
    "policy": "uniform",
    "allocator": "uniform",
    "matcher": "none",
    "merger": "drop",
    "store": "dense",
}


def strategy(
    source: Strategy | str | Path | Mapping[str, Any],
    budget: Any = None,
    **overrides: Any,
) -> Strategy:
    """Return the strategy that a recipe name, a YAML file or a mapping describes.

    Args:
        source: a recipe's name (`"flowmm"`), a path of a YAML file, a mapping of the same form, or a strategy.
        budget: replaces the budget: a ratio in (0, 1], `{"tokens": 512}` or `{"bytes": "64MiB"}`.
        overrides: dotted names change a field of the part that is there (`**{"policy.threshold": 0.3}`), also of a
            part inside it (`**{"merger.merger.use": "mean"}`); a bare part name replaces the part (`merger="mean"`,
            or a mapping with `use`); `turns`, `trigger`, `mass_preserving` and `name` are set.

    Raises:
        BudgetError: the `budget` argument cannot be read.
        ConfigError: listing every fault with its path.
        UnknownNameError: no recipe of that name.

    >>> strategy("flowmm", 0.1, **{"policy.threshold": 0.3}).policy.threshold
    0.3
    """
    document, label = _document(source)
    faults: list[str] = []
    document = _with_base(document, faults, ())
    if budget is not None:
        document["budget"] = Budget.parse(budget)
    for path, value in overrides.items():
        _override(document, path, value, faults)
    return _build(document, faults, label)


class UniqueKeyLoader(yaml.SafeLoader):
    """PyYAML's safe loader, which also refuses a key that stands twice in a mapping."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """Return the mapping."""
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]  # type: ignore[no-untyped-call]
        for place, key in enumerate(keys):
            if key in keys[:place]:
                written, mark = node.value[place][0].value, node.value[place][0].start_mark
                fault = f"the key {written!r} stands twice" + (" (true is 1, and false 0)" if key in (0, 1) else "")
                raise yaml.constructor.ConstructorError(None, None, fault, mark)
        return super().construct_mapping(node, deep)


def load_document(path: Path) -> dict[str, Any]:
    """Return the mapping in a YAML file.

    Raises:
        InputError: the file cannot be read, is not YAML, or holds no mapping.
    """
    try:
        document = yaml.load(path.read_text(encoding="utf-8"), Loader=UniqueKeyLoader)  # noqa: S506, a safe loader
    except OSError as error:
        raise InputError(f"a strategy file must be readable text: {path}: {error.strerror or error}") from None
    except UnicodeDecodeError as error:
        raise InputError(f"a strategy file must be readable text: {path}: {error}") from None
    except yaml.YAMLError as error:
        raise InputError(f"a strategy file must be YAML: {path}: {error}") from None
    if not isinstance(document, dict):
        got = "nothing" if document is None else type(document).__name__
        raise InputError(f"a strategy file must hold a mapping of parts, got {got}: {path}")
    return {str(key): value for key, value in document.items()}


def recipe_document(name: str) -> dict[str, Any]:
    """Return a registered recipe as the mapping that its author wrote, with its name."""
    value = registry.find("recipe", name).value
    document = dict(value) if isinstance(value, Mapping) else load_document(Path(value))
    return {"name": name} | document


def _document(source: Strategy | str | Path | Mapping[str, Any]) -> tuple[dict[str, Any], str]:
    if isinstance(source, Strategy):
        return source.dump(), f"strategy {source.name!r}"
    if isinstance(source, Mapping):
        return dict(source), f"strategy {source.get('name', 'custom')!r}"
    if not isinstance(source, str | Path):
        raise InputError(f"a strategy must be a recipe name, a path, a mapping or a Strategy, got {source!r}")
    if isinstance(source, Path) or source.endswith((".yaml", ".yml")):
        return {"name": Path(source).stem} | load_document(Path(source)), str(source)
    return recipe_document(source), f"recipe {source!r}"


def _with_base(document: dict[str, Any], faults: list[str], above: tuple[str, ...]) -> dict[str, Any]:
    """Return the document with `{base: NAME, set: {...}}` resolved: the base, changed by the overrides in `set`.

    Args:
        document: what its author wrote.
        faults: where faults are added.
        above: the bases that led here.
    """
    if "base" not in document:
        return dict(document)
    own = dict(document)
    base, changes = str(own.pop("base")), own.pop("set", {})
    if base in above:
        faults.append(f"base: {' -> '.join((*above, base))} goes in a circle")
        return own
    try:
        merged = _with_base(recipe_document(base), faults, (*above, base))
    except UnknownNameError as error:
        faults.append(f"base: {error}")
        return own
    if not isinstance(changes, Mapping):
        faults.append(f"set: must be a mapping of overrides, got {changes!r}")
        changes = {}
    merged |= own
    for path, value in changes.items():
        _override(merged, str(path), value, faults)
    return merged


def _override(document: dict[str, Any], path: str, value: Any, faults: list[str]) -> None:
    kind, _, field = path.partition(".")
    if not field:
        document[kind] = value
        return
    part = document.get(kind) or DEFAULT_PARTS.get(kind)
    if kind in SETTING_KEYS:
        faults.append(f"{path}: {kind!r} is no part and has no fields; give it whole, as {kind}=VALUE")
    elif kind not in PART_KEYS:
        faults.append(f"{path}: no part named {kind!r}. {suggest(kind, PART_KEYS)}")
    elif part is None:
        faults.append(f"{path}: this strategy has no {kind} to change")
    elif isinstance(part, str | Mapping):  # anything else is a fault that is found when the part is built
        document[kind] = with_field(kind, part, field, value)


def _meant(key: str, fields: Mapping[str, Any]) -> str:
    """Return a hint for a key that is none: the field of a part that has this name, or keys like it."""
    owners = [kind for kind, part in fields.items() if isinstance(part, Part) and key in type(part).model_fields]
    if owners:
        return f"Did you mean {' or '.join(repr(f'{kind}.{key}') for kind in owners)}?"
    return suggest(key, (*PART_KEYS, *SETTING_KEYS))


def _build(document: dict[str, Any], faults: list[str], label: str) -> Strategy:
    part_faults: list[str] = []
    fields: dict[str, Any] = {kind: _part(kind, document, part_faults) for kind in PART_KEYS}
    for key in document.keys() - {*PART_KEYS, *SETTING_KEYS}:
        faults.append(f"{key}: no such key. {_meant(key, fields)}")
    trigger = _trigger(document.get("trigger", PREFILL_END), faults)
    turns = _choice(document, "turns", ("recompress", "append"), faults)
    if not part_faults:
        parts = [part for part in fields.values() if part is not None]
        part_faults = conflicts(parts) + trigger_conflicts(parts, trigger, turns)
    faults += part_faults
    if not isinstance(name := document.get("name", "custom"), str):
        faults.append(f"name: must be a text, got {name!r}")
    fields |= {"name": name, "budget": _budget(document.get("budget", 1.0), faults)}
    fields |= {"turns": turns, "trigger": trigger}
    fields["mass_preserving"] = _choice(document, "mass_preserving", (False, True), faults)
    if faults:
        raise ConfigError(sorted(faults), source=label)
    return Strategy(**fields)


def _choice(document: dict[str, Any], key: str, choices: tuple[Any, ...], faults: list[str]) -> Any:
    value = document.get(key, choices[0])
    if value not in choices or type(value) is not type(choices[0]):
        faults.append(f"{key}: must be one of {', '.join(map(str, choices)).lower()}, got {value!r}")
    return value


def _trigger(value: Any, faults: list[str]) -> Trigger:
    """Return the trigger, the default where it cannot be read."""
    try:
        return Trigger.parse(value)
    except ConfigError as error:
        faults += error.faults
        return PREFILL_END


def _budget(value: Any, faults: list[str]) -> Budget | None:
    try:
        return Budget.parse(value)
    except BudgetError as error:
        faults.append(f"budget: {error}")
        return None


def _part(kind: str, document: dict[str, Any], faults: list[str]) -> Part | None:
    """Return the part of this kind, None where the document has none and there is no default."""
    spec = document.get(kind)
    spec = DEFAULT_PARTS.get(kind) if spec is None else spec
    return None if spec is None else make_part(kind, spec, faults)
