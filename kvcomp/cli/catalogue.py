"""`kvcomp list`, `kvcomp show` and `kvcomp check`: what is there, and whether a strategy file is sound."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import typer
import yaml

from kvcomp.cli.run import strategy_source
from kvcomp.cli.terminal import emit_json, emit_table
from kvcomp.core.about import About
from kvcomp.core.config import strategy
from kvcomp.core.errors import UnknownNameError, nearest, suggest
from kvcomp.core.ignored import warn_of_ignored
from kvcomp.core.interfaces import PART_KINDS, Part
from kvcomp.core.registry import Entry, registry


def list_entries(
    kind: Annotated[str | None, typer.Argument(help="Only this kind: recipe, scorer, task and so on.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Write one JSON array to stdout.")] = False,
) -> None:
    """List every part, recipe, adapter, task and testbed: the package that each comes from, and what it does."""
    entries = registry.entries()
    if kind is not None:
        kinds = {entry.kind for entry in entries}
        if kind not in kinds:
            raise UnknownNameError(f"no kind named {kind!r}. {suggest(kind, kinds)}")
        entries = registry.entries(kind)
    if as_json:
        emit_json([entry.describe() for entry in entries])
        return
    head = ("name", "kind", "package", "version", "what it does")
    body = [[*entry.describe().values(), what_it_does(entry)] for entry in entries]
    emit_table(head, body, texts=head[-1:])


def what_it_does(entry: Entry) -> str:
    """Return the idea and the source of a recipe, the first sentence about anything else; empty where none is given."""
    if entry.kind == "recipe":
        about = About.of(entry.value)
        return about.idea + (f" [{about.source}]" if about.source else "")
    if isinstance(entry.value, Path | str):
        return ""
    described = entry.value if isinstance(entry.value, type) else type(entry.value)
    paragraph = inspect.cleandoc(described.__doc__ or "").partition("\n\n")[0]
    return " ".join(paragraph.split())


def show(name: Annotated[str, typer.Argument(help="Of a recipe or a part; `kvcomp list` has them.")]) -> None:
    """Show the YAML of a recipe, as its author wrote it, or the fields of a part with their defaults."""
    found = {entry.kind: entry for entry in registry.entries() if entry.name == name}
    if "recipe" in found:
        typer.echo(recipe_text(found["recipe"]).rstrip("\n"))
        return
    parts = [entry for kind, entry in found.items() if kind in PART_KINDS]
    if not parts:
        raise UnknownNameError(_no_such_thing(name, found))
    typer.echo("\n\n".join(map(part_text, parts)))


def recipe_text(entry: Entry) -> str:
    """Return a recipe as YAML."""
    if isinstance(entry.value, Mapping):
        return yaml.safe_dump(dict(entry.value), sort_keys=False, default_flow_style=None)
    return Path(entry.value).read_text(encoding="utf-8")


def part_text(entry: Entry) -> str:
    """Return a part as a line of a strategy file with all defaults, under what its docstring says."""
    part: type[Part] = entry.value
    fields = {name: field.get_default(call_default_factory=True) for name, field in part.model_fields.items()}
    required = [name for name, field in part.model_fields.items() if field.is_required()]
    given = {name: value.dump() if isinstance(value, Part) else value for name, value in fields.items()}
    line = yaml.safe_dump(
        {entry.kind: {"use": entry.name} | {name: value for name, value in given.items() if name not in required}},
        sort_keys=False,
        default_flow_style=None,
        width=120,
    )
    notes = [inspect.cleandoc(part.__doc__ or ""), *(f"`{name}` must be given." for name in required)]
    comment = "\n".join(f"# {text}".rstrip() for text in "\n\n".join(notes).splitlines())
    return f"{comment}\n{line.rstrip()}"


def _no_such_thing(name: str, found: Mapping[str, Entry]) -> str:
    if found:
        return f"{name!r} is a {next(iter(found))}, and `kvcomp show` shows recipes and parts"
    if name in ("recipe", *PART_KINDS):
        return f"{name!r} is a kind; `kvcomp list {name}` has those of that kind, and `kvcomp show` shows one"
    known = [entry.name for entry in registry.entries() if entry.kind in ("recipe", *PART_KINDS)]
    near = nearest(name, known)
    hint = "" if near is None else f" Did you mean {near!r}?"
    return f"no recipe or part named {name!r}.{hint} `kvcomp list` has them all"


def check(
    file: Annotated[str, typer.Argument(metavar="FILE", help="A strategy file in YAML, or the name of a recipe.")],
) -> None:
    """Check a strategy: exit code 0, with a warning for each setting that changes nothing, or 2 with every fault and
    its path.
    """
    made = strategy(Path(file) if Path(file).is_file() else strategy_source(file))
    warn_of_ignored(made, stacklevel=1)
    typer.echo(f"{file}: no fault; {made.name} at budget {made.budget}")
