"""Experiments: tasks, scoring, and the comparison of recipes on a testbed."""

from kvcomp.lab.tasks import Sample, Task

__all__ = ["Sample", "Task"]
