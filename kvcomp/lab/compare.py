"""Compare strategies on the same samples: exact match, bytes, decode time, and attention across modalities."""

from __future__ import annotations

import random
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

from kvcomp.core.config import strategy
from kvcomp.core.errors import KVCompError
from kvcomp.core.strategy import Strategy
from kvcomp.lab.answers import answer
from kvcomp.lab.batches import Batch, QueryMode, make_batches
from kvcomp.lab.outcomes import Outcome, judge
from kvcomp.lab.statistics import mean, wilson
from kvcomp.lab.tasks import Task
from kvcomp.lab.testbed import LoadedTestbed
from kvcomp.lab.timing import decode_seconds

OnStep = Callable[[str], None]


@dataclass(frozen=True)
class Row:
    """One recipe at one budget on one task.

    Attributes:
        exact_match: share of the answers that are right to the last token.
        ci: Wilson 95 % interval of that share.
        kv_bytes: keys and values that the cache holds once the prompt is compressed, mean per sample.
        decode_ratio: median time per decoded token, relative to the reference's.
        rho: per layer, the share of attention that crosses modalities, mean over samples; None where not measured.
    """

    recipe: str
    budget: float | str
    task: str
    exact_match: float
    ci: tuple[float, float]
    kv_bytes: float
    decode_ratio: float | None
    rho: tuple[float | None, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return the row as plain data."""
        return asdict(self) | {"ci": list(self.ci), "rho": list(self.rho)}


@dataclass(frozen=True)
class Agreement:
    """How many answers of one recipe at one budget, over all tasks, are the reference's to the letter."""

    recipe: str
    budget: float | str
    same: int
    samples: int


@dataclass(frozen=True)
class Skipped:
    """A recipe at a budget that could not be run, and why."""

    recipe: str
    budget: float | str
    reason: str


@dataclass(frozen=True)
class Results:
    """What a comparison found."""

    rows: tuple[Row, ...]
    agreement: tuple[Agreement, ...]
    skipped: tuple[Skipped, ...]


@dataclass
class _Tally:
    """What one strategy has shown so far on one task."""

    outcomes: list[Outcome] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)

    @property
    def predictions(self) -> list[str]:
        return [seen.prediction for seen in self.outcomes]

    def row(self, strategy: Strategy, task: Task, reference: _Tally) -> Row:
        samples, right = len(self.outcomes), sum(seen.exact_match for seen in self.outcomes)
        return Row(
            recipe=strategy.name,
            budget=budget_of(strategy),
            task=task.name,
            exact_match=right / samples,
            ci=wilson(right, samples),
            kv_bytes=mean(seen.kv_bytes for seen in self.outcomes) or 0.0,
            decode_ratio=_ratio(self.seconds, reference.seconds),
            rho=tuple(mean(layer) for layer in zip(*(seen.rho for seen in self.outcomes), strict=True)),
        )


def grid(recipes: Sequence[str], budgets: Sequence[float]) -> list[Strategy]:
    """Return every recipe at every budget; a recipe without a selector, which ignores the budget, once.

    >>> [f"{made.name} {made.budget}" for made in grid(["full", "random"], [1.0, 0.2])]
    ['full 1', 'random 1', 'random 0.2']
    """
    built = [strategy(recipe, 1.0) for recipe in recipes]
    return [
        made
        for recipe, kept in zip(recipes, built, strict=True)
        for made in ([kept] if kept.ignores_budget else [strategy(recipe, budget) for budget in budgets])
    ]


def budget_of(strategy: Strategy) -> float | str:
    """Return a ratio as a number, any other budget as it is spelled."""
    budget = strategy.budget
    return str(budget) if budget.ratio is None or budget.or_smallest else float(budget.ratio)


