"""Unpacking an archive that came from elsewhere: nothing leaves the folder, nothing but plain files is made."""

from __future__ import annotations

import shutil
import tarfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path, PurePosixPath, PureWindowsPath

from kvcomp.core.errors import DataError, InputError

Meter = Callable[[str, int, int | None], None]
"""Told what is going on, how many bytes are done, and of how many; None where nobody knows."""

DAMAGE = (tarfile.TarError, EOFError, OSError, zlib.error)


def extract(archive: Path, root: Path, tasks: Sequence[str], meter: Meter) -> int:
    """Unpack the folders of tasks from a tar archive into `<root>/<task>`, and return how many files that were.

    A task's folder may be at any depth in the archive (`MileBench/ALFRED/...`): what is above it is left out, and so is
    every other task. Files are unpacked beside their place and moved there when all are whole. Permissions and owners
    of the archive are not taken over.

    Raises:
        DataError: naming every member that is a link, no plain file, or climbs out; or every task that is not in it.
            Then nothing was unpacked.
        InputError: the archive is damaged, or the disk is full.
    """
    staging = root / f".{archive.name}.partial"
    shutil.rmtree(staging, ignore_errors=True)
    try:
        count = _unpack(archive, staging, tasks, meter)
        for task in tasks:
            shutil.copytree(staging / task, root / task, copy_function=shutil.move, dirs_exist_ok=True)
    except DAMAGE as error:
        raise InputError(f"the archive {archive} cannot be unpacked into {root}: {error}") from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return count


def _unpack(archive: Path, staging: Path, tasks: Sequence[str], meter: Meter) -> int:
    faults: list[str] = []
    seen: set[str] = set()
    count = 0
    for tar, member in _members(archive, meter):
        fault = unsafe(member)
        faults += [f"{member.name!r}: {fault}"] if fault else []
        inside = _inside_a_task(member, tasks)
        if faults or inside is None or not member.isfile():
            continue
        _write(tar, member, staging / inside)
        seen.add(inside.parts[0])
        count += 1
    faults = faults or [f"{task}: no file of this task is in the archive" for task in tasks if task not in seen]
    if faults:
        raise DataError(faults, str(archive))
    return count


def _members(archive: Path, meter: Meter) -> Iterator[tuple[tarfile.TarFile, tarfile.TarInfo]]:
    """Return every member, in order; the meter counts compressed bytes."""
    total = archive.stat().st_size
    with archive.open("rb") as raw, tarfile.open(fileobj=raw, mode="r|*") as tar:
        for member in tar:
            yield tar, member
            meter(f"unpacking {archive.name}", raw.tell(), total)


def unsafe(member: tarfile.TarInfo) -> str:
    """Return why a member must not be unpacked; empty where it may."""
    path = PurePosixPath(member.name)
    if path.is_absolute() or ".." in path.parts or PureWindowsPath(member.name).anchor or "\\" in member.name:
        return "a member must lie inside the archive's folder, and this one climbs out"
    if member.issym() or member.islnk():
        return f"a member must be a file or a folder, and this one is a link to {member.linkname!r}"
    return "" if member.isfile() or member.isdir() else "a member must be a file or a folder, and this one is neither"


def _inside_a_task(member: tarfile.TarInfo, tasks: Sequence[str]) -> PurePosixPath | None:
    """Return the path of a member from its task's folder on; None where it is of no task that is wanted."""
    parts = PurePosixPath(member.name).parts
    starts = [place for place, part in enumerate(parts) if part in tasks]
    return PurePosixPath(*parts[starts[0] :]) if starts else None


def _write(tar: tarfile.TarFile, member: tarfile.TarInfo, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    content = tar.extractfile(member)
    assert content is not None  # it is for members that are no file
    with content, path.open("wb") as file:
        shutil.copyfileobj(content, file)
