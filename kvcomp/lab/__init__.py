"""Experiments: tasks, scoring, and the comparison of recipes on a testbed."""

from kvcomp.lab.compare import Agreement, Comparison, Results, Row, Skipped, grid
from kvcomp.lab.document import make_document
from kvcomp.lab.tasks import Sample, Task
from kvcomp.lab.testbed import LoadedTestbed, load_testbed

__all__ = [
    "Agreement",
    "Comparison",
    "LoadedTestbed",
    "Results",
    "Row",
    "Sample",
    "Skipped",
    "Task",
    "grid",
    "load_testbed",
    "make_document",
]
