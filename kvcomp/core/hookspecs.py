"""Everything that a plugin can contribute. A plugin is a module in the entry-point group `kvcomp`.

Hooks return values and never change an argument. The built-in parts, recipes, adapters, tasks and testbeds come
through these same hooks.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pluggy

PROJECT = "kvcomp"
hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)


@hookspec
def kvcomp_parts() -> Sequence[type]:  # type: ignore[empty-body]
    """Return part classes: subclasses of the interfaces, each with a `use` name."""


@hookspec
def kvcomp_recipes() -> Sequence[Path | dict[str, Any]]:  # type: ignore[empty-body]
    """Return recipes: paths of YAML files (the file stem is the name) or mappings with a `name`."""


@hookspec
def kvcomp_adapters() -> Sequence[type]:  # type: ignore[empty-body]
    """Return model adapter classes: subclasses of `kvcomp.ModelAdapter`, tried before the generic one."""


@hookspec
def kvcomp_tasks() -> Sequence[Any]:  # type: ignore[empty-body]
    """Return tasks: instances of `kvcomp.lab.Task`, each with a `name`."""


@hookspec
def kvcomp_testbeds() -> Sequence[Path]:  # type: ignore[empty-body]
    """Return checkpoint folders; a testbed's name is its folder's name."""
