"""The document of a comparison: plain data, written as `results.json`, that plots and pages are drawn from."""

from __future__ import annotations

import os
import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from typing import Any

import torch

from kvcomp.lab.compare import Comparison, Results, budget_of
from kvcomp.lab.evaluation import FIELDS as EVALUATION_FIELDS
from kvcomp.lab.evaluation import Evaluation, TaskResult
from kvcomp.lab.statistics import mean

Document = dict[str, Any]
PACKAGES = ("kvcomp", "torch", "transformers")
FIELDS = {
    "exact_match": "share of the answers that are right to the last token; ci is its Wilson 95 % interval",
    "kv_bytes": "bytes of keys and values in the cache once the prompt is compressed, mean per sample",
    "decode_ratio": "median time per decoded token at batch size 1 (CPU time of its thread, on a CPU), relative to "
    "the first row's recipe",
    "rho": "per layer, share of attention that crosses modalities, mean over samples; null where not measured",
}


def make_document(comparison: Comparison, results: Results, seconds: float) -> Document:
    """Return everything that was found, and what it takes to find it again."""
    return {
        "rows": [row.to_dict() for row in results.rows],
        "agreement": [asdict(entry) for entry in results.agreement],
        "skipped": [asdict(entry) for entry in results.skipped],
        "fields": FIELDS,
        "recipes": {made.name: made.dump() for made in comparison.strategies},
        "testbed": comparison.bed.name,
        "tasks": [task.name for task in comparison.tasks],
        "split": comparison.split,
        "question": "question_seen",
        "samples": comparison.samples,
        "timed_samples": comparison.timed,
        "batch": comparison.batch,
        "max_new_tokens": comparison.max_new_tokens,
        "seed": comparison.seed,
        **circumstances(seconds),
    }


def make_evaluation_document(evaluation: Evaluation, results: Sequence[TaskResult], seconds: float) -> Document:
    """Return the results of an evaluation, and what it takes to find them again."""
    made = evaluation.strategy
    return {
        "tasks": [result.to_dict() for result in results],
        "fields": EVALUATION_FIELDS,
        "model": evaluation.bed.name,
        "strategy": made.dump(),
        "budget": 1.0 if made.ignores_budget else budget_of(made),
        "query_mode": str(evaluation.mode),
        "turns": made.turns,
        "metrics": "all" if evaluation.forced else "plain",
        "split": evaluation.split,
        "samples": evaluation.samples,
        "batch": evaluation.batch,
        "max_new_tokens": evaluation.max_new_tokens,
        "image_processing": evaluation.bed.codec.describe_images(),
        **circumstances(seconds),
    }


def circumstances(seconds: float) -> Document:
    """Return how long it took, on what."""
    return {
        "seconds": round(seconds, 1),
        "hardware_threads": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "machine": f"{platform.system()} {platform.machine()}",
        "versions": {"python": platform.python_version()} | {name: version(name) for name in PACKAGES},
    }


@dataclass(frozen=True)
class Line:
    """One recipe at one budget over all tasks: unweighted means, and exact match per task."""

    recipe: str
    budget: float | str
    exact_match: float
    per_task: dict[str, float]
    kv_bytes: float
    decode_ratio: float | None
    rho: tuple[float | None, ...]


def summarize(rows: Sequence[dict[str, Any]]) -> list[Line]:
    """Return a line for each recipe and budget, in the order of the rows."""
    groups: dict[tuple[str, float | str], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["recipe"], row["budget"]), []).append(row)
    return [_line(recipe, budget, group) for (recipe, budget), group in groups.items()]


def _line(recipe: str, budget: float | str, rows: Sequence[dict[str, Any]]) -> Line:
    return Line(
        recipe=recipe,
        budget=budget,
        exact_match=mean(row["exact_match"] for row in rows) or 0.0,
        per_task={row["task"]: row["exact_match"] for row in rows},
        kv_bytes=mean(row["kv_bytes"] for row in rows) or 0.0,
        decode_ratio=mean(row["decode_ratio"] for row in rows),
        rho=tuple(mean(layer) for layer in zip(*(row["rho"] for row in rows), strict=True)),
    )


def budgets(rows: Sequence[dict[str, Any]]) -> list[float | str]:
    """Return the budgets of the rows, each once, in the order of the rows."""
    return list(dict.fromkeys(row["budget"] for row in rows))


def ranked(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Return the recipes: those that have one budget only first, then by mean exact match at their last budget, the
    best first; equal ones as the rows have them.
    """
    last: dict[str, Line] = {}
    seen: dict[str, int] = {}
    for line in summarize(rows):
        last[line.recipe] = line
        seen[line.recipe] = seen.get(line.recipe, 0) + 1
    return sorted(last, key=lambda recipe: (seen[recipe] > 1, -last[recipe].exact_match))


def verdict(document: Document) -> str:
    """Return one sentence: whether every recipe, given the whole budget, answered as the reference did."""
    reference, *others = document["agreement"]
    whole = [entry for entry in others if entry["budget"] == 1.0]
    different = [entry for entry in whole if entry["same"] != entry["samples"]]
    if not whole:
        return "No recipe was run at budget 1.0."
    if not different:
        return (
            f"At budget 1.0 every other recipe ({len(whole)}) gave the answers of '{reference['recipe']}': "
            f"{reference['samples']} of {reference['samples']}."
        )
    cases = ", ".join(f"{entry['recipe']} {entry['samples'] - entry['same']}" for entry in different)
    return f"At budget 1.0 some answers differ from '{reference['recipe']}' (of {reference['samples']}): {cases}."


def thresholds(document: Document) -> list[float]:
    """Return the thresholds on rho of the recipes that measured it, each once."""
    measured = {row["recipe"] for row in document["rows"] if any(value is not None for value in row["rho"])}
    found = {document["recipes"][recipe]["policy"].get("threshold") for recipe in measured}
    return sorted(value for value in found if isinstance(value, float))


def rho_by_task(document: Document) -> dict[str, list[float]]:
    """Return rho per layer for each task, mean over the recipes that measured it: it is measured before anything is
    compressed, so they agree. Empty where none measured it.
    """
    rows = [row for row in document["rows"] if row["rho"] and None not in row["rho"]]
    tasks = dict.fromkeys(row["task"] for row in rows)
    by_task = {task: [row["rho"] for row in rows if row["task"] == task] for task in tasks}
    return {task: [mean(layer) or 0.0 for layer in zip(*found, strict=True)] for task, found in by_task.items()}
