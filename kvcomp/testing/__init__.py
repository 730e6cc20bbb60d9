"""The conformance kit: `check(MyPart)` runs every promise of a strategy's parts on seeded random samples.

It needs neither pytest nor Hypothesis. The project's own tests call the same promises.
"""

from kvcomp.testing.conformance import check
from kvcomp.testing.failures import ConformanceError
from kvcomp.testing.promises import PROMISES
from kvcomp.testing.runs import Run, run, view_for
from kvcomp.testing.samples import Sample, make_sample

__all__ = ["PROMISES", "ConformanceError", "Run", "Sample", "check", "make_sample", "run", "view_for"]
