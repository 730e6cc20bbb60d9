"""The report of an ablation: what its results say, with intervals and tests, as tables, figures and one page."""

from kvcomp.lab.reporting.writing import Written, write_report

__all__ = ["Written", "write_report"]
