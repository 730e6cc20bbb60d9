"""The archives that hold the seven tasks.

Nothing of the data comes with kvcomp. Its repository says CC BY-NC 4.0 in its data licence, and CC BY in other places;
kvcomp takes the stricter one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from kvcomp.core.errors import UnknownNameError, suggest
from kvcomp.lab.milebench.names import KNOWN, SEVEN, canonical

REPOSITORY = "FreedomIntelligence/MileBench"
"""A dataset repository of the Hugging Face hub."""
LICENCE = "CC BY-NC 4.0"


@dataclass(frozen=True)
class Archive:
    """One archive.

    Attributes:
        number: MileBench's number of it.
        num_bytes: its length.
        sha256: hexadecimal digits of its checksum; only the first ones where no more are known.
        exact: whether the length is known to the byte.
    """

    number: int
    num_bytes: int
    sha256: str
    exact: bool = True

    @property
    def name(self) -> str:
        """Return the name of the file."""
        return f"MileBench_part{self.number}.tar.gz"

    @property
    def tasks(self) -> tuple[str, ...]:
        """Return those of the seven tasks that it holds."""
        return tuple(task.name for task in SEVEN if task.archive == self.number)


ARCHIVES = (
    Archive(0, 3_974_906_269, "c7258cc553b2996cc466de32b99ad37c0d64976417abb8651eebf02bc1328b40"),
    Archive(1, 2_625_281_958, "e90d5d4e83e256a6ddcecdc0cb0ce4335f600fdb54d79c966dcb88e87327090a"),
    Archive(2, 2_018_154_102, "0e84fef4ae8bba6760499bf72159c4f8c62c82d9ae70112bf1a72aac949c9505"),
    Archive(4, 2_512_746_509, "05471d502f8fa0665eb54087f9dca438f3fe7f8df6f81793cac0695ae19209be"),
    Archive(5, 3_370_000_000, "77283fae01f3e0429e7f21b3d2f486d38203f9f318b0bb1af11", exact=False),
)
"""Those that hold one of the seven tasks; parts 3 and up to 22 other tasks are of no use here."""


def archives_of(tasks: Sequence[str] | None) -> tuple[Archive, ...]:
    """Return the archives that hold these tasks; None for all seven.

    Raises:
        UnknownNameError: a task is not among them.
    """
    names = [canonical(task) for task in tasks or KNOWN]
    for name in names:
        if name not in KNOWN:
            raise UnknownNameError(f"no task of MileBench named {name!r} is read here. {suggest(name, KNOWN)}")
    wanted = {KNOWN[name].archive for name in names}
    return tuple(archive for archive in ARCHIVES if archive.number in wanted)
