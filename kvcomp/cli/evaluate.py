"""`kvcomp eval`: one strategy, one budget, exact match on fresh samples of the tasks."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer

from kvcomp.cli.folders import ImageMode, Policy, open_data, read_folder, report_written
from kvcomp.cli.models import find_device
from kvcomp.cli.quiet import quiet_transformers
from kvcomp.cli.run import Device, parse_overrides, strategy_source
from kvcomp.cli.terminal import emit_json, emit_table, progress
from kvcomp.cli.testbeds import ALL, TESTBED, find_folder, find_tasks
from kvcomp.core.budget import Budget
from kvcomp.core.errors import ConfigError, KVCompError
from kvcomp.lab.batches import QueryMode
from kvcomp.lab.controls import Method, find_method
from kvcomp.lab.document import Document, make_evaluation_document
from kvcomp.lab.evaluation import SAMPLES, Evaluation, TaskResult
from kvcomp.lab.milebench.results import seven_task_average, write_results
from kvcomp.lab.milebench.source import TaskFolder
from kvcomp.lab.milebench.task import MileBenchTask
from kvcomp.lab.tasks import Task
from kvcomp.lab.testbed import load_codec, load_testbed
from kvcomp.lab.threads import torch_threads

Built = TypeVar("Built")
COLUMNS = ("exact match", "95 % interval", "score", "slot accuracy", "KV bytes", "slots", "answer NLL", "KL to full")
LEARNED = {True: "yes", False: "no", None: "not measured"}


class Metrics(StrEnum):
    """What is measured: `plain` is exact match, the task's own metric, slot accuracy and bytes."""

    plain = "plain"
    all = "all"


class Dtype(StrEnum):
    """Of a model's weights."""

    auto = "auto"
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


def evaluate(
    model: Annotated[str, typer.Option(help="Folder of a model, or the name of a testbed.")] = TESTBED,
    tasks: Annotated[str, typer.Option(help="Task names with commas between, or all.")] = ALL,
    strategy: Annotated[
        str, typer.Option(help="Recipe, control (full, random, recency, oracle, no-context, no-images), or YAML file.")
    ] = "flowmm",
    budget: Annotated[
        str | None, typer.Option(help="What is kept: 0.2, 512t or 64MiB; by default the strategy's own.")
    ] = None,
    samples: Annotated[
        int | None, typer.Option(min=1, help=f"Questions per task; by default {SAMPLES}, or all that --data has.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of the samples; no training run has seen any of them.")] = 0,
    query_mode: Annotated[
        QueryMode, typer.Option(help="Whether the question is compressed with the context, or comes later.")
    ] = QueryMode.question_seen,
    change: Annotated[
        list[str] | None, typer.Option("--set", help="Change a field, as policy.threshold=0.3; repeat it for several.")
    ] = None,
    metrics: Annotated[
        Metrics, typer.Option(help="all: also likelihood, divergence from the full cache, and evidence retention.")
    ] = Metrics.plain,
    batch: Annotated[int, typer.Option(min=1, help="Samples answered at a time.")] = 20,
    max_new_tokens: Annotated[
        int | None, typer.Option(min=1, help="Length of an answer at most; by default what each task allows.")
    ] = None,
    device: Annotated[Device, typer.Option(help="Where the model runs.")] = Device.cpu,
    dtype: Annotated[Dtype, typer.Option(help="Of the weights; auto is the checkpoint's.")] = Dtype.float32,
    min_pixels: Annotated[
        int | None, typer.Option(min=1, help="Pixels that an image has at least; by default the checkpoint's.")
    ] = None,
    max_pixels: Annotated[
        int | None, typer.Option(min=1, help="Pixels that an image has at most; by default the checkpoint's.")
    ] = None,
    data: Annotated[
        Path | None, typer.Option(help="Folder in MileBench's format; --tasks then names tasks in it.")
    ] = None,
    placeholders: Annotated[
        Policy | None, typer.Option(help="With --data: which image a placeholder shows; by default by_index.")
    ] = None,
    images: Annotated[
        ImageMode | None, typer.Option(help="With --data: combined shows all images of a sample as one.")
    ] = None,
    max_context_len: Annotated[
        int | None, typer.Option(min=1, help="With --data: cut prompts to so many tokens, as MileBench does.")
    ] = None,
    tokens_per_image: Annotated[
        int | None, typer.Option(min=1, help="With --max-context-len: what an image counts for.")
    ] = None,
    predictions: Annotated[
        Path | None, typer.Option(help="With --data: gets pred.json and eval.json of each task, as MileBench has them.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Write one JSON document to stdout.")] = False,
) -> None:
    """Answer fresh samples of tasks with a compressed cache, and say how many answers are right to the last token."""
    started = time.monotonic()
    prompts = {
        "placeholders": placeholders and placeholders.value,
        "images": images and images.value,
        "max_context_len": max_context_len,
        "tokens_per_image": tokens_per_image,
    }
    request = read_request(model, tasks, strategy, budget, change or [], data, prompts, predictions, query_mode)
    target = find_device(device)
    with quiet_transformers(), torch_threads(1):
        codec = load_codec(request.folder, min_pixels=min_pixels, max_pixels=max_pixels)
        chosen = request.tasks if request.data is None else open_data(request.data, codec)
        evaluation = Evaluation(
            load_testbed(request.folder, target, dtype=dtype.value, codec=codec),
            request.method,
            samples=samples,
            split=f"eval-{seed}",
            mode=query_mode,
            batch=batch,
            max_new_tokens=max_new_tokens,
            forced=metrics is Metrics.all,
        )
        results = list(_answer_all(evaluation, chosen, predictions))
    document = make_evaluation_document(evaluation, results, time.monotonic() - started) | {"seed": seed}
    if request.data is not None:
        document |= describe_data(request.data, chosen, results)
    if as_json:
        emit_json(document)
    else:
        emit_results(document)


