"""Finding the tasks in a folder and opening them. Both layouts: `<root>/<Task>/` and `<root>/MileBench/<Task>/`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvcomp.core.errors import DataError, InputError, suggest
from kvcomp.lab.milebench.image_files import is_file
from kvcomp.lab.milebench.names import ADVERSARIAL, KNOWN, OFFICIAL, canonical
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
        unread: where none was named, names of the others: not among the seven, and not exported by kvcomp.
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
            that kvcomp exported. Of what kvcomp exported the prefix may be left out.
        reading: how prompts are built; None for by index, every image by itself, nothing cut.
        advance: told the name of each task before it is read.

    Raises:
        InputError: there is no such folder, or nothing in it that can be read.
        DataError: with every fault of every task, each with file, sample and key.
    """
    found, reading = locate(root), reading or Reading()
    wanted, faults = (None, _without_file(root, found)) if tasks is None else _choose(tasks, found)
    faults += _ambiguous(found)
    opened, unread = [], []
    for location in found:
        if wanted is not None and location.name not in wanted:
            continue
        try:
            document = _load(location)
            if wanted is None and location.name not in KNOWN and not _is_export(document.content):
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
            f"{', '.join(KNOWN)}{_others(unread)}{_above(root)}"
        )
    return Opened(tuple(sorted(opened, key=lambda task: task.name)), tuple(sorted(unread)))


def _others(unread: Sequence[str]) -> str:
    return f". Here is {', '.join(sorted(unread))}, which is read where it is named" if unread else ""


def _above(root: Path) -> str:
    """Return what to do where the folder is a task's own."""
    return f". This is the folder of one task; name the one above it: {root.parent}" if _files_in(root) else ""


def locate(root: Path) -> list[Location]:
    """Return every annotation file in a folder, whatever task it is of.

    Raises:
        InputError: there is no such folder.
    """
    if not root.is_dir():
        raise InputError(f"a folder of tasks must exist, and this one does not: {root}")
    return [location for folder in _task_folders(root) for location in _files_in(folder)]


def _task_folders(root: Path) -> Iterator[Path]:
    for base in (root, root / INNER):
        if base.is_dir():
            yield from sorted(path for path in base.iterdir() if path.is_dir())


def _files_in(folder: Path) -> list[Location]:
    """Return the annotation files in a task's folder."""
    name = canonical(folder.absolute().name)
    paths = {
        folder / f"{stem}{variant}.json": name + variant
        for stem in (folder.absolute().name, name)
        for variant in ("", ADVERSARIAL)
    }
    return [Location(task, path) for path, task in paths.items() if is_file(path)]


def _without_file(root: Path, found: Sequence[Location]) -> list[str]:
    """Return a fault for each folder of one of the seven that holds no annotation file: it would go unnoticed."""
    held = {location.path.parent for location in found}
    return [
        f"{folder.relative_to(root)}: must hold {canonical(folder.name)}.json, and there is no such file"
        for folder in _task_folders(root)
        if canonical(folder.name) in KNOWN and folder not in held
    ]


def _choose(tasks: Sequence[str], found: Sequence[Location]) -> tuple[set[str], list[str]]:
    """Return the names in the folder that these stand for, and a fault for each that stands for none or several."""
    names = [location.name for location in found]
    chosen: set[str] = set()
    faults = []
    for task in tasks:
        meant = _meant(task, names)
        if len(meant) == 1:
            chosen |= meant
        elif meant:
            faults.append(f"{task}: must name one task, and here are {', '.join(sorted(meant))}")
        else:
            faults.append(f"{task}: no such task here. {suggest(folder_name(task), names)}")
    return chosen, faults


def _meant(task: str, names: Sequence[str]) -> set[str]:
    """Return what a name may stand for: a task by any alias, else what was exported under this name with a prefix."""
    if folder_name(task) in names:
        return {folder_name(task)}
    return {name for name in names if name.endswith(f"-{task}") and name.removesuffix(ADVERSARIAL) not in OFFICIAL}


def _ambiguous(found: Sequence[Location]) -> list[str]:
    names = [location.name for location in found]
    return [f"{name}: must be there once, got {names.count(name)} files" for name in KNOWN if names.count(name) > 1]


def _load(location: Location) -> Document:
    """Return the document of a file.

    Raises:
        DataError: it cannot be read.
    """
    try:
        return load_json(location.path)
    except InputError as error:
        raise DataError([str(error)], str(location.path)) from None


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
