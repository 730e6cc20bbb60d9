"""Ready-made ablations: the paper's tables and figures, for the small testbed and for a real model."""

from __future__ import annotations

from pathlib import Path

from kvcomp.core.errors import InputError, suggest

FOLDER = Path(__file__).parent


def study_names() -> list[str]:
    """Return the names of the studies.

    >>> "table1" in study_names()
    True
    """
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def find_study(name: str) -> Path:
    """Return the file of a study by its name, or a file by its path.

    Raises:
        InputError: there is neither.
    """
    path = Path(name).expanduser()
    if path.is_file():
        return path
    if name in study_names():
        return FOLDER / f"{name}.yaml"
    raise InputError(f"must be a YAML file or the name of a study, got {name!r}. {suggest(name, study_names())}")
