"""A folder of results that nothing was run for: a grid over two tasks, with answers that a seed decides."""

from __future__ import annotations

import random
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any

from kvcomp.lab.database import ResultsWriter, read_study
from kvcomp.lab.results import Configuration, Planned, Result, Study

BUDGETS = (0.1, 0.2, 0.5)
LAYERS = 4


def synthetic_configurations(
    strategies: Sequence[str] = ("full", "flowmm", "recency"),
    *,
    tasks: Sequence[str] = ("mini/recall", "mini/needle"),
    budgets: Sequence[float] = BUDGETS,
    query_modes: Sequence[str] = ("question_seen",),
    seeds: Sequence[int] = (0,),
    settings: Sequence[dict[str, Any]] = ({},),
    model: str = "minimile-xs",
) -> list[Configuration]:
    """Every combination; `full` has one budget, 1.0, and no settings."""
    return [
        Configuration(model, task, "exact match", mode, strategy, budget, seed, changed, {"checkpoint": "abc"})
        for task, mode, seed, strategy in product(tasks, query_modes, seeds, strategies)
        for budget, changed in (((1.0, {}),) if strategy == "full" else product(budgets, settings))
    ]


def synthetic_result(configuration: Configuration, sample: int, **changes: Any) -> Result:
    """A result whose answer is right more often the higher the budget, and always where that is 1."""
    budget = configuration.budget if isinstance(configuration.budget, float) else 0.5
    draw = random.Random(f"{configuration.id} {sample}")
    right = draw.random() < budget**0.5
    fields: dict[str, Any] = {
        "digest": f"sample-{sample}",
        "prediction": f"answer : {sample}" if right else "answer : ?",
        "reference": f"answer : {sample}",
        "exact_match": right,
        "score": float(right),
        "slot_accuracy": float(right),
        "depth": (sample % 5) / 4 if configuration.task.endswith("needle") else None,
        "prompt_tokens": 400 + sample,
        "new_tokens": 3,
        "kv_bytes": 1000.0 * budget,
        "full_bytes": 1000.0,
        "slots": 400 * budget,
        "compress_seconds": 0.002,
        "decode_seconds": 0.001 * (1 + budget),
        "rho": tuple(None if configuration.strategy == "full" else draw.random() for _ in range(LAYERS)),
    }
    return Result(configuration, sample, **fields | changes)


def write_synthetic(
    folder: Path,
    configurations: Sequence[Configuration] | None = None,
    *,
    samples: int = 20,
    made: int | None = None,
    unlearned: Sequence[str] = (),
    **changes: Any,
) -> Study:
    """Write a folder of results and read it back.

    Args:
        folder: gets them.
        configurations: by default those of `synthetic_configurations`.
        samples: planned for each.
        made: how many were answered before the run was killed; all by default.
        unlearned: the tasks that the model does not answer with the full cache.
        changes: fields that every result gets instead.
    """
    configurations = synthetic_configurations() if configurations is None else configurations
    environment = {"versions": {"kvcomp": "0"}, "models": {"minimile-xs": {"unlearned": list(unlearned)}}}
    with ResultsWriter(folder) as writer:
        writer.begin([Planned(each, samples) for each in configurations], {"samples": samples}, environment)
        for sample in range(samples if made is None else made):
            writer.add([synthetic_result(each, sample, **changes) for each in configurations])
        if made is None:
            writer.finish()
    return read_study(folder)
