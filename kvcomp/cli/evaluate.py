"""`kvcomp eval`: one strategy, one budget, exact match on fresh samples of the tasks."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from enum import StrEnum
from pathlib import Path
from typing import Annotated, TypeVar

import typer

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
from kvcomp.lab.evaluation import Evaluation
from kvcomp.lab.tasks import Task
from kvcomp.lab.testbed import load_testbed
from kvcomp.lab.threads import torch_threads

Built = TypeVar("Built")
COLUMNS = ("exact match", "95 % interval", "score", "slot accuracy", "KV bytes", "slots", "answer NLL", "KL to full")
LEARNED = {True: "yes", False: "no", None: "not measured"}


class Metrics(StrEnum):
    """What is measured: `plain` is exact match, the task's own metric, slot accuracy and bytes."""

    plain = "plain"
    all = "all"


def evaluate(
    model: Annotated[str, typer.Option(help="Folder of a model, or the name of a testbed.")] = TESTBED,
    tasks: Annotated[str, typer.Option(help="Task names with commas between, or all.")] = ALL,
    strategy: Annotated[
        str, typer.Option(help="Recipe, control (full, random, recency, oracle, no-context), or YAML file.")
    ] = "flowmm",
    budget: Annotated[
        str | None, typer.Option(help="What is kept: 0.2, 512t or 64MiB; by default the strategy's own.")
    ] = None,
    samples: Annotated[int, typer.Option(min=1, help="Questions per task.")] = 200,
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
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Length of an answer at most.")] = 16,
    device: Annotated[Device, typer.Option(help="Where the model runs.")] = Device.cpu,
    as_json: Annotated[bool, typer.Option("--json", help="Write one JSON document to stdout.")] = False,
) -> None:
    """Answer fresh samples of tasks with a compressed cache, and say how many answers are right to the last token."""
    started = time.monotonic()
    folder, chosen, method = read_request(model, tasks, strategy, budget, change or [])
    target = find_device(device)
    with quiet_transformers(), torch_threads(1):
        evaluation = Evaluation(
            load_testbed(folder, target),
            method,
            samples=samples,
            split=f"eval-{seed}",
            mode=query_mode,
            batch=batch,
            max_new_tokens=max_new_tokens,
            forced=metrics is Metrics.all,
        )
        with progress("eval", samples * len(chosen)) as advance:
            results = [evaluation.run(task, advance) for task in chosen]
    document = make_evaluation_document(evaluation, results, time.monotonic() - started) | {"seed": seed}
    if as_json:
        emit_json(document)
    else:
        emit_results(document)


def read_request(
    model: str, tasks: str, strategy: str, budget: str | None, changes: Sequence[str]
) -> tuple[Path, list[Task], Method]:
    """Return the model's folder, the tasks and the method that are asked for.

    Raises:
        ConfigError: listing everything that is wrong with them.
    """
    chosen, unknown = find_tasks(tasks, model)
    faults = [f"--tasks: {fault}" for fault in unknown]
    folder = _tried(faults, "--model", lambda: find_folder(model))
    kept = None if budget is None else _tried(faults, "--budget", lambda: Budget.parse(budget))
    overrides = _tried(faults, "--set", lambda: parse_overrides(changes))
    method = _tried(faults, "--strategy", lambda: find_method(strategy_source(strategy), kept, **overrides or {}))
    if faults:
        raise ConfigError(faults, source="kvcomp eval")
    assert folder is not None
    assert method is not None
    return folder, chosen, method


def _tried(faults: list[str], option: str, build: Callable[[], Built]) -> Built | None:
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
    typer.echo(
        f"\n{document['strategy']['name']} at budget {document['budget']}, {document['query_mode']}, "
        f"{document['samples']} questions per task, seed {document['seed']}, {document['seconds']:.1f} s"
    )


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
