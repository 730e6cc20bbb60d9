"""`kvcomp demo`: the best-known recipes on the small benchmark that comes with the package."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated

import typer

from kvcomp.cli.quiet import quiet_transformers
from kvcomp.cli.terminal import emit_json, emit_table, progress
from kvcomp.cli.testbeds import TESTBED, find_tasks, tasks_beside
from kvcomp.core.errors import ConfigError, InputError
from kvcomp.core.registry import registry
from kvcomp.lab.compare import Comparison, grid
from kvcomp.lab.comparison_page import format_rho, render_report
from kvcomp.lab.document import Document, make_document, summarize, verdict
from kvcomp.lab.plots import save_png
from kvcomp.lab.records import TaskRecord, read_records
from kvcomp.lab.tasks import Task
from kvcomp.lab.testbed import load_testbed
from kvcomp.lab.threads import torch_threads

REFERENCE = "full"
RECIPES = ("random", "streaming-llm", "h2o", "snapkv", "look-m", "d2o", "flowmm", "kvcomp-global")
TASKS = ("text_needle", "recall", "clevr_change")
"""The headline: those recipes that are installed, and those tasks that the testbed has learned, three at most."""
BUDGETS = (1.0, 0.2, 0.1)
SAMPLES = 30
LEAST_SAMPLES = 10
ANSWERS = 2600  # what one core answers in some 80 s: with more recipes installed there are fewer samples of each task


def demo(
    out: Annotated[Path, typer.Option(help="Folder for results.json, results.png and report.html.")] = Path(
        "demo-output"
    ),
    as_json: Annotated[bool, typer.Option("--json", help="Write results.json's document to stdout.")] = False,
    samples: Annotated[
        int | None, typer.Option(min=1, help=f"Questions per task; {SAMPLES}, or fewer where there are many recipes.")
    ] = None,
    recipe: Annotated[
        list[str] | None, typer.Option(help="This recipe instead of the headline's; repeat it for several.")
    ] = None,
    task: Annotated[
        list[str] | None, typer.Option(help="This task instead of the headline's; repeat it for several.")
    ] = None,
    testbed: Annotated[str, typer.Option(help="Name of the testbed that answers.")] = TESTBED,
) -> None:
    """Answer questions of three tasks with eight recipes at budgets 1.0, 0.2 and 0.1, and write a report."""
    make_folder(out)  # before minutes of work for it
    with quiet_transformers(), torch_threads(1):
        document = compare(recipe, task, testbed, samples)
    write(document, out)
    if as_json:
        emit_json(document)
    else:
        emit_summary(document, out)


def compare(recipes: Sequence[str] | None, tasks: Sequence[str] | None, testbed: str, samples: int | None) -> Document:
    """Return the document of the comparison of the chosen recipes on the chosen tasks."""
    started = time.monotonic()
    folder = Path(registry.find("testbed", testbed).value)
    strategies, chosen = grid(recipe_names(recipes), BUDGETS), choose_tasks(tasks, testbed, read_records(folder))
    samples = samples or sample_count(len(strategies) * len(chosen))
    comparison = Comparison(load_testbed(folder), chosen, strategies, samples=samples, timed=min(samples, 2))
    with progress("demo", comparison.steps) as advance:
        results = comparison.run(advance)
    return make_document(comparison, results, time.monotonic() - started)


def sample_count(answers: int) -> int:
    """Return how many samples per task keep the demo within its time, given the answers that one of each takes.

    >>> sample_count(84), sample_count(130), sample_count(1000)
    (30, 20, 10)
    """
    return max(LEAST_SAMPLES, min(SAMPLES, ANSWERS // answers))


def recipe_names(chosen: Sequence[str] | None) -> list[str]:
    """Return the reference, then the chosen recipes, by default those of the headline that are installed.

    Raises:
        UnknownNameError: one of the chosen is not registered.
    """
    names = {entry.name for entry in registry.entries("recipe")}
    wanted = chosen or [name for name in RECIPES if name in names]
    return list(dict.fromkeys([REFERENCE, *(registry.find("recipe", name).name for name in wanted)]))


def choose_tasks(chosen: Sequence[str] | None, testbed: str, records: Mapping[str, TaskRecord]) -> list[Task]:
    """Return the chosen tasks, by default three that the testbed has learned, those of the headline first.

    Raises:
        ConfigError: listing the chosen ones that are not registered.
        InputError: none is chosen, and the testbed has learned none.
    """
    if chosen:
        tasks, faults = find_tasks(",".join(chosen), testbed)
        if faults:
            raise ConfigError(faults, source="--task")
        return tasks
    tasks = [task for task in tasks_beside(testbed) if task.id not in records or records[task.id].learned]
    if not tasks:
        raise InputError(f"the testbed {testbed!r} has learned none of its tasks; choose some with --task")
    order = {name: number for number, name in enumerate(TASKS)}
    return sorted(tasks, key=lambda task: order.get(task.id, len(order)))[: len(TASKS)]


def make_folder(out: Path) -> None:
    """Make the folder for the results.

    Raises:
        InputError: it cannot be made, or not be written to.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"--out must be a folder that can be made: {out}: {error.strerror}") from None
    if not os.access(out, os.W_OK):
        raise InputError(f"--out must be a folder that can be written to: {out}")


def write(document: Document, out: Path) -> None:
    """Write the results, the plot and the page."""
    (out / "results.json").write_text(json.dumps(document, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    save_png(document, out / "results.png")
    (out / "report.html").write_text(render_report(document), encoding="utf-8")


def emit_summary(document: Document, out: Path) -> None:
    """Write a line per recipe and budget, whether the whole budget changes nothing, and where the files are."""
    tasks = document["tasks"]
    numbers = ["budget", "exact match", *tasks, "KV bytes", "decode time"]
    body = [
        [
            line.recipe,
            f"{line.budget}",
            f"{line.exact_match:.0%}",
            *(f"{line.per_task[task]:.0%}" for task in tasks),
            f"{line.kv_bytes:,.0f}",
            "" if line.decode_ratio is None else f"{line.decode_ratio:.2f} x",
            format_rho(line.rho),
        ]
        for line in summarize(document["rows"])
    ]
    emit_table(["recipe", *numbers, "rho per layer"], body, numbers)
    for entry in document["skipped"]:
        typer.echo(f"not run: {entry['recipe']} at {entry['budget']}: {entry['reason']}")
    typer.echo(f"\n{verdict(document)}")
    typer.echo(f"{document['samples']} questions per task, {document['seconds']:.0f} s. See {out / 'report.html'}")
