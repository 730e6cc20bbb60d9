"""Results by cell: what one strategy showed on one task, at one budget, in one query mode, with one model."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeVar

from kvcomp.core.errors import UnknownNameError, suggest
from kvcomp.lab.results import UNLEARNED, Configuration, Result, Study
from kvcomp.lab.statistics import mean, mean_of_means

FULL = "full"
AVERAGE = "Average"
Budget = float | str
Value = TypeVar("Value")


@dataclass(frozen=True)
class Arm:
    """A strategy with what the grid changed of it, at a budget: a line of a table, a point of a curve."""

    label: str
    budget: Budget

    def __str__(self) -> str:
        return f"{self.label} at {self.budget}"


@dataclass(frozen=True, eq=False)
class Cell:
    """The samples of one task under one arm. Several seeds are one larger sample.

    Attributes:
        configuration: of the first seed.
        planned: how many samples there should be.
        results: those that are there, by seed and number.
    """

    configuration: Configuration
    planned: int
    results: Mapping[tuple[int, int], Result]

    @cached_property
    def scores(self) -> list[float]:
        """Return the score of every sample, by the task's own metric, from 0 to 1."""
        return [result.score for result in self.results.values()]

    @property
    def score(self) -> float | None:
        """Return the mean score, None without a sample."""
        return mean(self.scores)

    def mean(self, read: Callable[[Result], float | None]) -> float | None:
        """Return the mean of a number over the samples where it was measured."""
        return mean(read(result) for result in self.results.values())

    @property
    def share_of_bytes(self) -> float | None:
        """Return the bytes of keys and values, of what all tokens would take."""
        held, whole = self.mean(lambda result: result.kv_bytes), self.mean(lambda result: result.full_bytes)
        return held / whole if held is not None and whole else None

    @property
    def policy(self) -> Mapping[str, Any]:
        """Return the policy of the strategy as its document has it, empty where it is not known."""
        strategy = self.configuration.details.get("strategy")
        found = strategy.get("policy") if isinstance(strategy, Mapping) else None
        return found if isinstance(found, Mapping) else {}


@dataclass(frozen=True, eq=False)
class Block:
    """The cells of one model in one query mode: everything in it was asked the same questions.

    Attributes:
        model, query_mode: which.
        tasks: in the order of the plan.
        arms: in the order of the plan.
        cells: by task and arm.
        unlearned: the tasks that the model does not answer with the full cache either; averages leave them out.
    """

    model: str
    query_mode: str
    tasks: tuple[str, ...]
    arms: tuple[Arm, ...]
    cells: Mapping[tuple[str, Arm], Cell]
    unlearned: frozenset[str] = frozenset()

    @property
    def columns(self) -> tuple[str, ...]:
        """Return the tasks, and the average where there are several."""
        return (*self.tasks, AVERAGE) if len(self.tasks) > 1 else self.tasks

    @property
    def title(self) -> str:
        """Return how the block is called in captions."""
        return f"{self.model}, {self.query_mode.replace('_', ' ')}"

    @property
    def labels(self) -> tuple[str, ...]:
        """Return the strategies, each once."""
        return unique(arm.label for arm in self.arms)

    def budgets(self, labels: Iterable[str] | None = None) -> tuple[Budget, ...]:
        """Return the budgets of strategies, by default of all, ascending, those that are no ratio last."""
        wanted = set(self.labels if labels is None else labels)
        found = unique(arm.budget for arm in self.arms if arm.label in wanted)
        return tuple(sorted(found, key=lambda budget: (isinstance(budget, str), budget)))

    def column(self, arm: Arm) -> list[Cell]:
        """Return the cells of an arm that have a sample, one per task."""
        found = (self.cells.get((task, arm)) for task in self.tasks)
        return [cell for cell in found if cell is not None and cell.results]

    def behind(self, arm: Arm, column: str) -> list[Cell]:
        """Return the cells that a column is about; for the average, none where a task that counts lacks a sample."""
        tasks = [task for task in self.tasks if task not in self.unlearned] if column == AVERAGE else [column]
        found = [self.cells.get((task, arm)) for task in tasks]
        cells = [cell for cell in found if cell is not None and cell.results]
        return cells if len(cells) == len(tasks) else []

    def score(self, arm: Arm, column: str) -> float | None:
        """Return the mean score on a task; for the average, the unweighted mean over those that count."""
        cells = self.behind(arm, column)
        return mean_of_means([cell.scores for cell in cells]) if cells else None

    def reference(self, label: str, budget: Budget) -> Arm | None:
        """Return the arm of a strategy to hold others against: at the same budget, or else its only one."""
        own = [arm for arm in self.arms if arm.label == label]
        same = [arm for arm in own if arm.budget == budget]
        return same[0] if same else own[0] if len(own) == 1 else None


def blocks_of(study: Study) -> list[Block]:
    """Return the results of a study, a block per model and query mode."""
    cells: dict[tuple[str, str], dict[tuple[str, Arm], Cell]] = {}
    samples: dict[str, dict[tuple[int, int], Result]] = {}
    for result in study.results:
        own = samples.setdefault(result.configuration.id, {})
        own[result.configuration.seed, result.sample] = result
    for entry in study.planned:
        made = entry.configuration
        block = cells.setdefault((made.model, made.query_mode), {})
        place = made.task, Arm(made.label, made.budget)
        before = block.get(place)
        found = samples.get(made.id, {})
        block[place] = (
            Cell(made, entry.samples, found)
            if before is None
            else Cell(before.configuration, before.planned + entry.samples, {**before.results, **found})
        )
    models = study.run.environment.get("models", {})
    return [_block(model, mode, found, models.get(model, {})) for (model, mode), found in cells.items()]


def _block(model: str, mode: str, cells: dict[tuple[str, Arm], Cell], about: Mapping[str, Any]) -> Block:
    tasks, arms = unique(task for task, _ in cells), unique(arm for _, arm in cells)
    return Block(model, mode, tasks, arms, cells, frozenset(about.get(UNLEARNED, ())))


def find_baseline(blocks: Sequence[Block], name: str | None) -> str | None:
    """Return the strategy that the others are held against: the named one, by default the full cache where it is there.

    Raises:
        UnknownNameError: no strategy of that name was run.
    """
    labels = unique(label for block in blocks for label in block.labels)
    if name is None:
        return FULL if FULL in labels else None
    if name not in labels:
        raise UnknownNameError(f"no strategy named {name!r} in these results. {suggest(name, labels)}")
    return name


def unique(values: Iterable[Value]) -> tuple[Value, ...]:
    """Return the values, each once, in their order.

    >>> unique([2, 1, 2])
    (2, 1)
    """
    return tuple(dict.fromkeys(values))
