"""Every promise in one line: `kvcomp.testing.check(MyPart)`."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from functools import partial

from kvcomp.core.budget import Budget
from kvcomp.core.config import strategy as build
from kvcomp.core.errors import UnknownNameError, suggest
from kvcomp.core.interfaces import PART_KINDS, Part
from kvcomp.core.registry import Entry
from kvcomp.core.strategy import Strategy
from kvcomp.testing.drawing import Drawing, drawings, smallest
from kvcomp.testing.envelope import FEATURES, KVCompEngine, Verdict
from kvcomp.testing.envelope.matrix import cells_of
from kvcomp.testing.failures import ConformanceError, require
from kvcomp.testing.families import FAMILIES
from kvcomp.testing.pipelines import Subject, as_part, pipeline_around
from kvcomp.testing.promises import PROMISES
from kvcomp.testing.promises.parts import PART_PROMISES
from kvcomp.testing.samples import Sample

BUDGETS = (0.2, 0.55, 1.0)
ROUND_TRIP = "round-trip"
NEEDS_DISTINCT = frozenset({"row-alone", "permuted-rows", "permuted-heads"})  # rounding decides between equal scores
MODEL_PROMISES: dict[str, str] = {name: each.promise for name, each in FEATURES.items() if each.quick}

Trial = Callable[[Sample], None]


@dataclass(frozen=True, eq=False)
class Case:
    """A part or recipe, and the strategy that its promises are asked of."""

    label: str
    strategy: Strategy
    part: Part | None

    @classmethod
    def of(cls, subject: Subject) -> Case:
        """Return the case of a part class or instance, or of a recipe."""
        return cls(_label(subject), pipeline_around(subject), as_part(subject))

    def promises(self) -> list[str]:
        """Return the names of the promises that are asked of it, cheap ones first."""
        return [*([] if self.part else [ROUND_TRIP]), *PART_PROMISES, *PROMISES, *MODEL_PROMISES]

    def keep(self, promise: str, seed: int) -> None:
        """Return nothing if the promise holds on the samples of a seed.

        Raises:
            ConformanceError: names the promise, the seed, what was seen, and the smallest example that was found.
        """
        if promise in MODEL_PROMISES:
            self._run_model(promise)
        elif promise == ROUND_TRIP:
            _attempt(promise, f"{self.label}, written and read again", lambda: round_trip(self.strategy))
        else:
            self._run_samples(promise, seed)

    def _run_samples(self, promise: str, seed: int) -> None:
        for where, trial in self._trials(promise):
            for drawing in drawings(seed):
                if promise in NEEDS_DISTINCT and drawing.fill != "normal":
                    continue
                if not _breaks(trial, drawing):
                    continue
                least = smallest(drawing, partial(_breaks, trial))
                label = f"{self.label} on {least.make().label}{where}; see it again with seeds=[{seed}] or {least}"
                _attempt(promise, label, partial(trial, least.make()))

    def _trials(self, promise: str) -> list[tuple[str, Trial]]:
        """Return what is tried on every sample, with what a message says of it."""
        if promise in PART_PROMISES:
            alone = PART_PROMISES[promise]
            members = self.strategy.parts if self.part is None else (self.part,)
            return [("", partial(alone, self.strategy, member)) for member in members]
        whole = PROMISES[promise]
        at = [(budget, replace(self.strategy, budget=Budget.parse(budget))) for budget in BUDGETS]
        return [(f", budget {budget}", partial(whole, made)) for budget, made in at]

    def _run_model(self, promise: str) -> None:
        (cell,) = cells_of(KVCompEngine(self.strategy), FAMILIES["llama"], [FEATURES[promise]])
        if cell.verdict is Verdict.RED:
            raise ConformanceError(cell.reason, promise, f"{self.label} on a tiny Llama")


def check(subject: Subject, *, seeds: Collection[int] = (0, 1), without: Collection[str] = ()) -> None:
    """Return nothing if a part or recipe keeps every promise; raise at the first that it breaks.

    Promises of budget, merging and independence are asked of it on random samples, as one attention layer sees them;
    those of `MODEL_PROMISES` in `generate()` of a tiny Llama.

    Args:
        subject: a part class or instance, which is put into a pipeline of built-in neighbours; or a recipe: its name,
            path, mapping, or a strategy.
        seeds: of the random samples.
        without: promises that the subject does not make, such as `convex-hull` for a merger that rotates keys; the
            names are those of the messages.

    Raises:
        ConformanceError: names the promise, what was seen, the seed, and a small example.
        UnknownNameError: `without` names no promise.

    >>> check("h2o", seeds=[0])
    """
    known = {*PROMISES, *PART_PROMISES, *MODEL_PROMISES, ROUND_TRIP}
    if unknown := set(without) - known:
        raise UnknownNameError(f"no promise named {min(unknown)!r}. {suggest(min(unknown), known)}")
    case = Case.of(subject)
    for promise in case.promises():
        if promise in without:
            continue
        for seed in (0,) if promise in MODEL_PROMISES else seeds:
            case.keep(promise, seed)


def checkable(entry: Entry) -> bool:
    """Return whether a registered thing is a part or a recipe, which make promises."""
    return entry.kind == "recipe" or entry.kind in PART_KINDS


def round_trip(strategy: Strategy) -> None:
    """A strategy comes back from its dump."""
    again = build(strategy.dump())
    require(again == strategy, f"the strategy must come back from its dump, got {again}")


def _breaks(trial: Trial, drawing: Drawing) -> bool:
    try:
        trial(drawing.make())
    except Exception:
        return True
    return False


def _attempt(name: str, where: str, promise: Callable[[], None]) -> None:
    try:
        promise()
    except ConformanceError as error:
        raise ConformanceError(error.seen, name, where) from None
    except Exception as error:
        raise ConformanceError(f"raised {type(error).__name__}: {error}", name, where) from error


def _label(subject: Subject) -> str:
    if isinstance(subject, Strategy):
        return f"strategy {subject.name!r}"
    if isinstance(subject, type):
        return subject.__name__
    return type(subject).__name__ if isinstance(subject, Part) else f"recipe {subject!r}"
