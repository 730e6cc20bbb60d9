"""The plot of a comparison: exact match and decode time of every recipe, and rho per layer."""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from kvcomp.lab.document import Document, budgets, ranked, rho_by_task, thresholds

BUDGET_COLOURS = ("#8b929c", "#2f74c0", "#d9622b", "#7a4fb5", "#2a9d72")
TASK_COLOURS = ("#2a9d72", "#7a4fb5", "#c2447e", "#b8860b", "#2f74c0")
MARKERS = ("o", "s", "D", "^", "v")
LINES = ("-", "--", ":")
INK = "#1d2126"
STYLE: Any = {
    "font.family": "sans-serif",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "text.color": INK,
    "text.parse_math": False,
    "xtick.color": INK,
    "ytick.color": INK,
    "svg.fonttype": "none",
    "svg.hashsalt": "kvcomp",
}


def save_png(document: Document, path: Path) -> None:
    """Write the figure as a PNG with a white background."""
    write_png(lambda: figure(document), path)


def to_svg(document: Document) -> str:
    """Return the figure as an SVG element without background, whose ink is the page's text colour."""
    return draw_svg(lambda: figure(document))


def write_png(draw: Callable[[], Figure], path: Path) -> None:
    """Write any figure as a PNG with a white background. A character that the font lacks is drawn as a box."""
    with rc_context(STYLE), warnings.catch_warnings(action="ignore", category=UserWarning):
        draw().savefig(path, format="png", dpi=160, facecolor="white")


def draw_svg(draw: Callable[[], Figure]) -> str:
    """Return any figure as an SVG element without background, whose ink is the page's text colour."""
    buffer = io.StringIO()
    with rc_context(STYLE), warnings.catch_warnings(action="ignore", category=UserWarning):
        draw().savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    svg = buffer.getvalue()
    return svg[svg.index("<svg") :].replace(INK, "currentColor")


def figure(document: Document) -> Figure:
    """Return the figure: a panel per task and one for decode time, a line per recipe; below, rho per layer."""
    rows, tasks = document["rows"], document["tasks"]
    recipes, rho = ranked(rows), rho_by_task(document)
    upper, lower = 0.8 + 0.27 * len(recipes), 2.5 if rho else 0.0
    drawn = Figure(figsize=(3.0 + 2.3 * (len(tasks) + 1), upper + lower + 0.5), layout="constrained")
    parts = drawn.subfigures(2 if rho else 1, 1, squeeze=False, height_ratios=[upper, lower] if rho else None)
    panels = parts[0, 0].subplots(1, len(tasks) + 1, sharey=True, squeeze=False)[0]
    for axes, task in zip(panels, tasks, strict=False):
        draw_exact_match(axes, [row for row in rows if row["task"] == task], recipes)
        axes.set_title(task, fontsize=9, loc="left")
    draw_decode_time(panels[-1], rows, recipes)
    _label_recipes(panels[0], recipes)
    entries, labels = panels[0].get_legend_handles_labels()
    parts[0, 0].legend(entries, labels, loc="outside upper right", ncols=len(labels), frameon=False)
    if rho:
        draw_rho(parts[1, 0].subplots(1, 1), rho, thresholds(document))
    return drawn


def draw_exact_match(axes: Axes, rows: Sequence[dict[str, Any]], recipes: Sequence[str]) -> None:
    """Draw a marker with its interval for each recipe and budget."""
    known = budgets(rows)
    for number, budget in enumerate(known):
        chosen = [row for row in rows if row["budget"] == budget]
        shares = [row["exact_match"] for row in chosen]
        bars = [
            [row["exact_match"] - row["ci"][0] for row in chosen],
            [row["ci"][1] - row["exact_match"] for row in chosen],
        ]
        places = [_place(recipes.index(row["recipe"]), number, len(known)) for row in chosen]
        axes.errorbar(shares, places, xerr=bars, label=f"budget {budget}", elinewidth=1, **_marker(number))
    axes.set_xlim(-0.04, 1.04)
    axes.set_xticks([0, 0.5, 1], ["0", "50 %", "100 %"])
    axes.set_xlabel("exact match")
    _guide(axes)


def draw_decode_time(axes: Axes, rows: Sequence[dict[str, Any]], recipes: Sequence[str]) -> None:
    """Draw a marker for each recipe, budget and task: time per decoded token over the reference's."""
    known = budgets(rows)
    for number, budget in enumerate(known):
        chosen = [row for row in rows if row["budget"] == budget and row["decode_ratio"] is not None]
        places = [_place(recipes.index(row["recipe"]), number, len(known)) for row in chosen]
        axes.plot([row["decode_ratio"] for row in chosen], places, alpha=0.7, **_marker(number))
    axes.axvline(1.0, color=INK, linewidth=0.6, linestyle=":")
    axes.set_title("time per decoded token", fontsize=9, loc="left")
    axes.set_xlabel("relative to the full cache")
    _guide(axes)


def draw_rho(axes: Axes, rho: dict[str, list[float]], lines: Sequence[float]) -> None:
    """Draw rho over the layers, a line per task, and the thresholds above which a layer merges across modalities."""
    for number, (task, values) in enumerate(rho.items()):
        axes.plot(range(len(values)), values, label=task, markersize=4, linewidth=1.2, **_line(number))
    for threshold in lines:
        axes.axhline(threshold, color=INK, linewidth=0.6, linestyle=":", label=f"threshold {threshold:g}")
    layers = len(next(iter(rho.values())))
    axes.set_xticks(range(layers), [f"layer {layer}" for layer in range(layers)])
    axes.set_ylim(0, max(1.15 * max(map(max, rho.values())), 0.3))
    axes.set_ylabel("rho")
    axes.set_title("rho: share of attention that crosses modalities", fontsize=9, loc="left")
    axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False)


def _line(number: int) -> dict[str, Any]:
    """Return how a task's line looks: colours and markers of the first five come again dashed, then dotted."""
    again, place = divmod(number, len(TASK_COLOURS))
    style = LINES[again % len(LINES)]
    return {"color": TASK_COLOURS[place], "marker": MARKERS[place], "linestyle": style}


def _marker(number: int) -> dict[str, Any]:
    return {
        "linestyle": "none",
        "marker": MARKERS[number % len(MARKERS)],
        "markersize": 4,
        "color": BUDGET_COLOURS[number % len(BUDGET_COLOURS)],
    }


def _place(line: int, number: int, of: int) -> float:
    """Return the height of a marker: its recipe's line, the budgets a little apart."""
    return line + 0.22 * (number - (of - 1) / 2)


def _label_recipes(axes: Axes, recipes: Sequence[str]) -> None:
    axes.set_yticks(range(len(recipes)), recipes)
    axes.set_ylim(len(recipes) - 0.4, -0.6)  # the first on top


def _guide(axes: Axes) -> None:
    axes.grid(axis="y", color=INK, alpha=0.12, linewidth=0.6)
    axes.tick_params(axis="y", length=0)
    axes.set_axisbelow(True)
