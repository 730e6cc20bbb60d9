"""Experiments: tasks, scoring, and what recipes do on a testbed, one evaluated or many compared."""

from kvcomp.lab.batches import QueryMode
from kvcomp.lab.compare import Agreement, Comparison, Results, Row, Skipped, grid
from kvcomp.lab.controls import Method, find_method
from kvcomp.lab.document import make_document, make_evaluation_document
from kvcomp.lab.evaluation import Evaluation, TaskResult
from kvcomp.lab.tasks import Sample, Task
from kvcomp.lab.testbed import LoadedTestbed, load_testbed

__all__ = [
    "Agreement",
    "Comparison",
    "Evaluation",
    "LoadedTestbed",
    "Method",
    "QueryMode",
    "Results",
    "Row",
    "Sample",
    "Skipped",
    "Task",
    "TaskResult",
    "find_method",
    "grid",
    "load_testbed",
    "make_document",
    "make_evaluation_document",
]
