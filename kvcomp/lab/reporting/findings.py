"""What a report says: everything that is drawn from results, before it is written in any form."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from kvcomp.lab.reporting.cells import FULL, Arm, Block, blocks_of, find_baseline
from kvcomp.lab.reporting.comparing import Comparison, compare_all
from kvcomp.lab.reporting.figure_rows import comparison_row
from kvcomp.lab.reporting.figures import Plot, plots_of
from kvcomp.lab.reporting.tables import (
    Table,
    ablation_tables,
    budget_text,
    cost_table,
    main_table,
    sweep_tables,
)
from kvcomp.lab.reporting.texts import file_name
from kvcomp.lab.results import Configuration, Result, Study

EXAMPLES = 3  # of each arm


@dataclass(frozen=True, eq=False)
class Example:
    """An answer that the full cache gets right and an arm gets wrong."""

    task: str
    sample: int
    arm: Arm
    reference: str
    prediction: str


@dataclass(frozen=True, eq=False)
class Findings:
    """What a study found.

    Attributes:
        study: the results.
        baseline: the strategy that others are held against; None where there is none.
        tables: in order.
        plots: in order.
        comparisons: of every arm with the baseline, as rows.
        examples: of what compression loses.
        answered, planned: how many answers there are, and should be.
        missing: configurations that lack answers, and how many.
        refused: configurations that cannot be, and why.
    """

    study: Study
    baseline: str | None
    tables: tuple[Table, ...]
    plots: tuple[Plot, ...]
    comparisons: tuple[dict[str, Any], ...]
    examples: tuple[Example, ...]
    answered: int
    planned: int
    missing: tuple[tuple[Configuration, int], ...]
    refused: tuple[tuple[Configuration, str], ...]

    @property
    def title(self) -> str:
        """Return the title of the report."""
        return "What compression of the KV cache costs"

    @property
    def state(self) -> str:
        """Return whether the results are complete, and whether the folder holds others."""
        stale = self.study.stale
        others = f" Besides, the folder holds {stale:,} of another plan, model, version or sample, left out here."
        return self._complete + (others if stale else "")

    @property
    def _complete(self) -> str:
        if not self.missing:
            return f"All {self.planned:,} answers are there."
        lacking = len(self.missing)
        return (
            f"This report is partial: {self.answered:,} of {self.planned:,} answers are there, and {lacking} "
            f"configuration{'s lack' if lacking > 1 else ' lacks'} some. `kvcomp ablate --resume` goes on."
        )


def find(study: Study, baseline: str | None = None) -> Findings:
    """Return what a study found.

    Raises:
        UnknownNameError: no strategy of the baseline's name was run.
    """
    blocks = blocks_of(study)
    against = find_baseline(blocks, baseline)
    compared = {block: compare_all(block, against) if against is not None else {} for block in blocks}
    skipped: Mapping[str, str] = study.skipped
    planned = sum(entry.samples for entry in study.planned if entry.configuration.id not in skipped)
    return Findings(
        study=study,
        baseline=against,
        tables=tuple(table for block in blocks for table in _tables(block, compared[block], against)),
        plots=_with_file_names([plot for block in blocks for plot in plots_of(block)]),
        comparisons=tuple(comparison_row(block, made) for block in blocks for made in compared[block].values()),
        examples=tuple(example for block in blocks for example in _examples(block)),
        answered=len(study.results),
        planned=planned,
        missing=tuple(study.missing()),
        refused=tuple(
            (entry.configuration, skipped[entry.configuration.id])
            for entry in study.planned
            if entry.configuration.id in skipped
        ),
    )


def describe(configuration: Configuration) -> str:
    """Return a configuration on one line."""
    return (
        f"{configuration.label} at {budget_text(configuration.budget)}, {configuration.task}, "
        f"{configuration.query_mode}, seed {configuration.seed}, {configuration.model}"
    )


def _tables(block: Block, comparisons: Mapping[tuple[str, Arm], Comparison], baseline: str | None) -> Iterator[Table]:
    budgets = block.budgets(label for label in block.labels if label != FULL) or block.budgets()
    for budget in budgets:
        if (table := main_table(block, budget, comparisons, baseline)) is not None:
            yield table
    yield from sweep_tables(block)
    yield from ablation_tables(block)
    if (cost := cost_table(block)) is not None:
        yield cost


def _with_file_names(plots: Sequence[Plot]) -> tuple[Plot, ...]:
    """Return the figures under names that are names of files, each its own."""
    named: dict[str, Plot] = {}
    for plot in plots:
        stem = file_name(plot.name)
        name = stem if stem not in named else f"{stem}-{len(named)}"
        named[name] = replace(plot, name=name)
    return tuple(named.values())


def _examples(block: Block) -> Iterator[Example]:
    """Yield what each arm gets wrong and the full cache right, the first few."""
    full = block.reference(FULL, 1.0)
    if full is None:
        return
    for arm in block.arms:
        lost = (found for task in block.tasks for found in _lost(block, task, arm, full))
        for _, example in zip(range(EXAMPLES), lost, strict=False):
            yield example


def _lost(block: Block, task: str, arm: Arm, full: Arm) -> Iterator[Example]:
    right, mine = _results(block, task, full), _results(block, task, arm)
    for place, result in mine.items():
        if place in right and right[place].exact_match and not result.exact_match:
            yield Example(task, result.sample, arm, result.reference, result.prediction)


def _results(block: Block, task: str, arm: Arm) -> Mapping[tuple[int, int], Result]:
    cell = block.cells.get((task, arm))
    return {} if cell is None else cell.results


def circumstances(study: Study) -> Sequence[tuple[str, str]]:
    """Return on what, and from what file, a study was run: names and values."""
    documents = [("started", study.run.started), ("finished", study.run.finished or "not finished")]
    documents += [*study.run.environment.items(), *study.run.config.items()]
    return [(str(name), _spelled(value)) for name, value in documents if value not in (None, "", [], {})]


def _spelled(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
