"""Docstrings and fields of parts, as Markdown."""

from __future__ import annotations

import inspect
import re
import typing
from collections.abc import Iterable
from typing import Any

from kvcomp.core.interfaces import Part
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

SYMBOLS = {"Ge": "≥", "Gt": ">", "Le": "≤", "Lt": "<"}


def first_line(value: Any) -> str:
    """Return the first sentence of a docstring."""
    return re.split(r"(?<=[.:])\s", " ".join(prose(value).split()) + " ", maxsplit=1)[0]


def prose(value: Any) -> str:
    """Return a docstring as Markdown without its Attributes and Args; other sections lose their indentation."""
    kept = [part for part in sections(value) if part[0] not in ("Attributes", "Args")]
    return "\n\n".join(f"{title}: {body}" if title else body for title, body in kept).strip()


def attributes(value: Any) -> dict[str, str]:
    """Return what the Attributes section says of each field, those of base classes included."""
    found: dict[str, str] = {}
    bases: Iterable[Any] = reversed(value.__mro__)
    for base in bases:
        body = dict(sections(base)).get("Attributes", "") if base.__dict__.get("__doc__") else ""
        for item in re.split(r"\n(?=\w+: )", body):
            name, _, text = item.partition(": ")
            found[name.strip()] = text
    return found


def sections(value: Any) -> list[tuple[str, str]]:
    """Return `(title, text)` of a Google-style docstring; the leading text has no title."""
    parts: list[tuple[str, list[str]]] = [("", [])]
    for line in inspect.cleandoc(value.__doc__ or "").splitlines():
        header = re.fullmatch(r"([A-Z][a-z]+):", line)
        if header or (line and not line.startswith(" ") and parts[-1][0]):
            parts.append((header[1] if header else "", []))
        if not header:
            parts[-1][1].append(line)
    return [(title, inspect.cleandoc("\n".join(lines)).strip()) for title, lines in parts]


def one_line(text: str) -> str:
    """Return text for a cell of a table."""
    return " ".join(text.split()).replace("|", "\\|")


def type_of(field: FieldInfo) -> str:
    """Return the annotation as one reads it."""
    annotation = field.annotation
    if typing.get_origin(annotation) is typing.Literal:
        return ", ".join(f"`{value}`" for value in typing.get_args(annotation))
    name = getattr(annotation, "__name__", "") if not typing.get_args(annotation) else ""
    return f"`{name or re.sub(r'[a-z_]+[.]', '', str(annotation))}`"


def default_of(field: FieldInfo) -> str:
    """Return the default, or that there is none."""
    value = field.get_default(call_default_factory=False)
    if field.is_required() or value is PydanticUndefined:
        return "required" if field.is_required() else "made anew"
    return f"`{value.dump() if isinstance(value, Part) else value!r}`".replace("'", "")


def constraint_of(field: FieldInfo) -> str:
    """Return the bounds of the field."""
    bounds = {type(bound).__name__: bound for bound in field.metadata}
    found = [f"{SYMBOLS[name]} {getattr(bound, name.lower()):g}" for name, bound in bounds.items() if name in SYMBOLS]
    return " and ".join(found)
