"""What a testbed is known to answer with the full cache: `tasks.json` in its folder."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError

from kvcomp.core.errors import InputError
from kvcomp.lab.tasks import Task

FILE = "tasks.json"
LEARNED, LEARNED_HARD = 0.95, 0.90


class TaskRecord(BaseModel):
    """How a model answered one task with the full cache.

    Attributes:
        exact_match: share of right answers.
        ci: its Wilson 95 % interval.
        samples: how many were asked.
        reference_tokens: of the longest prompt.
        learned: whether the share is high enough for the task to measure compression with this model.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    exact_match: float
    ci: tuple[float, float]
    samples: int
    reference_tokens: int
    learned: bool


_RECORDS = TypeAdapter(dict[str, TaskRecord])


def is_learned(task: Task, exact_match: float) -> bool:
    """Return whether a model that answers so well has learned a task."""
    return exact_match >= (LEARNED_HARD if task.hard else LEARNED)


def read_records(folder: Path) -> dict[str, TaskRecord]:
    """Return the records beside a model by the names of their tasks; none where there is no such file.

    Raises:
        InputError: the file is malformed.
    """
    path = folder / FILE
    if not path.is_file():
        return {}
    try:
        return _RECORDS.validate_json(path.read_bytes())
    except ValidationError as error:
        faults = "; ".join(f"{'.'.join(map(str, fault['loc']))}: {fault['msg']}" for fault in error.errors())
        raise InputError(f"{path} must hold a record of each task, and does not: {faults}") from None


def write_records(folder: Path, records: Mapping[str, TaskRecord]) -> None:
    """Write the records beside a model."""
    document = {name: record.model_dump(mode="json") for name, record in records.items()}
    (folder / FILE).write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
