"""MileBench (arXiv:2404.18532): its tasks read from disk, and any task written in its format."""

from kvcomp.lab.milebench.export import export_samples
from kvcomp.lab.milebench.folder import Opened, open_folder
from kvcomp.lab.milebench.names import SEVEN, canonical
from kvcomp.lab.milebench.prompts import Truncation
from kvcomp.lab.milebench.reading import Reading
from kvcomp.lab.milebench.source import TaskFolder, is_task_folder
from kvcomp.lab.milebench.task import MileBenchTask

__all__ = [
    "SEVEN",
    "MileBenchTask",
    "Opened",
    "Reading",
    "TaskFolder",
    "Truncation",
    "canonical",
    "export_samples",
    "is_task_folder",
    "open_folder",
]
