"""The picture of a benchmark: what each stage adds to a prefill, and what a decoded token costs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from kvcomp.core.stages import STAGES
from kvcomp.lab.plots import STYLE

Entry = dict[str, Any]
COLOURS = ("#2f74c0", "#7a4fb5", "#2a9d72", "#d9622b", "#c2447e", "#8b929c")


def save_plot(found: Sequence[Entry], path: Path) -> None:
    """Write the figure; the ending of the path says in which format.

    Args:
        found: entries of a benchmark's document.
        path: a `.png`, `.svg` or `.pdf` file.
    """
    with rc_context(STYLE):
        figure(found).savefig(path, dpi=160, facecolor="white")


def figure(found: Sequence[Entry]) -> Figure:
    """Return the figure: one panel of stages per prompt length, and one of decode time over all."""
    measured = [entry for entry in found if not entry["skipped"]]
    lengths = list(dict.fromkeys(entry["tokens"] for entry in measured))
    drawn = Figure(figsize=(4.0 + 2.6 * (len(lengths) + 1), 3.4), layout="constrained")
    panels = drawn.subplots(1, len(lengths) + 1, squeeze=False)[0]
    for axes, tokens in zip(panels, lengths, strict=False):
        draw_overhead(axes, [entry for entry in measured if entry["tokens"] == tokens and entry["overhead"]])
        axes.set_title(f"prefill of {tokens:,} tokens", fontsize=9, loc="left")
    draw_decode(panels[-1], measured)
    return drawn


def draw_overhead(axes: Axes, entries: Sequence[Entry]) -> None:
    """Draw what each stage adds to the prefill of the stock cache, a bar per case."""
    left = [0.0] * len(entries)
    for stage, colour in zip(STAGES, COLOURS, strict=True):
        shares = [100 * entry["overhead"][stage] for entry in entries]
        axes.barh(range(len(entries)), shares, left=left, color=colour, label=stage)
        left = [start + share for start, share in zip(left, shares, strict=True)]
    axes.set_yticks(range(len(entries)), [entry["case"] for entry in entries])
    axes.invert_yaxis()
    axes.set_xlabel("% of the stock cache's prefill")
    if entries:
        axes.legend(frameon=False, fontsize=7)


def draw_decode(axes: Axes, entries: Sequence[Entry]) -> None:
    """Draw the time of a decoded token over the length of the prompt, relative to the stock cache."""
    for case in dict.fromkeys(entry["case"] for entry in entries):
        own = [entry for entry in entries if entry["case"] == case]
        ratios = [entry["decode_ratio"] for entry in own]
        below = [ratio["median"] - ratio["least"] for ratio in ratios]
        above = [ratio["most"] - ratio["median"] for ratio in ratios]
        tokens, medians = [entry["tokens"] for entry in own], [ratio["median"] for ratio in ratios]
        axes.errorbar(tokens, medians, yerr=[below, above], marker="o", capsize=2, label=case)
    axes.set_xscale("log", base=2)
    axes.set_xlabel("tokens of the prompt")
    axes.set_ylabel("time per decoded token, of the stock cache's")
    axes.set_ylim(bottom=0)
    if entries:
        axes.legend(frameon=False, fontsize=7)
