"""The conformance kit: `check(MyPart)` runs every promise on seeded random samples and in a tiny model.

It needs neither pytest nor Hypothesis. `pytest --kvcomp-conformance PACKAGE` runs the same on everything that an
installed package registers, and `kvcomp verify` prints what holds in `generate()` as a table. The project's own tests
call the same promises.
"""

from kvcomp.testing.conformance import MODEL_PROMISES, check
from kvcomp.testing.failures import ConformanceError
from kvcomp.testing.promises import PROMISES
from kvcomp.testing.runs import Run, run, view_for
from kvcomp.testing.samples import Sample, make_sample

__all__ = [
    "MODEL_PROMISES",
    "PROMISES",
    "ConformanceError",
    "Run",
    "Sample",
    "check",
    "make_sample",
    "run",
    "view_for",
]
