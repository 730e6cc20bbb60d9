"""The folder of tasks that `--data` names, opened, and what the model answered written back in its format."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from enum import StrEnum
from pathlib import Path
from typing import Any

import typer

from kvcomp.cli.terminal import progress
from kvcomp.cli.testbeds import ALL
from kvcomp.core.errors import InputError
from kvcomp.lab.codec import Codec
from kvcomp.lab.milebench.results import Written
from kvcomp.lab.milebench.source import TaskFolder
from kvcomp.lab.milebench.task import MileBenchTask


class Policy(StrEnum):
    """Which image a placeholder shows."""

    by_index = "by_index"
    official = "official"


class ImageMode(StrEnum):
    """How the images of a sample are shown."""

    separate = "separate"
    combined = "combined"


def read_folder(data: Path | None, tasks: str, settings: Mapping[str, Any]) -> TaskFolder | None:
    """Return the folder that `--data` names; None where it is not given.

    Args:
        data: the folder.
        tasks: names with commas between, or `all`.
        settings: fields of `TaskFolder`, None where an option was not given.

    Raises:
        ConfigError: listing every setting that is wrong.
        InputError: settings without a folder.
    """
    given = {name: value for name, value in settings.items() if value is not None}
    if data is None:
        if given:
            options = ", ".join(f"--{name.replace('_', '-')}" for name in given)
            raise InputError(f"{options} must come with --data: registered tasks make their prompts themselves")
        return None
    names = [name for name in map(str.strip, tasks.split(",")) if name]
    return TaskFolder.of({"folder": data, "tasks": None if names in ([], [ALL]) else names, **given})


def open_data(folder: TaskFolder, codec: Codec) -> Sequence[MileBenchTask]:
    """Return the tasks of a folder, and name those that were left out on stderr.

    Raises:
        DataError: with every fault of every task, each with file, sample and key.
        InputError: there is no such folder, or nothing in it that can be read.
    """
    with progress("reading") as advance:
        opened = folder.open(codec, advance)
    if opened.unread and folder.tasks is None:
        typer.echo(f"left out, name them in --tasks: {', '.join(opened.unread)}", err=True)
    return opened.tasks


def report_written(written: Written) -> None:
    """Say on stderr where predictions are, and whether MileBench's scorer takes them."""
    rest = "" if written.complete else "; MileBench's scorer refuses it, for it does not hold every sample"
    typer.echo(f"{written.path}{rest}", err=True)
