"""Which differences can be believed: paired tests, corrected for how many were made."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from kvcomp.lab.controls import Oracle
from kvcomp.lab.reporting.cells import FULL, Arm, Block, Cell
from kvcomp.lab.results import Result
from kvcomp.lab.statistics import bootstrap, holm, mcnemar, mean_of_means, sign_flip

ALPHA = 0.05
ORACLE = Oracle.__name__  # as configurations name the class of a method


@dataclass(frozen=True)
class Comparison:
    """One arm held against another on the samples that both have answered.

    Attributes:
        task: a task, or `Average` for the unweighted mean over those that count.
        arm, against: which.
        samples: pairs.
        difference: of the mean scores, the arm's less the other's.
        low, high: the paired bootstrap interval of the difference, at 95 %.
        won, lost: pairs in which only the arm, or only the other, is right to the last token.
        test: `McNemar` (exact) where all scores are 0 or 1 on one task, else `sign flip`.
        p: its two-sided p-value.
        corrected: the same after Holm's correction for all comparisons of the model and query mode.
    """

    task: str
    arm: Arm
    against: Arm
    samples: int
    difference: float
    low: float
    high: float
    won: int
    lost: int
    test: str
    p: float
    corrected: float

    @property
    def significant(self) -> bool:
        """Return whether the difference can be believed."""
        return self.corrected < ALPHA

    @property
    def mark(self) -> int:
        """Return 1 where the arm is significantly better, -1 where it is worse, else 0."""
        return (self.difference > 0) - (self.difference < 0) if self.significant else 0


def compare_all(block: Block, baseline: str) -> dict[tuple[str, Arm], Comparison]:
    """Return every arm of a block held against the baseline, by task and for the average; one family of tests."""
    found: dict[tuple[str, Arm], Comparison] = {}
    for arm in block.arms:
        against = block.reference(baseline, arm.budget)
        if against is not None and against != arm:
            found |= {(made.task, arm): made for made in _compare(block, arm, against)}
    corrected = holm([made.p for made in found.values()])
    return {
        place: replace(made, corrected=value) for (place, made), value in zip(found.items(), corrected, strict=True)
    }


def best(block: Block, arms: Sequence[Arm], task: str) -> Arm | None:
    """Return the arm that is significantly better than every other one on a task or on average, corrected for the
    number of others; None where there is no such arm, or only one. The full cache and a control that is told the
    answer take no part.
    """
    candidates = [arm for arm in arms if arm.label != FULL and _competes(block.behind(arm, task))]
    if len(candidates) < 2:
        return None
    first = max(candidates, key=lambda arm: mean_of_means([cell.scores for cell in block.behind(arm, task)]))
    rivals = [hold_against(block, first, other, task) for other in candidates if other != first]
    sure = [rival for rival in rivals if rival is not None]
    corrected = holm([rival.p for rival in sure])
    wins = all(rival.difference > 0 and p < ALPHA for rival, p in zip(sure, corrected, strict=True))
    return first if wins and len(sure) == len(rivals) else None


def _competes(cells: Sequence[Cell]) -> bool:
    """Return whether there are results, and not of a control that is told the answer."""
    return bool(cells) and all(cell.configuration.details.get("method") != ORACLE for cell in cells)


def hold_against(block: Block, arm: Arm, against: Arm, task: str) -> Comparison | None:
    """Return one comparison, not corrected; None where there is no pair, or for the average one task has none."""
    mine, other = block.behind(arm, task), block.behind(against, task)
    pairs = [_pairs(*sides) for sides in zip(mine, other, strict=True)] if mine and other else []
    if not pairs or not all(pairs):
        return None
    groups = [[mine.score - other.score for mine, other in group] for group in pairs]
    outcomes = [(mine.exact_match, other.exact_match) for group in pairs for mine, other in group]
    won, lost = outcomes.count((True, False)), outcomes.count((False, True))
    binary = len(groups) == 1 and all(
        side.score == float(side.exact_match) for group in pairs for pair in group for side in pair
    )
    low, high = bootstrap(groups)
    return Comparison(
        task=task,
        arm=arm,
        against=against,
        samples=sum(map(len, groups)),
        difference=mean_of_means(groups),
        low=low,
        high=high,
        won=won,
        lost=lost,
        test="McNemar" if binary else "sign flip",
        p=(p := mcnemar(won, lost) if binary else sign_flip(groups)),
        corrected=p,
    )


def _compare(block: Block, arm: Arm, against: Arm) -> Iterator[Comparison]:
    made = (hold_against(block, arm, against, column) for column in block.columns)
    return (found for found in made if found is not None)


def _pairs(mine: Cell, other: Cell) -> list[tuple[Result, Result]]:
    return [(result, other.results[place]) for place, result in mine.results.items() if place in other.results]
