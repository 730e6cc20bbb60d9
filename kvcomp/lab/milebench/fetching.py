"""Fetching the archives: downloaded, checked, unpacked."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from filelock import FileLock, Timeout

from kvcomp.core.errors import InputError
from kvcomp.lab.milebench.archives import Archive, archives_of
from kvcomp.lab.milebench.extraction import Meter, extract
from kvcomp.lab.milebench.hub import download_from_hub

FOLDER = "archives"
BLOCK = 1 << 20
LOOK_SECONDS = 1.0  # between two looks at whether another process has finished


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
    checksum is wrong is removed, so that the next call fetches it anew. Of several processes that fetch one archive
    into one folder, one does it; the others wait, and go on by themselves where that one was stopped.

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


def _fetch_one(archive: Archive, root: Path, download: Download, meter: Meter, keep: bool) -> Fetched:
    with _alone(root / FOLDER / f"{archive.name}.lock", archive, meter):
        return _fetch_alone(archive, root, download, meter, keep)


@contextmanager
def _alone(path: Path, archive: Archive, meter: Meter) -> Iterator[None]:
    """Run a block while no other process does; the meter is told of the wait. A process that dies lets go."""
    lock = FileLock(path)
    while not lock.is_locked:
        try:
            lock.acquire(timeout=LOOK_SECONDS)
        except Timeout:
            meter(f"waiting for another process that fetches {archive.name}", 0, None)
        except OSError as error:
            raise InputError(f"the folder {path.parent} must be one that can be written to: {error}") from error
    try:
        yield
    finally:
        lock.release()


def _fetch_alone(archive: Archive, root: Path, download: Download, meter: Meter, keep: bool) -> Fetched:
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