@dataclass(frozen=True)
class Request:
    """What is asked for.

    Attributes:
        folder: of the model.
        tasks: registered ones; none where there is a folder of tasks.
        data: the folder of tasks.
        method: how the cache is compressed.
    """

    folder: Path
    tasks: Sequence[Task]
    data: TaskFolder | None
    method: Method


def read_request(
    model: str,
    tasks: str,
    strategy: str,
    budget: str | None,
    changes: Sequence[str],
    data: Path | None = None,
    prompts: Mapping[str, Any] | None = None,
    predictions: Path | None = None,
    mode: QueryMode = QueryMode.question_seen,
) -> Request:
    """Return the model's folder, the tasks and the method that are asked for.

    Raises:
        ConfigError: listing everything that is wrong with them.
    """
    chosen, unknown = ([], []) if data is not None else find_tasks(tasks, model)
    faults = [f"--tasks: {fault}" for fault in unknown]
    folder = tried(faults, "--model", lambda: find_folder(model))
    source = tried(faults, "--data", lambda: read_folder(data, tasks, prompts or {}))
    if predictions is not None and data is None:
        faults.append("--predictions: must come with --data: MileBench's format is for its own tasks")
    kept = None if budget is None else tried(faults, "--budget", lambda: Budget.parse(budget))
    overrides = tried(faults, "--set", lambda: parse_overrides(changes))
    method = tried(faults, "--strategy", lambda: find_method(strategy_source(strategy), kept, **overrides or {}))
    if mode is QueryMode.question_later and method is not None and method.strategy.trigger.decoding:
        faults.append(
            f"--query-mode: question_later leaves what follows the context as it is, and the trigger "
            f"{method.strategy.trigger} would compress it; use --query-mode question_seen, or --set trigger=prefill-end"
        )
    if faults:
        raise ConfigError(faults, source="kvcomp eval")
    assert folder is not None
    assert method is not None
    return Request(folder, chosen, source, method)


def _answer_all(evaluation: Evaluation, tasks: Sequence[Task], predictions: Path | None) -> Iterator[TaskResult]:
    """Yield the result of each task, its predictions written where that is asked for."""
    with progress("eval", sum(map(evaluation.count, tasks))) as advance:
        for task in tasks:
            outcomes = []
            for seen in evaluation.outcomes(task):
                outcomes.append(seen)
                advance(task.id)
            result = evaluation.result(task, outcomes)
            if predictions is not None and isinstance(task, MileBenchTask):
                settings = {"do_sample": False, "min_new_tokens": 1, "max_new_tokens": result.max_new_tokens}
                report_written(write_results(predictions, task, outcomes, evaluation.bed.name, settings))
            yield result


def describe_data(data: TaskFolder, tasks: Sequence[Task], results: Sequence[TaskResult]) -> Document:
    """Return what a document says of a folder of tasks: its prompts, the checksums of its files, the average."""
    average = seven_task_average(results)
    return {
        "data": data.model_dump(mode="json"),
        "data_tasks": [task.describe() for task in tasks],
        "average": None if average is None else average.to_dict(),
    }


def tried(faults: list[str], option: str, build: Callable[[], Built]) -> Built | None:
    """Return what an option stands for; None where it cannot be built, and the faults then say why."""
    try:
        return build()
    except ConfigError as error:
        faults += [f"{option}: {fault}" for fault in error.faults]
    except KVCompError as error:
        faults.append(f"{option}: {error}")
    return None


def emit_results(document: Document) -> None:
    """Write a line per task, and how they were measured."""
    body = [[row["task"], *_numbers(row), row["metric"], LEARNED[row["learned"]]] for row in document["tasks"]]
    emit_table(["task", *COLUMNS, "metric", "learned"], body, COLUMNS)
    if document.get("average") is not None:
        typer.echo(f"\n{_average(document['average'])}")
    asked = sorted({row["samples"] for row in document["tasks"]})
    typer.echo(
        f"\n{document['strategy']['name']} at budget {document['budget']}, {document['query_mode']}, "
        f"{_questions(asked[0], asked[-1])} per task, seed {document['seed']}, "
        f"{document['seconds']:.1f} s"
    )
    if "data" in document:
        typer.echo(_prompts(document["data"]))


def _questions(least: int, most: int) -> str:
    return f"{least} question{'s' if most != 1 else ''}" if least == most else f"{least} to {most} questions"


def _average(average: Document) -> str:
    rest = f" (without {', '.join(average['missing'])})" if average["missing"] else ""
    return (
        f"average of {len(average['tasks'])} of MileBench's seven tasks{rest}: {average['score']:.4f}, "
        f"by samples {average['score_by_sample']:.4f}"
    )


def _prompts(data: Document) -> str:
    cut = (
        "nothing cut"
        if data["max_context_len"] is None
        else f"cut to {data['max_context_len']} tokens, {data['tokens_per_image']} per image"
    )
    return f"prompts: placeholders {data['placeholders']}, images {data['images']}, {cut}"


def _numbers(row: Document) -> list[str]:
    low, high = row["ci"]
    return [
        f"{row['exact_match']:.1%}",
        f"{low:.1%} - {high:.1%}",
        f"{row['score']:.3f}",
        f"{row['slot_accuracy']:.1%}",
        f"{row['kv_bytes']:,.0f}",
        f"{row['slots']:.1f}",
        *("" if row[name] is None else f"{row[name]:.4f}" for name in ("answer_nll", "kl_to_full")),
    ]
