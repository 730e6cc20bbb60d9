"""The image files of a task: found by either convention, never outside its folder, checked before they are used."""

from __future__ import annotations

from pathlib import Path, PurePosixPath, PureWindowsPath

from kvcomp.core.errors import InputError
from kvcomp.lab.images import check_image


class ImageFolder:
    """Finds the images of one task, and remembers what is wrong with each.

    Args:
        folder: of the task.
        key: of a task instance, that names the images.
        inner: the folder in it that holds them.
    """

    def __init__(self, folder: Path, key: str = "images_path", inner: str = "images") -> None:
        self._folder, self._key, self._inner = folder, key, inner
        self._known: dict[str, tuple[Path, str]] = {}

    def find_all(self, entries: tuple[str, ...], faults: list[str]) -> tuple[Path, ...]:
        """Return the files of all entries; what is wrong with them is added to the faults."""
        files = []
        for position, entry in enumerate(entries):
            if entry not in self._known:
                self._known[entry] = self._find(entry)
            path, fault = self._known[entry]
            files.append(path)
            faults += [f"task_instance.{self._key}[{position}]: {fault}"] if fault else []
        return tuple(files)

    def _find(self, entry: str) -> tuple[Path, str]:
        try:
            path = find_image(self._folder, entry, self._inner)
            check_image(path)
        except InputError as error:
            return self._folder, str(error)
        return path, ""


def find_image(folder: Path, entry: str, inner: str = "images") -> Path:
    """Return the file of an image, beside the annotation file or in an inner folder there.

    Raises:
        InputError: the path leaves the folder, or there is no such file.
    """
    inside = PurePosixPath(entry)
    if not entry or inside.is_absolute() or ".." in inside.parts or PureWindowsPath(entry).anchor or "\\" in entry:
        raise InputError(f"must be a path inside the task's folder, with forward slashes, got {entry!r}")
    for path in (folder / inner / entry, folder / entry):
        if is_file(path):
            return path
    raise InputError(f"no such image: {entry!r}; looked in {folder.name}/{inner} and in {folder.name}")


def is_file(path: Path) -> bool:
    """Return whether there is a file of this name; what cannot be a name is none."""
    try:
        return path.is_file()
    except (OSError, ValueError):  # a name that is too long, or holds a zero byte
        return False
