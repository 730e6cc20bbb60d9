"""`kvcomp list`, `kvcomp show` and `kvcomp check`: what is there, and whether a strategy file is sound."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import typer
import yaml

from kvcomp.cli.terminal import emit_json, emit_table
from kvcomp.core.about import About
from kvcomp.core.config import strategy
from kvcomp.core.registry import Entry, registry


def list_entries(
    as_json: Annotated[bool, typer.Option("--json", help="Write one JSON array to stdout.")] = False,
) -> None:
    """List every part, recipe, adapter, task and testbed: the package that each comes from, and what it does."""
    if as_json:
        emit_json([entry.describe() for entry in registry.entries()])
        return
    head = ("name", "kind", "package", "version", "what it does")
    body = [[*entry.describe().values(), what_it_does(entry)] for entry in registry.entries()]
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


def show(recipe: Annotated[str, typer.Argument(help="A recipe's name; `kvcomp list` has them.")]) -> None:
    """Show the YAML of a recipe, as its author wrote it."""
    value = registry.find("recipe", recipe).value
    if isinstance(value, Mapping):
        text = yaml.safe_dump(dict(value), sort_keys=False, default_flow_style=None)
    else:
        text = Path(value).read_text(encoding="utf-8")
    typer.echo(text.rstrip("\n"))


def check(file: Annotated[Path, typer.Argument(help="A strategy file in YAML.")]) -> None:
    """Check a strategy file: exit code 0, or 2 with every fault and its path."""
    made = strategy(file)
    typer.echo(f"{file}: no fault; {made.name} at budget {made.budget}")
