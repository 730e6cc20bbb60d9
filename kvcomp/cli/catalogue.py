"""`kvcomp list`, `kvcomp show` and `kvcomp check`: what is there, and whether a strategy file is sound."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import typer
import yaml

from kvcomp.cli.terminal import emit_json, emit_table
from kvcomp.core.config import strategy
from kvcomp.core.registry import registry


def list_entries(
    as_json: Annotated[bool, typer.Option("--json", help="Write one JSON array to stdout.")] = False,
) -> None:
    """List every part, recipe, adapter, task and testbed, and the package that each comes from."""
    entries = [entry.describe() for entry in registry.entries()]
    if as_json:
        emit_json(entries)
    else:
        head = ("name", "kind", "package", "version")
        emit_table(head, [[entry[column] for column in head] for entry in entries])


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
