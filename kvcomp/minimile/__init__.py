"""MiniMile: small tasks that this repository renders, and a small checkpoint that was trained on them."""

from pathlib import Path

from kvcomp.core.errors import UnknownNameError
from kvcomp.minimile.tasks import TASKS

__all__ = ["TASKS", "checkpoint_folder"]


def checkpoint_folder(name: str = "minimile-xs") -> Path:
    """Return the folder of a checkpoint that comes with the package."""
    folder = Path(__file__).parent / "checkpoints" / name
    if not folder.is_dir():
        available = sorted(path.name for path in folder.parent.glob("*/"))
        raise UnknownNameError(f"no checkpoint named {name!r}. Available: {', '.join(available)}")
    return folder
