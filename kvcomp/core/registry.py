"""The registry: every part, recipe, adapter, task and testbed by name, gathered from plugins on the first look-up."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any

import pluggy

from kvcomp.core import hookspecs
from kvcomp.core.errors import DuplicateNameError, PluginWarning, UnknownNameError, suggest
from kvcomp.core.interfaces import PART_KINDS, Part

GROUP = "kvcomp"


@dataclass(frozen=True)
class Entry:
    """One registered thing: its name and kind, the package and version it came from, and the thing itself."""

    name: str
    kind: str
    package: str
    version: str
    value: Any

    def describe(self) -> dict[str, str]:
        """Return what `kvcomp list --json` shows of it."""
        return {"name": self.name, "kind": self.kind, "package": self.package, "version": self.version}


@dataclass(frozen=True)
class Origin:
    """The distribution that a plugin came from."""

    package: str
    version: str


class Registry:
    """All entries by kind and name. Plugins load when something is first looked up, never at import.

    A plugin that fails to import, or whose hook raises or returns nonsense, is named in a `PluginWarning` and skipped.
    Two plugins that claim one name raise `DuplicateNameError` at every look-up of that kind.
    """

    def __init__(self, discover: Callable[[], list[EntryPoint]] | None = None) -> None:
        self._discover = discover or (lambda: list(entry_points(group=GROUP)))
        self._manager = pluggy.PluginManager(hookspecs.PROJECT)
        self._manager.add_hookspecs(hookspecs)
        self._origins: dict[str, Origin] = {}
        self._entries: list[Entry] | None = None
        self._loaded = False
        self._lock = threading.RLock()

    def register(self, plugin: object, name: str, package: str = "local", version: str = "0") -> None:
        """Add a plugin by hand: a module or any object with hook implementations."""
        with self._lock:
            self._load_entry_points()
            self._add(plugin, name)
            self._origins[name] = Origin(package, version)
            self._entries = None

    def unregister(self, name: str) -> None:
        """Remove a plugin that was added by hand."""
        with self._lock:
            self._manager.unregister(name=name)
            self._origins.pop(name, None)
            self._entries = None

    def entries(self, kind: str | None = None) -> tuple[Entry, ...]:
        """Return all entries, or those of one kind, sorted by kind and name.

        Raises:
            DuplicateNameError: two plugins claim one name.
        """
        with self._lock:
            if self._entries is None:
                self._load_entry_points()
                self._entries = sorted(self._collect(), key=lambda entry: (entry.kind, entry.name))
            return _without_clashes(entry for entry in self._entries if kind in (None, entry.kind))

    def find(self, kind: str, name: str) -> Entry:
        """Return the entry of this kind and name.

        Raises:
            UnknownNameError: there is none; the message suggests near misses.
        """
        entries = {entry.name: entry for entry in self.entries(kind)}
        if name not in entries:
            raise UnknownNameError(f"no {kind} named {name!r}. {suggest(name, entries)}")
        return entries[name]

    def _add(self, plugin: object, name: str) -> None:
        """Register a plugin, or leave no trace of it where one of its hooks does not exist."""
        self._manager.register(plugin, name=name)
        try:
            self._manager.check_pending()
        except Exception:
            self._manager.unregister(name=name)
            raise

    def _load_entry_points(self) -> None:
        if self._loaded:
            return
        self._loaded = True
        for point in self._discover():
            origin = Origin(point.dist.name, point.dist.version) if point.dist else Origin(point.module, "0")
            try:
                self._add(point.load(), point.name)
            except Exception as error:
                _warn(f"plugin {point.name!r} of {origin.package} {origin.version} failed to load", error)
            else:
                self._origins[point.name] = origin

    def _collect(self) -> Iterator[Entry]:
        hooks: dict[str, Callable[[Any], tuple[str, str]]] = {
            "kvcomp_parts": _part_key,
            "kvcomp_recipes": _recipe_key,
            "kvcomp_adapters": _adapter_key,
            "kvcomp_tasks": lambda task: ("task", _text(task.name)),
            "kvcomp_testbeds": lambda folder: ("testbed", Path(folder).name),
        }
        for hook, key in hooks.items():
            for implementation in getattr(self._manager.hook, hook).get_hookimpls():
                origin = self._origins[implementation.plugin_name]
                try:
                    found = [(*key(value), value) for value in implementation.function()]
                except Exception as error:
                    _warn(f"{hook} of {origin.package} {origin.version} failed", error)
                    continue
                for kind, name, value in found:
                    yield Entry(name, kind, origin.package, origin.version, value)


def _warn(what: str, error: Exception) -> None:
    message = f"{what} and was skipped: {type(error).__name__}: {error}"
    warnings.warn(message, PluginWarning, stacklevel=2)


def _part_key(part: Any) -> tuple[str, str]:
    if not (isinstance(part, type) and issubclass(part, Part) and part.kind in PART_KINDS and part.use):
        raise TypeError(f"a part must be a subclass of an interface with a `use` name, got {part!r}")
    return part.kind, part.use


def _recipe_key(recipe: Path | dict[str, Any]) -> tuple[str, str]:
    return "recipe", _text(recipe["name"]) if isinstance(recipe, dict) else Path(recipe).stem


def _adapter_key(adapter: Any) -> tuple[str, str]:
    if not all(hasattr(adapter, name) for name in ("use", "generic", "matches", "modality")):
        raise TypeError(f"an adapter must be a subclass of kvcomp.ModelAdapter, got {adapter!r}")
    return "adapter", _text(adapter.use)


def _text(name: Any) -> str:
    if not isinstance(name, str) or not name:
        raise TypeError(f"a name must be a text, got {name!r}")
    return name


def _without_clashes(entries: Iterable[Entry]) -> tuple[Entry, ...]:
    known: dict[tuple[str, str], Entry] = {}
    for entry in entries:
        other = known.setdefault((entry.kind, entry.name), entry)
        if other is not entry:
            raise DuplicateNameError(
                f"two plugins claim the {entry.kind} name {entry.name!r}: {other.package} {other.version} and "
                f"{entry.package} {entry.version}; uninstall one or ask its author to rename"
            )
    return tuple(known.values())


registry = Registry()
