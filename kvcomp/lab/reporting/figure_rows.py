"""The numbers that figures show, and that their CSV files hold: one row for each thing that is drawn."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from kvcomp.lab.reporting.cells import AVERAGE, Arm, Block
from kvcomp.lab.reporting.comparing import Comparison
from kvcomp.lab.results import Result
from kvcomp.lab.statistics import bootstrap, mean

MOST_DEPTHS = 12
Row = dict[str, Any]


def arm_row(block: Block, arm: Arm) -> Row:
    """Return the columns that say which arm a row is about."""
    return {"model": block.model, "query_mode": block.query_mode, "strategy": arm.label, "budget": arm.budget}


def score_rows(block: Block) -> Iterator[Row]:
    """Yield the mean score of each task and arm, with its bootstrap interval."""
    for (task, arm), cell in block.cells.items():
        if cell.results:
            low, high = bootstrap([cell.scores])
            numbers = {"samples": len(cell.results), "score": cell.score, "low": low, "high": high}
            yield arm_row(block, arm) | {"task": task} | numbers


def pareto_rows(block: Block) -> list[Row]:
    """Return bytes and average score of each arm, and whether no other beats it in both."""
    rows = []
    for arm in block.arms:
        shares, score = [cell.share_of_bytes for cell in block.behind(arm, AVERAGE)], block.score(arm, AVERAGE)
        share = mean(shares)
        if score is not None and share is not None:
            rows.append(arm_row(block, arm) | {"share_of_bytes": share, "score": score})
    return [row | {"front": not any(_beats(other, row) for other in rows)} for row in rows]


def _results(block: Block) -> Iterator[Result]:
    return (result for cell in block.cells.values() for result in cell.results.values())


def _beats(other: Row, row: Row) -> bool:
    fewer, more = other["share_of_bytes"] - row["share_of_bytes"], other["score"] - row["score"]
    return bool(fewer <= 0 and more >= 0 and (fewer < 0 or more > 0))


def depth_rows(block: Block) -> Iterator[Row]:
    """Yield the mean score at each depth; depths of which there are many are taken together by tenths."""
    found = {round(result.depth, 2) for result in _results(block) if result.depth is not None}
    digits = 2 if len(found) <= MOST_DEPTHS else 1
    for (task, arm), cell in block.cells.items():
        by_depth: dict[float, list[float]] = {}
        for result in cell.results.values():
            if result.depth is not None:
                by_depth.setdefault(round(result.depth, digits), []).append(result.score)
        for depth, scores in sorted(by_depth.items()):
            numbers = {"depth": depth, "samples": len(scores), "score": sum(scores) / len(scores)}
            yield arm_row(block, arm) | {"task": task} | numbers


def comparison_row(block: Block, made: Comparison) -> Row:
    """Return a comparison as a row of a table, its p-value after correction."""
    return bare_comparison_row(block, made) | {"p_holm": made.corrected}


def bare_comparison_row(block: Block, made: Comparison) -> Row:
    """Return a comparison as a row of a table, before any correction."""
    return arm_row(block, made.arm) | {
        "task": made.task,
        "against": made.against.label,
        "against_budget": made.against.budget,
        "samples": made.samples,
        "difference": made.difference,
        "low": made.low,
        "high": made.high,
        "won": made.won,
        "lost": made.lost,
        "test": made.test,
        "p": made.p,
    }


def rho_by_layer(block: Block, task: str) -> list[float]:
    """Return rho per layer of the first arm that measured it: it is measured before anything is compressed."""
    for (name, _), cell in block.cells.items():
        measured = [result.rho for result in cell.results.values() if result.rho]
        if name == task and measured:
            layers = [mean(layer) for layer in zip(*measured, strict=True)]
            known = [value for value in layers if value is not None]
            if len(known) == len(layers):
                return known
    return []


def alignments(block: Block) -> Iterator[tuple[Arm, Arm]]:
    """Yield pairs of an arm whose policy follows the flow and one that does the opposite, at the same budget."""
    uses = {arm: cell.policy.get("use") for (_, arm), cell in block.cells.items()}
    for misaligned, use in uses.items():
        if use != "misaligned":
            continue
        for aligned, other in uses.items():
            same = aligned.budget == misaligned.budget and misaligned.label.startswith(aligned.label)
            if same and other == "flow-guided":
                yield aligned, misaligned
