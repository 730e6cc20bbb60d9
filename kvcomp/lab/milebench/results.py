"""Results in MileBench's own format, and the average that the FlowMM paper reports.

`<folder>/<task>/pred.json` is what MileBench's `evaluate.py` reads, `<folder>/<task>/eval.json` what it writes and
`score.py` collects (FreedomIntelligence/MileBench).

Deviation: the official scorer refuses a `pred.json` that lacks a sample; here one may be written, and `complete` says
whether it is whole.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from kvcomp.lab.evaluation import TaskResult
from kvcomp.lab.milebench.folder import folder_name
from kvcomp.lab.milebench.names import KNOWN, quantity_level
from kvcomp.lab.milebench.prompts import IMAGE
from kvcomp.lab.milebench.task import MileBenchTask
from kvcomp.lab.outcomes import Outcome
from kvcomp.lab.statistics import mean

LEVELS = ("Few", "Medium", "Many")


@dataclass(frozen=True)
class Average:
    """Mean score over those of the seven tasks that were asked.

    Attributes:
        tasks: which.
        missing: the others of the seven.
        score: mean of the tasks' scores, each counting once: what the FlowMM paper calls average.
        score_by_sample: mean over all samples.
    """

    tasks: tuple[str, ...]
    missing: tuple[str, ...]
    score: float
    score_by_sample: float

    def to_dict(self) -> dict[str, Any]:
        """Return the average as plain data."""
        return asdict(self)


def seven_task_average(results: Sequence[TaskResult]) -> Average | None:
    """Return the average over those of the seven that have a result; None where none has one."""
    found = [result for result in results if result.task in KNOWN]
    if not found:
        return None
    samples = sum(result.samples for result in found)
    return Average(
        tasks=tuple(result.task for result in found),
        missing=tuple(name for name in KNOWN if name not in {result.task for result in found}),
        score=mean(result.score for result in found) or 0.0,
        score_by_sample=sum(result.score * result.samples for result in found) / samples,
    )


@dataclass(frozen=True)
class Written:
    """What was written of one task.

    Attributes:
        path: the file of predictions.
        complete: whether it holds every sample of the task, without which MileBench's scorer refuses it.
    """

    path: Path
    complete: bool


def write_results(
    folder: Path, task: MileBenchTask, outcomes: Iterable[Outcome], model: str, settings: Mapping[str, Any]
) -> Written:
    """Write what a model answered to a task, and how it is scored.

    Args:
        folder: gets one folder per task; files that are there are replaced.
        task: what was asked.
        outcomes: what its samples showed.
        model: name of the model.
        settings: how answers were generated.
    """
    place = folder / folder_name(task.name)
    place.mkdir(parents=True, exist_ok=True)
    ordered = sorted(outcomes, key=lambda seen: seen.number)
    predictions = [_prediction(task, seen, model, settings) for seen in ordered]
    _write(place / "pred.json", predictions)
    _write(place / "eval.json", official_result(task, ordered))
    return Written(place / "pred.json", len(predictions) == task.size)


def official_result(task: MileBenchTask, outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """Return what MileBench's `evaluate.py` says of these outcomes: the metric, and by number of images."""
    by_level: dict[str, list[float]] = {level: [] for level in LEVELS}
    for seen in outcomes:
        images = task.file.items[seen.number].annotation.task_instance.images_path
        by_level[quantity_level(len(images))].append(seen.score)
    metric = "Rouge-L f" if task.metric == "rouge_l_official" else "Accuracy"
    return {
        metric: mean(seen.score for seen in outcomes),
        "image_quantity_level-Accuracy": {level: mean(scores) or 0 for level, scores in by_level.items()},
        "image_quantity_level-Result": {level: [sum(scores), len(scores)] for level, scores in by_level.items()},
    }


def _prediction(task: MileBenchTask, seen: Outcome, model: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return one entry of `pred.json`."""
    annotation = task.file.items[seen.number].annotation
    pieces, names = task.pieces(seen.number), task.image_files(seen.number)
    return {
        "sample_id": annotation.sample_id,
        "image": [names[piece] for piece in pieces if isinstance(piece, int)],
        "question": "".join(piece if isinstance(piece, str) else IMAGE for piece in pieces),
        "gt_response": annotation.response,
        "gen_model_id": model,
        "pred_response": seen.prediction,
        "gen_kwargs": dict(settings),
    }


def _write(path: Path, document: Any) -> None:
    path.write_text(json.dumps(document, ensure_ascii=False, indent=4) + "\n", encoding="utf-8")
