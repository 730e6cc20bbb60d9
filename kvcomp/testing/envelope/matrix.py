"""Running the envelope: every feature for every method on every family, each cell from a run."""

from __future__ import annotations

import platform
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Any

import torch
import transformers

from kvcomp.core.errors import UnknownNameError, suggest
from kvcomp.testing.envelope.bench import Bench, Family
from kvcomp.testing.envelope.engine import Engine
from kvcomp.testing.envelope.feature import Feature
from kvcomp.testing.envelope.features import FEATURES
from kvcomp.testing.failures import ConformanceError
from kvcomp.version import __version__


class Verdict(StrEnum):
    """What a run said."""

    GREEN = "green"  # the promise is kept
    RED = "red"  # it is broken
    DASH = "dash"  # it is not made; the reason says why


@dataclass(frozen=True)
class Cell:
    """One feature of one method on one family. `reason` is what was seen (red), or why it is not promised (a dash)."""

    method: str
    family: str
    feature: str
    verdict: Verdict
    reason: str = ""
    seconds: float = 0.0


@dataclass(frozen=True)
class Envelope:
    """The cells of one run, and the versions that it ran with."""

    cells: tuple[Cell, ...]
    versions: dict[str, str]

    @property
    def broken(self) -> list[Cell]:
        """Return the red cells."""
        return [cell for cell in self.cells if cell.verdict is Verdict.RED]

    def dump(self) -> dict[str, Any]:
        """Return the envelope as one JSON document; times are left out, so that a second run gives the same."""
        cells = [{key: value for key, value in asdict(cell).items() if key != "seconds"} for cell in self.cells]
        promises = {name: FEATURES[name].promise for name in self.named("feature")}
        return {"versions": self.versions, "promises": promises, "cells": cells}

    @classmethod
    def load(cls, document: dict[str, Any]) -> Envelope:
        """Return the envelope that `dump` wrote."""
        cells = (Cell(**cell | {"verdict": Verdict(cell["verdict"])}) for cell in document["cells"])
        return cls(tuple(cells), document["versions"])

    def named(self, axis: str) -> list[str]:
        """Return the names on an axis (`method`, `family` or `feature`), in the order of the run."""
        return list(dict.fromkeys(getattr(cell, axis) for cell in self.cells))


def features_named(names: Iterable[str] | None = None, quick: bool = False) -> list[Feature]:
    """Return the features of these names, all of them by default.

    Raises:
        UnknownNameError: there is no feature of a name.
    """
    chosen = list(FEATURES) if names is None else list(names)
    for name in chosen:
        if name not in FEATURES:
            raise UnknownNameError(f"no feature named {name!r}. {suggest(name, FEATURES)}")
    return [FEATURES[name] for name in chosen if FEATURES[name].quick or not quick]


def try_feature(feature: Feature, bench: Bench) -> Cell:
    """Return the cell of one feature. What the library refuses clearly is a dash; any other error is red."""
    started = time.perf_counter()
    verdict, reason = Verdict.GREEN, ""
    try:
        feature.trial(bench)
    except ConformanceError as error:  # first: it is an AssertionError, by which a peer may refuse
        verdict, reason = Verdict.RED, one_line(error)
    except bench.engine.dashes as error:
        verdict, reason = Verdict.DASH, one_line(error)
    except Exception as error:
        verdict, reason = Verdict.RED, f"raised {type(error).__name__}: {one_line(error)}"
    return Cell(bench.engine.name, bench.family.name, feature.name, verdict, reason, time.perf_counter() - started)


def cells_of(engine: Engine, family: Family, features: Sequence[Feature], model: Any | None = None) -> Iterator[Cell]:
    """Yield the cells of one method on one family; where not even a prompt can be held, all are that reason."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            bench = Bench.of(engine, family, model)
        except engine.dashes as error:
            yield from (Cell(engine.name, family.name, each.name, Verdict.DASH, one_line(error)) for each in features)
            return
        except Exception as error:
            reason = f"a prompt raised {type(error).__name__}: {one_line(error)}"
            yield from (Cell(engine.name, family.name, each.name, Verdict.RED, reason) for each in features)
            return
        for each in features:
            yield try_feature(each, bench)


def run_envelope(
    engines: Sequence[Engine],
    families: Sequence[Family],
    features: Sequence[Feature],
    tell: Callable[[Cell], None] = lambda cell: None,
) -> Envelope:
    """Return the cells of every feature for every method on every family; `tell` hears of each as it is known."""
    cells = []
    for family in families:
        model = family.model()
        for engine in engines:
            for cell in cells_of(engine, family, features, model):
                tell(cell)
                cells.append(cell)
    return Envelope(tuple(cells), versions())


def versions() -> dict[str, str]:
    """Return the versions that a run depends on."""
    return {
        "kvcomp": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }


def one_line(error: BaseException) -> str:
    """Return a message without its line breaks."""
    return " ".join(str(error).split()) or type(error).__name__
