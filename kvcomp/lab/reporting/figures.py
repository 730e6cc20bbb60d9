"""The figures of a report: each is drawn from rows that are also written as a CSV file."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from kvcomp.lab.plots import INK, MARKERS, draw_rho
from kvcomp.lab.reporting.cells import FULL, Block, Cell, unique
from kvcomp.lab.reporting.comparing import hold_against
from kvcomp.lab.reporting.figure_rows import (
    Row,
    alignments,
    arm_row,
    bare_comparison_row,
    depth_rows,
    pareto_rows,
    rho_by_layer,
    score_rows,
)
from kvcomp.lab.reporting.tables import budget_text
from kvcomp.lab.reporting.texts import plain
from kvcomp.lab.statistics import mean

COLOURS = ("#d9622b", "#2f74c0", "#2a9d72", "#7a4fb5", "#c2447e", "#b8860b", "#5d8aa8", "#8b929c")
LINES = ("-", "--", ":", "-.")
MOST_COLUMNS = 4
NAME = 28  # characters of a name on a figure


@dataclass(frozen=True, eq=False)
class Plot:
    """A figure and what it shows.

    Attributes:
        name: of its files.
        title: one line.
        caption: how to read it.
        rows: the numbers, one table.
        draw: makes the figure.
    """

    name: str
    title: str
    caption: str
    rows: tuple[Row, ...]
    draw: Callable[[], Figure]


def plots_of(block: Block) -> Iterator[Plot]:
    """Yield the figures that the results of a block can fill."""
    for make in (budget_plot, rho_plot, alignment_plot, pareto_plot, time_plot, depth_plot):
        plot = make(block)
        if plot is not None:
            yield plot


def budget_plot(block: Block) -> Plot | None:
    """Return score against budget, a panel per task and a curve per strategy (the paper's Figure 4)."""
    rows = [row for row in score_rows(block) if row["low"] is not None]
    if len({row["budget"] for row in rows if isinstance(row["budget"], float)} - {1.0}) < 2:
        return None

    def draw() -> Figure:
        figure, panels = _panels(block.tasks)
        for task, axes in zip(block.tasks, panels, strict=True):
            for label in (label for label in block.labels if label != FULL):
                own = [row for row in rows if (row["task"], row["strategy"]) == (task, label)]
                _curve(axes, _style(block, label), label, [row for row in own if isinstance(row["budget"], float)])
            for row in rows:
                if (row["task"], row["strategy"]) == (task, FULL):
                    axes.axhline(100 * row["score"], color=INK, linewidth=0.8, linestyle=":", label=FULL)
            axes.set_title(plain(task, NAME), fontsize=9, loc="left")
            axes.set_xlabel("budget, % of tokens")
        panels[0].set_ylabel("score, %")
        return _with_legend(figure, panels)

    caption = "Mean score with its 95 % bootstrap interval; dotted: the full cache."
    return Plot(f"budget {_suffix(block)}", f"Accuracy against budget: {block.title}", caption, tuple(rows), draw)


def rho_plot(block: Block) -> Plot | None:
    """Return rho over the layers, a line per task, and thresholds (the paper's Figure 3, left)."""
    known = {task: rho for task in block.tasks if (rho := rho_by_layer(block, task))}
    if not known:
        return None
    limits = sorted({cell.policy["threshold"] for cell in block.cells.values() if _is_number(cell, "threshold")})
    rows = [
        {"model": block.model, "query_mode": block.query_mode, "task": task, "layer": layer, "rho": value}
        for task, values in known.items()
        for layer, value in enumerate(values)
    ]

    def draw() -> Figure:
        figure = Figure(figsize=(7.5, 3.0), layout="constrained")
        draw_rho(figure.subplots(1, 1), {plain(task, NAME): values for task, values in known.items()}, limits[:3])
        return figure

    caption = "Share of attention that crosses modalities, measured before anything is compressed, mean over samples."
    return Plot(f"rho {_suffix(block)}", f"rho per layer and task: {block.title}", caption, tuple(rows), draw)


def alignment_plot(block: Block) -> Plot | None:
    """Return merging that follows the flow against merging that defies it, per task (the paper's Figure 3, right)."""
    made = [
        (task, made)
        for aligned, misaligned in alignments(block)
        for task in block.tasks
        if (made := hold_against(block, aligned, misaligned, task)) is not None
    ]
    if not made:
        return None
    rows = [bare_comparison_row(block, found) for _, found in made]

    def draw() -> Figure:
        figure = Figure(figsize=(6.5, 0.9 + 0.32 * len(made)), layout="constrained")
        axes = figure.subplots(1, 1)
        for line, (_, found) in enumerate(made):
            bars = [[100 * (found.difference - found.low)], [100 * (found.high - found.difference)]]
            axes.errorbar([100 * found.difference], [line], xerr=bars, fmt="o", color=COLOURS[0], markersize=5)
        names = [f"{plain(task, NAME)}, {budget_text(found.arm.budget)}" for task, found in made]
        axes.set_yticks(range(len(made)), names)
        axes.set_ylim(len(made) - 0.5, -0.5)
        axes.axvline(0, color=INK, linewidth=0.8, linestyle=":")
        axes.set_xlabel("aligned less misaligned, points")
        return figure

    caption = (
        "Paired difference of the mean scores with its 95 % bootstrap interval: right of 0, merging across modalities "
        "where attention crosses them is better than doing the opposite."
    )
    title = f"Aligned against misaligned merging: {block.title}"
    return Plot(f"alignment {_suffix(block)}", title, caption, tuple(rows), draw)


def pareto_plot(block: Block) -> Plot | None:
    """Return average score against bytes held, and the arms that no other beats in both."""
    rows = pareto_rows(block)
    if len(rows) < 2:
        return None

    def draw() -> Figure:
        figure = Figure(figsize=(7.5, 4.0), layout="constrained")
        axes = figure.subplots(1, 1)
        for label in block.labels:
            own = [row for row in rows if row["strategy"] == label]
            places = [100 * row["share_of_bytes"] for row in own]
            axes.plot(
                places,
                [100 * row["score"] for row in own],
                label=plain(label, NAME),
                **_style(block, label) | {"linestyle": "none"},
            )
        front = sorted((row for row in rows if row["front"]), key=lambda row: row["share_of_bytes"])
        axes.plot(
            [100 * row["share_of_bytes"] for row in front],
            [100 * row["score"] for row in front],
            color=INK,
            linewidth=0.8,
            linestyle=":",
            zorder=0,
        )
        axes.set_xlabel("KV bytes held, % of all")
        axes.set_ylabel("average score, %")
        return _with_legend(figure, [axes])

    caption = "Dotted: what nothing else beats in both bytes and average score. Differences need not be significant."
    return Plot(f"pareto {_suffix(block)}", f"Bytes against score: {block.title}", caption, tuple(rows), draw)


def time_plot(block: Block) -> Plot | None:
    """Return decode time per token against budget (the paper's Table 2)."""
    rows = []
    for arm in block.arms:
        seconds = [cell.mean(lambda result: result.decode_seconds) for cell in block.column(arm)]
        value = mean(seconds)
        if value is not None and isinstance(arm.budget, float):
            rows.append(arm_row(block, arm) | {"decode_milliseconds": 1e3 * value})
    if len({row["budget"] for row in rows}) < 2:
        return None

    def draw() -> Figure:
        figure = Figure(figsize=(7.5, 3.2), layout="constrained")
        axes = figure.subplots(1, 1)
        for label in block.labels:
            own = sorted((row for row in rows if row["strategy"] == label), key=lambda row: row["budget"])
            if own:
                places, values = zip(*((100 * row["budget"], row["decode_milliseconds"]) for row in own), strict=True)
                axes.plot(places, values, label=plain(label, NAME), **_style(block, label))
        axes.set_ylim(bottom=0)
        axes.set_xlabel("budget, % of tokens")
        axes.set_ylabel("decode time, ms per token")
        return _with_legend(figure, [axes])

    caption = "Each sample's share of its batch, as the ablation ran. A small model gains little: its cache is small."
    return Plot(f"time {_suffix(block)}", f"Decode time against budget: {block.title}", caption, tuple(rows), draw)


def depth_plot(block: Block) -> Plot | None:
    """Return a heat map per task with depths: score by arm and by how deep the evidence stands."""
    rows = list(depth_rows(block))
    tasks = unique(row["task"] for row in rows)
    if not tasks:
        return None

    def draw() -> Figure:
        arms = unique((row["strategy"], row["budget"]) for row in rows)
        figure = Figure(figsize=(3.2 + 2.6 * len(tasks), 1.0 + 0.24 * len(arms)), layout="constrained")
        panels = figure.subplots(1, len(tasks), sharey=True, squeeze=False)[0]
        for task, axes in zip(tasks, panels, strict=True):
            _heat(axes, [row for row in rows if row["task"] == task], arms)
            axes.set_title(plain(task, NAME), fontsize=9, loc="left")
        names = [f"{plain(label, NAME)}, {budget_text(budget)}" for label, budget in arms]
        panels[0].set_yticks(range(len(arms)), names)
        return figure

    caption = "Mean score in percent by depth of the evidence in the context, from its beginning (0) to its end (1)."
    return Plot(f"depth {_suffix(block)}", f"Score by depth: {block.title}", caption, tuple(rows), draw)


def _is_number(cell: Cell, name: str) -> bool:
    return isinstance(cell.policy.get(name), float)


def _suffix(block: Block) -> str:
    return f"{block.model} {block.query_mode}"


# --- drawing ---


def _panels(names: Sequence[str]) -> tuple[Figure, list[Axes]]:
    columns = min(MOST_COLUMNS, len(names))
    rows = -(-len(names) // columns)
    figure = Figure(figsize=(max(4.5, 2.6 * columns), 2.5 * rows + 0.6), layout="constrained")
    grid = figure.subplots(rows, columns, sharey=True, squeeze=False).flatten()
    for axes in grid[len(names) :]:
        axes.remove()
    return figure, list(grid[: len(names)])


def _curve(axes: Axes, style: Row, label: str, rows: Sequence[Row]) -> None:
    rows = sorted(rows, key=lambda row: row["budget"])
    if not rows:
        return
    places, scores = [100 * row["budget"] for row in rows], [100 * row["score"] for row in rows]
    axes.plot(places, scores, label=plain(label, NAME), **style)
    low, high = [100 * row["low"] for row in rows], [100 * row["high"] for row in rows]
    axes.fill_between(places, low, high, color=style["color"], alpha=0.12, linewidth=0)


def _style(block: Block, label: str) -> dict[str, Any]:
    """Return how a strategy is drawn, in every figure of a block; the full cache in the ink of the page."""
    number = [other for other in block.labels if other != FULL].index(label) if label != FULL else None
    return {
        "color": INK if number is None else COLOURS[number % len(COLOURS)],
        "linestyle": "-" if number is None else LINES[number // len(COLOURS) % len(LINES)],
        "marker": "*" if number is None else MARKERS[number % len(MARKERS)],
        "markersize": 4 if number is not None else 7,
        "linewidth": 1.2,
    }


def _with_legend(figure: Figure, panels: Sequence[Axes]) -> Figure:
    entries = {label: entry for axes in panels for entry, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    columns = max(1, min(len(entries), int(figure.get_figwidth() / 1.5)))
    figure.legend(entries.values(), entries.keys(), loc="outside lower center", ncols=columns, frameon=False)
    return figure


def _heat(axes: Axes, rows: Sequence[Row], arms: Sequence[tuple[str, Any]]) -> None:
    depths = sorted({row["depth"] for row in rows})
    values = [[float("nan")] * len(depths) for _ in arms]
    for row in rows:
        values[arms.index((row["strategy"], row["budget"]))][depths.index(row["depth"])] = 100 * row["score"]
    axes.imshow(values, aspect="auto", cmap="viridis", vmin=0, vmax=100)
    for line, scores in enumerate(values):
        for place, score in enumerate(scores):
            if score == score:  # not where nothing was measured
                ink = "black" if score > 60 else "white"
                axes.text(place, line, f"{score:.0f}", ha="center", va="center", fontsize=7, color=ink)
    axes.set_xticks(range(len(depths)), [f"{depth:g}" for depth in depths])
    axes.set_xlabel("depth")
