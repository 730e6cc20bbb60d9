"""Which model answers, and which tasks it is asked."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from kvcomp.core.errors import InputError, UnknownNameError, suggest
from kvcomp.core.registry import registry
from kvcomp.lab.tasks import Task

TESTBED = "minimile-xs"
ALL = "all"


def testbeds() -> dict[str, Path]:
    """Return the folder of each registered testbed, by its name."""
    return {entry.name: Path(entry.value) for entry in registry.entries("testbed")}


def find_folder(model: str) -> Path:
    """Return the folder of a testbed by its name, or of a model by its path.

    Raises:
        InputError: there is neither.
    """
    folder = testbeds().get(model, Path(model).expanduser())
    if not folder.is_dir():
        raise InputError(
            f"must be the folder of a model or the name of a testbed, got {model!r}. {suggest(model, testbeds())}"
        )
    return folder


def tasks_beside(testbed: str) -> list[Task]:
    """Return the tasks of the package that brings the testbed, its hard variants left out: it was trained for those.

    Raises:
        InputError: the package brings none.
    """
    package = registry.find("testbed", testbed).package
    brought: list[Task] = [entry.value for entry in registry.entries("task") if entry.package == package]
    tasks = [task for task in brought if not task.hard]
    if not tasks:
        raise InputError(f"the package {package} brings the testbed {testbed!r} and no task for it")
    return tasks


def find_tasks(names: str, model: str) -> tuple[list[Task], list[str]]:
    """Return the tasks that are named, each once, and a fault for each name that is none's.

    Args:
        names: with commas between; `all` stands for those that the model was trained for. The prefix of a name may be
            left out.
        model: as `find_folder` takes it; a folder stands for the testbed of this package.
    """
    found: dict[str, Task] = {}
    faults = []
    for name in filter(None, map(str.strip, names.split(","))):
        try:
            tasks = tasks_beside(_testbed(model)) if name == ALL else [_find_task(name)]
        except (InputError, UnknownNameError) as error:
            faults.append(str(error))
        else:
            found |= {task.name: task for task in tasks}
    if not (found or faults):
        faults.append(f"must name a task, or {ALL}")
    return list(found.values()), faults


def _testbed(model: str) -> str:
    return model if model in testbeds() else TESTBED


def _find_task(name: str) -> Task:
    tasks: list[Task] = [entry.value for entry in registry.entries("task")]
    named = [task for task in tasks if name in (task.name, task.id)]
    if len(named) == 1:
        return named[0]
    if named:
        raise UnknownNameError(f"several tasks are named {name!r}: {', '.join(task.name for task in named)}")
    known: Sequence[str] = [task.name if "/" in name else task.id for task in tasks]
    raise UnknownNameError(f"no task named {name!r}. {suggest(name, known)}")
