"""The tables of a report, in the shape of the paper's (FlowMM, arXiv:2511.05534, Tables 1 to 4)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from kvcomp.lab.reporting.cells import AVERAGE, FULL, Arm, Block, Budget, Cell, unique
from kvcomp.lab.reporting.comparing import Comparison, best, hold_against

Comparisons = Mapping[tuple[str, Arm], Comparison]
ABSENT = "-"
DAGGER = "†"


@dataclass(frozen=True)
class Entry:
    """One cell of a table.

    Attributes:
        text: what it says; of unknown origin.
        bold: significantly better than every other of its column.
        mark: 1 significantly above the baseline, -1 below, else 0.
        note: more, in small type.
    """

    text: str
    bold: bool = False
    mark: int = 0
    note: str = ""


@dataclass(frozen=True)
class Table:
    """A table whose first column is text and whose others are numbers.

    Attributes:
        name: for files and references.
        title: one line.
        caption: what the numbers are.
        head: titles of the columns.
        body: rows of entries; a row with one entry is the title of those that follow.
    """

    name: str
    title: str
    caption: str
    head: tuple[str, ...]
    body: tuple[tuple[Entry, ...], ...]


def main_table(block: Block, budget: Budget, comparisons: Comparisons, baseline: str | None) -> Table | None:
    """Return a line per strategy, a column per task, their average and its distance to the baseline (Table 1)."""
    arms = [arm for arm in block.arms if arm.budget == budget or (arm.label in (FULL, baseline) and _once(block, arm))]
    if not any(arm.budget == budget and block.column(arm) for arm in arms):
        return None
    columns = block.columns
    leaders = {task: best(block, [arm for arm in arms if arm.budget == budget], task) for task in columns}
    body = []
    for arm in arms:
        line = [Entry(arm.label)]
        for task in columns:
            made = comparisons.get((task, arm))
            line.append(Entry(_percent(block.score(arm, task)), leaders[task] == arm, made.mark if made else 0))
        body.append((*line, _distance(comparisons.get((columns[-1], arm)))))
    delta = "Δ" if baseline is None else f"Δ to {baseline}"
    metrics = ", ".join(unique(cell.configuration.metric for cell in block.cells.values()))
    return Table(
        name=f"main {block.model} {block.query_mode} {budget}",
        title=f"Performance at a budget of {budget_text(budget)}: {block.title}",
        caption=f"Mean score in percent ({metrics}). {_legend(baseline)} {sizes(block)}",
        head=("Method", *(_heading(block, column) for column in columns), delta),
        body=tuple(body),
    )


def sweep_tables(block: Block) -> Iterator[Table]:
    """Yield a table for each strategy and budget whose one field took several values: a line per task (Table 3)."""
    variants: dict[tuple[str, Budget, str], list[tuple[Any, Arm]]] = {}
    for (_, arm), cell in block.cells.items():
        settings = cell.configuration.settings
        if len(settings) == 1:
            ((path, value),) = settings.items()
            found = variants.setdefault((cell.configuration.strategy, arm.budget, path), [])
            if (value, arm) not in found:
                found.append((value, arm))
    for (name, budget, path), values in variants.items():
        if len(values) > 1:
            yield _sweep(block, name, budget, path, values)


def _sweep(block: Block, name: str, budget: Budget, path: str, values: Sequence[tuple[Any, Arm]]) -> Table:
    arms, body = [arm for _, arm in values], []
    for task in block.columns:
        leader = best(block, arms, task)
        entries = (Entry(_percent(block.score(arm, task)), leader == arm) for arm in arms)
        body.append((Entry(_heading(block, task)), *entries))
    return Table(
        name=f"sweep {name} {path} {block.model} {block.query_mode} {budget}",
        title=f"{name} under different {path}, budget {budget_text(budget)}: {block.title}",
        caption="Mean score in percent. Bold: significantly better than every other value (paired test, Holm's "
        f"correction, 5 %). {sizes(block)}",
        head=(path, *(str(value) for value, _ in values)),
        body=tuple(body),
    )


def ablation_tables(block: Block) -> Iterator[Table]:
    """Yield a table for each strategy that has variants `name-...` at the same budget: what each of them lacks or
    changes is worth (Table 4).
    """
    for arm in block.arms:
        variants = [
            other for other in block.arms if other.budget == arm.budget and other.label.startswith(f"{arm.label}-")
        ]
        if len(variants) > 1:
            yield _ablation(block, arm, variants)


def _ablation(block: Block, whole: Arm, variants: Sequence[Arm]) -> Table:
    columns = block.columns
    full = block.reference(FULL, whole.budget)
    body = [] if full is None else [_plain_line(block, full, columns)]
    body.append(_plain_line(block, whole, columns))
    for arm in variants:
        line = [Entry(arm.label)]
        for task in columns:
            made = hold_against(block, arm, whole, task)
            note = "" if made is None else f"{signed(made.low)} to {signed(made.high)}"
            line.append(Entry(_percent(block.score(arm, task)), note=note))
        body.append(tuple(line))
    return Table(
        name=f"ablation {whole.label} {block.model} {block.query_mode} {whole.budget}",
        title=f"Variants of {whole.label} at a budget of {budget_text(whole.budget)}: {block.title}",
        caption=f"Mean score in percent; small: 95 % interval of the paired difference to {whole.label}, in points, "
        f"one by one and not corrected. {sizes(block)}",
        head=("Method", *(_heading(block, column) for column in columns)),
        body=tuple(body),
    )


def _plain_line(block: Block, arm: Arm, columns: Sequence[str]) -> tuple[Entry, ...]:
    return Entry(arm.label), *(Entry(_percent(block.score(arm, task))) for task in columns)


def cost_table(block: Block) -> Table | None:
    """Return bytes, decode time and the time that compression took, a line per arm (Table 2)."""
    body = []
    for arm in block.arms:
        cells = block.behind(arm, AVERAGE)
        if cells:
            entries = [_mean(cells, name) for name in ("kv_bytes", "decode_seconds", "compress_seconds")]
            share = [cell.share_of_bytes for cell in cells if cell.share_of_bytes is not None]
            body.append(
                (
                    Entry(arm.label),
                    Entry(budget_text(arm.budget)),
                    Entry(ABSENT if entries[0] is None else f"{entries[0] / 1024:,.1f}"),
                    Entry(_percent(sum(share) / len(share) if share else None)),
                    *(Entry(ABSENT if seconds is None else f"{1e3 * seconds:.2f}") for seconds in entries[1:]),
                )
            )
    if not body:
        return None
    return Table(
        name=f"cost {block.model} {block.query_mode}",
        title=f"What is held, and what it takes: {block.title}",
        caption="Means over the tasks that averages count. KV bytes once prompt or context is compressed, read from "
        "the storages. Times are each sample's share of its batch, as the ablation ran; nothing is bold, since times "
        "are not tested.",
        head=("Method", "Budget", "KV KiB", "% of all bytes", "decode ms/token", "compress ms"),
        body=tuple(body),
    )


def _heading(block: Block, column: str) -> str:
    return column + DAGGER if column in block.unlearned else column


def sizes(block: Block) -> str:
    """Return how many samples the cells of a block have, whether they are all that were planned, and what a dagger
    means where there is one.
    """
    counts = sorted({len(cell.results) for cell in block.cells.values() if cell.results})
    if not counts:
        return "No sample has been answered."
    span = f"{counts[0]}" if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
    whole = all(len(cell.results) == cell.planned for cell in block.cells.values())
    left_out = f" {DAGGER} Not learned by the model, and left out of averages." if block.unlearned else ""
    return f"{span} samples per task." + ("" if whole else " Incomplete: see what is missing.") + left_out


def budget_text(budget: Budget) -> str:
    """Return a ratio as percent, other budgets as they are spelled.

    >>> budget_text(0.05), budget_text(0.125), budget_text("512t")
    ('5%', '12.5%', '512t')
    """
    return f"{100 * budget:g}%" if isinstance(budget, float) else budget


def signed(value: float) -> str:
    """Return a difference of scores in points.

    >>> signed(-0.075), signed(0.0)
    ('-7.5', '+0.0')
    """
    return f"{100 * value:+.1f}"


def _mean(cells: Sequence[Cell], name: str) -> float | None:
    found = [cell.mean(lambda result: getattr(result, name)) for cell in cells]
    known = [value for value in found if value is not None]
    return sum(known) / len(known) if len(known) == len(found) else None


def _once(block: Block, arm: Arm) -> bool:
    return sum(other.label == arm.label for other in block.arms) == 1


def _percent(value: float | None) -> str:
    return ABSENT if value is None else f"{100 * value:.1f}"


def _distance(made: Comparison | None) -> Entry:
    if made is None:
        return Entry(ABSENT)
    return Entry(signed(made.difference), mark=made.mark, note=f"{signed(made.low)} to {signed(made.high)}")


def _legend(baseline: str | None) -> str:
    bold = "Bold: significantly better than every other compressed method of the column."
    if baseline is None:
        return f"{bold} No baseline was run."
    return (
        f"{bold} ▲ ▼: significantly above or below {baseline} (paired tests at 5 %, Holm's correction over all "
        "methods, budgets and columns of this model and query mode). Δ: points, with a 95 % paired bootstrap interval."
    )