class Comparison:
    """The same samples of every task, answered under every strategy. All comparisons are paired.

    Answers come from left-padded batches, which give each row what it gives alone. Decode time comes from single
    prompts, the strategies in turns of one token.

    Args:
        bed: who answers.
        tasks: what is asked.
        strategies: see `grid`; the first is the reference for decode time and agreement.
        samples: how many of each task.
        split: of the tasks.
        batch: samples per batch.
        timed: samples per task whose decode time is measured.
        max_new_tokens: length of an answer at most.
        seed: of the order in which strategies are timed.
    """

    def __init__(
        self,
        bed: LoadedTestbed,
        tasks: Sequence[Task],
        strategies: Sequence[Strategy],
        *,
        samples: int,
        split: str = "demo",
        batch: int = 10,
        timed: int = 2,
        max_new_tokens: int = 16,
        seed: int = 0,
    ) -> None:
        self.bed, self.tasks, self.strategies = bed, tasks, strategies
        self.samples, self.split, self.batch, self.timed = samples, split, batch, timed
        self.max_new_tokens, self.seed = max_new_tokens, seed
        self._tallies = {(number, task.name): _Tally() for number in range(len(strategies)) for task in tasks}
        self._failures: dict[int, str] = {}

    @property
    def steps(self) -> int:
        """Return how many times `run` calls `on_step`."""
        batches = -(-self.samples // self.batch)
        return len(self.tasks) * (len(self.strategies) * batches + self.timed)

    def run(self, on_step: OnStep = lambda done: None) -> Results:
        """Return the results; `on_step` is told what is being run, before each step."""
        for task in self.tasks:
            for batch in self._batches(task):
                self._answer(task, batch, on_step)
        order = random.Random(self.seed)
        for task in self.tasks:
            for index in range(self.timed):
                self._time(task, index, order, on_step)
        return Results(tuple(self._rows()), tuple(self._agreement()), tuple(self._skipped()))

    def _batches(self, task: Task) -> Iterator[Batch]:
        samples = [task.sample(self.split, index) for index in range(self.samples)]
        name = partial(task.name_sample, self.split)
        return make_batches(self.bed, name, samples, self.batch, QueryMode.question_seen)

    def _answer(self, task: Task, batch: Batch, on_step: OnStep) -> None:
        for number, chosen in enumerate(self.strategies):
            on_step(f"{task.name}: {chosen.name} at {chosen.budget}")
            if number in self._failures:
                continue
            try:
                answers = answer(batch, chosen.for_samples(batch.numbers), max_new_tokens=self.max_new_tokens)
            except KVCompError as error:
                self._failures[number] = str(error)
            else:
                self._tallies[number, task.name].outcomes += judge(task, batch, answers, QueryMode.question_seen)

    def _time(self, task: Task, index: int, order: random.Random, on_step: OnStep) -> None:
        on_step(f"{task.name}: decode time")
        inputs = self.bed.encode([task.sample(self.split, index)])
        finished = self._finished()
        timed = [chosen for _, chosen in finished]
        measured = decode_seconds(self.bed.model, inputs, timed, self.max_new_tokens, order)
        for (number, _), seconds in zip(finished, measured, strict=True):
            self._tallies[number, task.name].seconds += seconds

    def _rows(self) -> Iterator[Row]:
        for number, chosen in self._finished():
            for task in self.tasks:
                yield self._tallies[number, task.name].row(chosen, task, self._tallies[0, task.name])

    def _agreement(self) -> Iterator[Agreement]:
        expected = self._predictions(0)
        for number, chosen in self._finished():
            same = sum(map(str.__eq__, self._predictions(number), expected))
            yield Agreement(chosen.name, budget_of(chosen), same, len(expected))

    def _skipped(self) -> Iterator[Skipped]:
        for number, reason in sorted(self._failures.items()):
            yield Skipped(self.strategies[number].name, budget_of(self.strategies[number]), reason)

    def _finished(self) -> list[tuple[int, Strategy]]:
        return [(number, made) for number, made in enumerate(self.strategies) if number not in self._failures]

    def _predictions(self, number: int) -> list[str]:
        return [text for task in self.tasks for text in self._tallies[number, task.name].predictions]


def _ratio(seconds: Sequence[float], reference: Sequence[float]) -> float | None:
    if not seconds or not reference:
        return None
    return statistics.median(seconds) / statistics.median(reference)
