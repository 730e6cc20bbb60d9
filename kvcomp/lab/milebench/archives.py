"""The archives that hold the seven tasks: what they are, and how they come to a folder, checked.

Nothing of the data comes with kvcomp. Its repository says CC BY-NC 4.0 in its data licence, and CC BY in other places;
kvcomp takes the stricter one.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from huggingface_hub import hf_hub_download
from huggingface_hub.utils.tqdm import tqdm

from kvcomp.core.errors import InputError, UnknownNameError, suggest
from kvcomp.lab.milebench.extraction import Meter, extract
from kvcomp.lab.milebench.names import KNOWN, SEVEN, canonical

REPOSITORY = "FreedomIntelligence/MileBench"
"""A dataset repository of the Hugging Face hub."""
LICENCE = "CC BY-NC 4.0"
FOLDER = "archives"
BLOCK = 1 << 20


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


@dataclass(frozen=True)
class Fetched:
    """What became of one archive.

    Attributes:
        archive: the archive.
        sha256: its checksum, as computed here.
        files: how many files it gave.
        again: whether it had been fetched before, and nothing was done.
    """

    archive: Archive
    sha256: str
    files: int
    again: bool

    def describe(self) -> dict[str, Any]:
        """Return what the command line shows of it."""
        return {
            "archive": self.archive.name,
            "tasks": list(self.archive.tasks),
            "files": self.files,
            "sha256": self.sha256,
            "digits_compared": len(self.archive.sha256),
            "again": self.again,
        }


class Download(Protocol):
    """Brings one archive into a folder and returns its path. It goes on where an earlier call was cut off."""

    def __call__(self, archive: Archive, folder: Path, meter: Meter) -> Path:
        """Return the path of the whole archive; raise `InputError` where it does not come."""


def download_from_hub(archive: Archive, folder: Path, meter: Meter, endpoint: str | None = None) -> Path:
    """Return the path of an archive, downloaded with `huggingface_hub`, which resumes what was cut off.

    Args:
        archive: which one.
        folder: where it goes.
        meter: told of the progress.
        endpoint: of the hub; None for what `HF_ENDPOINT` or the library says.

    Raises:
        InputError: the hub cannot be reached, or does not have it.
    """

    class Bar(tqdm):  # type: ignore[misc]
        """Tells the meter what a progress bar would show."""

        monitor_interval = 0  # no thread that watches a bar nobody sees

        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **options | {"file": io.StringIO(), "disable": False})  # type: ignore[no-untyped-call]

        def display(self, *args: Any, **options: Any) -> None:
            meter(f"downloading {archive.name}", int(self.n), None if self.total is None else int(self.total))

    try:
        return Path(
            hf_hub_download(
                REPOSITORY, archive.name, repo_type="dataset", local_dir=folder, endpoint=endpoint, tqdm_class=Bar
            )
        )
    except Exception as error:  # the library passes on errors of whichever HTTP library it uses
        raise InputError(
            f"{archive.name} cannot be downloaded from the dataset {REPOSITORY}: {error}; try again, and it goes on "
            "where it stopped"
        ) from error


def fetch(
    root: Path,
    tasks: Sequence[str] | None = None,
    *,
    download: Download = download_from_hub,
    meter: Meter = lambda what, done, total: None,
    keep: bool = False,
) -> list[Fetched]:
    """Download, check and unpack the archives that hold some of the seven tasks, and return what became of each.

    What is done is done: an archive that was unpacked here before is not fetched again. An archive whose length or
    checksum is wrong is removed, so that the next call fetches it anew.

    Args:
        root: gets one folder per task, and a folder `archives` with a note per archive.
        tasks: names by any alias; None for all seven.
        download: brings an archive.
        meter: told of the progress.
        keep: whether archives stay after they were unpacked.

    Raises:
        UnknownNameError: a task is not among the seven.
        InputError: an archive does not come, or is not what it should be, or cannot be unpacked.
        DataError: an archive holds members that must not be unpacked, or lacks a task.
    """
    chosen = archives_of(tasks)
    (root / FOLDER).mkdir(parents=True, exist_ok=True)
    return [_fetch_one(archive, root, download, meter, keep) for archive in chosen]


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


def _fetch_one(archive: Archive, root: Path, download: Download, meter: Meter, keep: bool) -> Fetched:
    note = root / FOLDER / f"{archive.name}.json"
    known = _read_note(note)
    if known and all((root / task).is_dir() for task in archive.tasks):
        return Fetched(archive, known["sha256"], known["files"], again=True)
    path = download(archive, root / FOLDER, meter)
    sha256 = check(path, archive, meter)
    files = extract(path, root, archive.tasks, meter)
    note.write_text(json.dumps({"sha256": sha256, "files": files}) + "\n", encoding="utf-8")
    if not keep:
        path.unlink()
    return Fetched(archive, sha256, files, again=False)


def _read_note(note: Path) -> dict[str, Any] | None:
    """Return what was noted of an archive that was unpacked; None where there is no such note."""
    try:
        known: dict[str, Any] = json.loads(note.read_text(encoding="utf-8"))
        return {"sha256": str(known["sha256"]), "files": int(known["files"])}
    except (OSError, ValueError, LookupError, TypeError):
        return None


def check(path: Path, archive: Archive, meter: Meter) -> str:
    """Return the checksum of a downloaded archive.

    Raises:
        InputError: length or checksum differ; the file is removed.
    """
    length = path.stat().st_size
    digest = _digest(path, length, meter)
    wrong = ""
    if archive.exact and length != archive.num_bytes:
        wrong = f"must have {archive.num_bytes:,} bytes, got {length:,}"
    elif not digest.startswith(archive.sha256):
        wrong = f"must have a SHA-256 that begins with {archive.sha256}, got {digest}"
    if wrong:
        path.unlink()
        raise InputError(f"{archive.name} {wrong}; it was removed, fetch it again")
    return digest


def _digest(path: Path, length: int, meter: Meter) -> str:
    digest, done = hashlib.sha256(), 0
    with path.open("rb") as file:
        while block := file.read(BLOCK):
            digest.update(block)
            done += len(block)
            meter(f"checking {path.name}", done, length)
    return digest.hexdigest()
