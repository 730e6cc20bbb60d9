"""Every promise in one line: `kvcomp.testing.check(MyPart)`."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from dataclasses import replace

import torch

from kvcomp.core.budget import Budget
from kvcomp.core.config import strategy as build
from kvcomp.core.errors import UnknownNameError, suggest
from kvcomp.core.interfaces import Part
from kvcomp.core.strategy import Strategy
from kvcomp.core.types import Modality
from kvcomp.testing.failures import ConformanceError, require
from kvcomp.testing.pipelines import Subject, as_part, pipeline_around
from kvcomp.testing.promises import PROMISES
from kvcomp.testing.promises.parts import PART_PROMISES
from kvcomp.testing.samples import Sample, make_sample

BUDGETS = (0.2, 0.55, 1.0)
ROUND_TRIP = "round-trip"
NEEDS_DISTINCT = frozenset({"row-alone", "permuted-rows", "permuted-heads"})  # rounding decides between equal scores


def check(subject: Subject, *, seeds: Collection[int] = (0, 1), without: Collection[str] = ()) -> None:
    """Return nothing if a part or recipe keeps every promise; raise at the first that it breaks.

    Args:
        subject: a part class or instance, which is put into a pipeline of built-in neighbours; or a recipe: its name,
            path, mapping, or a strategy.
        seeds: of the random samples.
        without: promises that the subject does not make, such as `convex-hull` for a merger that rotates keys; the
            names are those of the messages.

    Raises:
        ConformanceError: names the promise, what was seen, and how to see it again.
        UnknownNameError: `without` names no promise.

    >>> check("h2o", seeds=[0])
    """
    known = {*PROMISES, *PART_PROMISES, ROUND_TRIP}
    if unknown := set(without) - known:
        raise UnknownNameError(f"no promise named {min(unknown)!r}. {suggest(min(unknown), known)}")
    strategy, part = pipeline_around(subject), as_part(subject)
    for seed in seeds:
        for name, sample, promise in _checks(strategy, part, seed):
            if name not in without:
                _keep(name, promise, f"{_label(subject)} on {sample}; see it again with seeds=[{seed}]")


def _checks(strategy: Strategy, part: Part | None, seed: int) -> Iterator[tuple[str, str, Callable[[], None]]]:
    """Yield the name of each promise, the label of its sample, and the check itself."""
    if part is None:
        yield ROUND_TRIP, "its dump", lambda: round_trip(strategy)
    for sample in samples(seed):
        for member in strategy.parts if part is None else (part,):
            for name, alone in PART_PROMISES.items():
                yield name, sample.label, lambda a=alone, m=member, s=sample: a(strategy, m, s)  # type: ignore[misc]
        for budget in BUDGETS:
            at = replace(strategy, budget=Budget.parse(budget))
            for name, promise in PROMISES.items():
                if name not in NEEDS_DISTINCT or ", normal " in sample.label:
                    label = f"{sample.label}, budget {budget}"
                    yield name, label, lambda p=promise, a=at, s=sample: p(a, s)  # type: ignore[misc]


def samples(seed: int) -> list[Sample]:
    """Return the samples of one seed: padding, one token, long and one-modal prompts, second turns, wild values."""
    return [
        make_sample(seed, (9, 24, 17)),
        make_sample(seed, (1,), group=1),
        make_sample(seed, (150,), kv_heads=1, group=3),
        make_sample(seed, (21, 8), modalities=(Modality.TEXT,)),
        make_sample(seed, (20, 13), modalities=tuple(Modality), held=12),
        make_sample(seed, (30,), fill="mixed"),
        make_sample(seed, (30, 11), fill="extreme", dtype=torch.float16),
        make_sample(seed, (30, 11), fill="extreme", dtype=torch.bfloat16),
        make_sample(seed, (18, 12), fill="zero", dtype=torch.float16),
        make_sample(seed, (18, 12), fill="equal", dtype=torch.bfloat16),
    ]


def round_trip(strategy: Strategy) -> None:
    """A strategy comes back from its dump."""
    again = build(strategy.dump())
    require(again == strategy, f"the strategy must come back from its dump, got {again}")


def _keep(name: str, promise: Callable[[], None], where: str) -> None:
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
