"""Parts from what a strategy file says of them, the parts inside parts included. Every fault has its path."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from kvcomp.core.errors import UnknownNameError, suggest
from kvcomp.core.interfaces import Part
from kvcomp.core.registry import registry

BOUNDS = ("greater_than", "greater_than_equal", "less_than", "less_than_equal")


def make_part(kind: str, spec: Any, faults: list[str], path: str = "") -> Part | None:
    """Return the part that a name or `{use: NAME, field: value}` describes, None where there are faults.

    Args:
        kind: of the part, a key of `PART_KINDS`.
        spec: what the file says.
        faults: where faults are added, those of the parts inside included.
        path: of the spec in the file, for the faults; its kind by default.

    >>> make_part("scorer", {"use": "position", "sinks": 2}, []).sinks
    2
    """
    path = path or kind
    spec = {"use": spec} if isinstance(spec, str) else spec
    if not isinstance(spec, Mapping) or not isinstance(spec.get("use"), str):
        faults.append(f"{path}: must be a name or {{use: NAME, field: value}}, got {spec!r}")
        return None
    try:
        part_class: type[Part] = registry.find(kind, spec["use"]).value
    except UnknownNameError as error:
        faults.append(f"{path}.use: {error}")
        return None
    settings = {str(key): value for key, value in spec.items() if key != "use"}
    inner = _inner_parts(part_class, settings, faults, path)
    settings |= {name: part for name, part in inner.items() if part is not None}
    broken = [name for name, part in inner.items() if part is None]
    try:
        return part_class(**{name: value for name, value in settings.items() if name not in broken})
    except ValidationError as error:
        details = [dict(detail) for detail in error.errors() if not {*broken} & {*detail["loc"]}]
        faults += [_fault(path, part_class, detail) for detail in details]
    return None


def with_field(kind: str, spec: str | Mapping[str, Any], path: str, value: Any) -> dict[str, Any]:
    """Return what a file says of a part with one field changed; a dotted path leads to a part inside it.

    >>> with_field("scorer", "position", "sinks", 2)
    {'use': 'position', 'sinks': 2}
    """
    spec = {"use": spec} if isinstance(spec, str) else dict(spec)
    name, _, field = path.partition(".")
    if not field:
        return spec | {name: value}
    held, inner = _held(kind, spec.get("use"), name, spec.get(name))
    if held is None or not isinstance(inner, str | Mapping):
        return spec | {path: value}  # there is no part to change: a fault that is found when this one is made
    return spec | {name: with_field(held.kind, inner, field, value)}


def _inner_parts(
    part_class: type[Part], settings: dict[str, Any], faults: list[str], path: str
) -> dict[str, Part | None]:
    """Return the parts that the settings give for the fields that hold one, None where they have faults."""
    return {
        name: make_part(held.kind, settings[name], faults, f"{path}.{name}")
        for name, held in part_class.part_fields().items()
        if name in settings
    }


def _held(kind: str, use: Any, name: str, given: Any) -> tuple[type[Part] | None, Any]:
    """Return the interface of a field that holds a part, None where it holds none, and what it holds."""
    try:
        part_class: type[Part] = registry.find(kind, use).value
    except UnknownNameError:
        return None, None
    held = part_class.part_fields().get(name)
    if held is not None and given is None:
        default = part_class.model_fields[name].get_default(call_default_factory=True)
        given = default.dump() if isinstance(default, Part) else None
    return held, given


def _fault(path: str, part_class: type[Part], detail: dict[str, Any]) -> str:
    path = ".".join(map(str, (path, *detail["loc"])))
    if detail["type"] == "extra_forbidden":
        field = str(detail["loc"][-1])
        return f"{path}: {part_class.use!r} has no field {field!r}. {suggest(field, part_class.model_fields)}"
    if detail["type"] == "missing":
        return f"{path}: must be given"
    message = detail["msg"].removeprefix("Value error, ").removeprefix("Input ")
    if detail["type"] in BOUNDS:
        message = _range(part_class, str(detail["loc"][0]))
    return f"{path}: {message}, got {detail['input']!r}"


def _range(part_class: type[Part], field: str) -> str:
    """Return what a numeric field must be, as an interval."""
    bounds = {type(bound).__name__.lower(): bound for bound in part_class.model_fields[field].metadata}
    low = f"[{bounds['ge'].ge:g}" if "ge" in bounds else f"({bounds['gt'].gt:g}" if "gt" in bounds else "(-inf"
    high = f"{bounds['le'].le:g}]" if "le" in bounds else f"{bounds['lt'].lt:g})" if "lt" in bounds else "inf)"
    return f"must be in {low}, {high}"
