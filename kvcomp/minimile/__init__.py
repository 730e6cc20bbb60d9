"""MiniMile: small tasks that this repository renders, and checkpoints trained on them. A plugin like any other."""

from collections.abc import Sequence
from pathlib import Path

from kvcomp.core.hookspecs import hookimpl
from kvcomp.lab.tasks import Task
from kvcomp.minimile.tasks import HARD_TASKS, TASKS

CHECKPOINTS = Path(__file__).parent / "checkpoints"


@hookimpl
def kvcomp_tasks() -> Sequence[Task]:
    """Return the ten tasks and their hard variants."""
    return (*TASKS, *HARD_TASKS)


@hookimpl
def kvcomp_testbeds() -> Sequence[Path]:
    """Return the checkpoint folders that come with the package."""
    return sorted(config.parent for config in CHECKPOINTS.glob("*/config.json"))
