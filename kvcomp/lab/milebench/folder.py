"""Finding the tasks in a folder and opening them. Both layouts: `<root>/<Task>/` and `<root>/MileBench/<Task>/`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvcomp.core.errors import DataError, InputError, suggest
from kvcomp.lab.milebench.image_files import is_file
from kvcomp.lab.milebench.names import ADVERSARIAL, KNOWN, canonical
from kvcomp.lab.milebench.reading import Document, Reading, load_json, read_annotations
from kvcomp.lab.milebench.task import MileBenchTask

INNER = "MileBench"


@dataclass(frozen=True)
class Location:
    """An annotation file and the name of its task."""

    name: str
    path: Path


@dataclass(frozen=True)
class Opened:
    """What a folder holds.

    Attributes:
        tasks: the tasks that were read, sorted by name.
        unread: names of the others: not among the seven, and not exported by kvcomp. They are read if named.
    """

    tasks: tuple[MileBenchTask, ...]
    unread: tuple[str, ...]


def open_folder(
    root: Path,
    tasks: Sequence[str] | None = None,
    *,
    reading: Reading | None = None,
    advance: Callable[[str], None] = lambda name: None,
) -> Opened:
    """Return the tasks in a folder, every file and every image checked.

    Args:
        root: holds the folders of the tasks, or a folder `MileBench` that does.
        tasks: names by any alias, also of MileBench's other tasks; None for all of the seven that are there and all
            that kvcomp exported.
        reading: how prompts are built; None for by index, every image by itself, nothing cut.
        advance: told the name of each task before it is read.

    Raises:
        InputError: there is no such folder, or nothing in it that can be read.
        DataError: with every fault of every task, each with file, sample and key.
    """
    found, reading = locate(root), reading or Reading()
    faults = [*([] if tasks is None else _missing(tasks, found)), *_ambiguous(found)]
    opened, unread = [], []
    for location in found:
        try:
            document = _load_wanted(location, tasks)
            if document is None:
                unread.append(location.name)
                continue
            advance(location.name)
            opened.append(_open(location, document, reading))
        except DataError as error:
            faults += [f"{location.path.relative_to(root)}: {fault}" for fault in error.faults]
    if faults:
        raise DataError(faults, str(root))
    if not opened:
        raise InputError(
            f"{root} must hold at least one task as <task>/<task>.json, or in a folder MileBench; the seven are "
            f"{', '.join(KNOWN)}{_others(unread)}"
        )
    return Opened(tuple(sorted(opened, key=lambda task: task.name)), tuple(sorted(unread)))


def _others(unread: Sequence[str]) -> str:
    return f". Here is {', '.join(sorted(unread))}, which is read where it is named" if unread else ""


def locate(root: Path) -> list[Location]:
    """Return every annotation file in a folder, whatever task it is of.

    Raises:
        InputError: there is no such folder.
    """
    if not root.is_dir():
        raise InputError(f"a folder of tasks must exist, and this one does not: {root}")
    return [location for base in (root, root / INNER) if base.is_dir() for location in _locate_in(base)]


def _locate_in(base: Path) -> Iterator[Location]:
    for folder in sorted(path for path in base.iterdir() if path.is_dir()):
        name = canonical(folder.name)
        for stem in dict.fromkeys((folder.name, name)):
            for variant in ("", ADVERSARIAL):
                path = folder / f"{stem}{variant}.json"
                if is_file(path):
                    yield Location(name + variant, path)


def _missing(tasks: Sequence[str], found: Sequence[Location]) -> list[str]:
    names = [location.name for location in found]
    return [
        f"{task}: no such task here. {suggest(folder_name(task), names)}"
        for task in tasks
        if folder_name(task) not in names
    ]


def _ambiguous(found: Sequence[Location]) -> list[str]:
    names = [location.name for location in found]
    return [f"{name}: must be there once, got {names.count(name)} files" for name in KNOWN if names.count(name) > 1]


def _load_wanted(location: Location, tasks: Sequence[str] | None) -> Document | None:
    """Return the document of a file; None where it is of no task that is wanted.

    Raises:
        DataError: it cannot be read.
    """
    if tasks is not None and location.name not in map(folder_name, tasks):
        return None
    try:
        document = load_json(location.path)
    except InputError as error:
        raise DataError([str(error)], str(location.path)) from None
    wanted = tasks is not None or location.name in KNOWN or _is_export(document.content)
    return document if wanted else None


def _open(location: Location, document: Document, reading: Reading) -> MileBenchTask:
    file = read_annotations(location.path, location.name, document, reading)
    exported = file.meta.dataset if _is_export(document.content) else ""
    return MileBenchTask(exported or location.name, file, reading)


def _is_export(document: Any) -> bool:
    """Return whether kvcomp exported these samples: only its exporter names a metric."""
    meta = document.get("meta_data") if isinstance(document, dict) else None
    return isinstance(meta, dict) and meta.get("metric") is not None


def folder_name(task: str) -> str:
    """Return the name of the folder that holds a task."""
    return canonical(task).replace("/", "-")
