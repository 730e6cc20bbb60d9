"""The envelope: what must hold when a method runs in `generate()`, feature by feature, each cell from a run.

A feature is one function that takes a `Bench` (a method of a library, a family's tiny model, prompts). The same
functions make the tables of `kvcomp verify`, the model promises of `kvcomp.testing.check`, and the table of peers.
"""

from kvcomp.testing.envelope.bench import Bench, Family
from kvcomp.testing.envelope.engine import Engine, NotClaimedError
from kvcomp.testing.envelope.feature import Feature
from kvcomp.testing.envelope.features import FEATURES
from kvcomp.testing.envelope.kvcomp_engine import KVCompEngine
from kvcomp.testing.envelope.matrix import Cell, Envelope, Verdict, features_named, run_envelope

__all__ = [
    "FEATURES",
    "Bench",
    "Cell",
    "Engine",
    "Envelope",
    "Family",
    "Feature",
    "KVCompEngine",
    "NotClaimedError",
    "Verdict",
    "features_named",
    "run_envelope",
]
