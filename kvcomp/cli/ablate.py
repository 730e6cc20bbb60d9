"""`kvcomp ablate`: every strategy of a file, at every point of its grid, on every task; resumable."""

from __future__ import annotations

import shlex
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.live import Live
from rich.table import Table

from kvcomp.cli.quiet import quiet_transformers
from kvcomp.cli.terminal import emit_json, emit_table
from kvcomp.cli.testbeds import TESTBED, find_folder, find_tasks
from kvcomp.core.errors import ConfigError, InputError, KVCompError, ResultsError
from kvcomp.lab.ablation import AblationFile, ModelSpec, make_variants, read_file
from kvcomp.lab.database import ResultsWriter, holds_results
from kvcomp.lab.engines import Engine, Inline, Processes
from kvcomp.lab.jobs import ModelSource
from kvcomp.lab.milebench.source import TaskFolder, is_task_folder
from kvcomp.lab.plan import Plan, make_plan
from kvcomp.lab.studies import find_study, study_names
from kvcomp.lab.sweep import OnStep, Progress, changes, estimate, sweep
from kvcomp.lab.tasks import Task
from kvcomp.lab.threads import torch_threads

PLAIN_SECONDS = 10.0  # between two lines of progress where stderr is no terminal
SHOWN_CHANGES = 12


class EngineName(StrEnum):
    """Who does the work."""

    local = "local"
    ray = "ray"


def ablate(
    file: Annotated[str, typer.Argument(help=f"A YAML file, or a study: {', '.join(study_names())}.")],
    out: Annotated[Path, typer.Option(help="Folder that gets results.sqlite.")],
    resume: Annotated[bool, typer.Option("--resume", help="Go on in a folder that holds results.")] = False,
    engine: Annotated[EngineName, typer.Option(help="local: this machine. ray: a Ray cluster.")] = EngineName.local,
    workers: Annotated[int, typer.Option(min=1, help="Processes, or with ray actors; each loads the model.")] = 1,
    batch: Annotated[int, typer.Option(min=1, help="Samples answered together; a file may say it per model.")] = 20,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show the grid and the time it may take.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Write one JSON document to stdout.")] = False,
) -> None:
    """Compare strategies on the same samples. Each prompt is read once, and every configuration goes on from there."""
    path = find_study(file)
    with quiet_transformers(), torch_threads(1):
        plan = read_plan(path, batch)
        if dry_run:
            show_plan(plan, as_json)
            return
        if holds_results(out) and not resume:
            raise ResultsError(f"{out} holds results already: add --resume to go on with them, or give another folder")
        say_changes(changes(out, plan))
        with ResultsWriter(out) as writer, showing() as on_step:
            started = time.monotonic()
            try:
                progress = sweep(plan, writer, make_engine(engine, workers), on_step)
            except KeyboardInterrupt:
                say_resuming("stopped", file, out)
                raise typer.Exit(130) from None
            except KVCompError:
                say_resuming("failed", file, out)
                raise
    emit_end(progress, out, time.monotonic() - started, as_json)


def read_plan(path: Path, batch: int) -> Plan:
    """Return the plan of a file.

    Raises:
        ConfigError: listing everything that is wrong with it.
    """
    file = read_file(path)
    faults: list[str] = []
    models = [_find_model(place, model, batch, faults) for place, model in enumerate(file.models)]
    faults += _same_names(models)
    tasks = [_find_tasks(file, model, faults if place == 0 else []) for place, model in enumerate(models)]
    variants = make_variants(file, path.parent, faults)
    if faults:
        raise ConfigError(list(dict.fromkeys(faults)), str(path))
    found = [model for model in models if model is not None]
    return make_plan(file, found, tasks, variants)


def make_engine(name: EngineName, workers: int) -> Engine:
    """Return who does the work.

    Raises:
        InputError: `ray` is asked for and not installed.
    """
    if name is EngineName.ray:
        from kvcomp.lab.ray_engine import RayActors  # an optional dependency

        return RayActors(workers)
    return Inline() if workers == 1 else Processes(workers)


def _find_model(place: int, given: str | ModelSpec, batch: int, faults: list[str]) -> ModelSource | None:
    spec = ModelSpec(model=given) if isinstance(given, str) else given
    try:
        folder = find_folder(spec.model)
    except InputError as error:
        faults.append(f"models[{place}]: {error}")
        return None
    settings = spec.model_dump(exclude={"model", "name", "batch"})
    return ModelSource(spec.name or folder.name, folder, spec.batch or batch, **settings)


def _same_names(models: Sequence[ModelSource | None]) -> list[str]:
    """Return a fault for each model that has the name of an earlier one: results go by names."""
    names = [None if model is None else model.name for model in models]
    return [
        f"models[{place}]: is called {name!r} in results, as models[{names.index(name)}] is; give it a name of its "
        "own, as {model: ..., name: ...}"
        for place, name in enumerate(names)
        if name is not None and names.index(name) < place
    ]


def _find_tasks(file: AblationFile, model: ModelSource | None, faults: list[str]) -> list[Task]:
    """Return the tasks that a model is asked, each once; two different ones of one name are a fault."""
    found: dict[str, tuple[int, Task]] = {}
    for place, given in enumerate(file.tasks):
        try:
            tasks = _named(given, model, place, faults)
        except ConfigError as error:
            faults += [f"tasks[{place}]: {fault}" for fault in error.faults]
        except KVCompError as error:
            faults.append(f"tasks[{place}]: {error}")
        else:
            for task in tasks:
                before, known = found.setdefault(task.name, (place, task))
                if known is not task:
                    faults.append(
                        f"tasks[{place}]: gives another {task.name!r} than tasks[{before}], and results go by names; "
                        "run them into folders of their own"
                    )
    return [task for _, task in found.values()]


def _named(given: str | TaskFolder, model: ModelSource | None, place: int, faults: list[str]) -> Sequence[Task]:
    if isinstance(given, str) and not is_task_folder(given):
        tasks, unknown = find_tasks(given, TESTBED if model is None else model.name)
        faults += [f"tasks[{place}]: {fault}" for fault in unknown]
        return tasks
    folder = TaskFolder.parse(given) if isinstance(given, str) else given
    if folder.cuts and model is None:
        return []  # the model is a fault already
    return folder.open(model.codec() if folder.cuts and model is not None else None).tasks


def say_changes(found: Sequence[str]) -> None:
    """Say on stderr in what an earlier run in the same folder differs."""
    if not found:
        return
    more = [f"  and {len(found) - SHOWN_CHANGES} more"] if len(found) > SHOWN_CHANGES else []
    lines = [f"  {change}" for change in found[:SHOWN_CHANGES]]
    typer.echo(
        "\n".join(
            [
                "the folder's results are of a run that differs:",
                *lines,
                *more,
                "what these changes do not touch is kept; the rest is answered anew, and reports leave the old out",
            ]
        ),
        err=True,
    )


def show_plan(plan: Plan, as_json: bool) -> None:
    """Write the grid, and how long it may take: a few answers are made to find out."""
    lines = {(cell.configuration.label, str(cell.configuration.budget)): None for cell in plan.work.cells}
    seconds = estimate(plan)
    document: dict[str, Any] = {
        "configurations": [{"strategy": label, "budget": budget} for label, budget in lines],
        "models": [model.name for model in plan.work.models],
        "tasks": [task.name for task in plan.work.tasks],
        "query_modes": [str(mode) for mode in plan.file.modes],
        "seeds": plan.file.seed,
        "samples": plan.file.samples,
        "answers": plan.answers,
        "estimated_seconds": round(seconds),
    }
    if as_json:
        emit_json(document)
        return
    emit_table(("strategy", "budget"), list(lines), numbers=["budget"])
    typer.echo("")
    for name in ("models", "tasks", "query_modes", "seeds"):
        typer.echo(f"{name.replace('_', ' ')}: {', '.join(map(str, document[name]))}")
    typer.echo(
        f"{len(lines)} configurations, {plan.file.samples} samples of each task: {plan.answers:,} answers, "
        f"about {duration(seconds)} with one worker on this machine"
    )


@contextmanager
def showing() -> Iterator[OnStep]:
    """Give a function that shows how far a sweep is, on stderr."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield _Plain()
        return
    with Live(console=console, transient=True, refresh_per_second=4) as live:

        def show(progress: Progress) -> None:
            live.update(_table(progress))

        yield show


class _Plain:
    """A line of progress now and then."""

    def __init__(self) -> None:
        self.last = time.monotonic()
        self.lost = 0

    def __call__(self, progress: Progress) -> None:
        now = time.monotonic()
        for reason in progress.lost[self.lost :]:
            typer.echo(f"a worker was lost: {reason}; its samples are answered again", err=True)
        self.lost = len(progress.lost)
        if now - self.last < PLAIN_SECONDS or not progress.made:
            return
        self.last = now
        shares = ", ".join(f"{task.rpartition('/')[2]} {share}" for task, share in _shares(progress))
        typer.echo(f"ablate: {_headline(progress)}; right: {shares}", err=True)


def _table(progress: Progress) -> Table:
    table = Table(title=_headline(progress), title_justify="left", box=None, pad_edge=False, header_style="bold")
    for title in ("task", "answered now", "exact match, all configurations"):
        table.add_column(title)
    for task, share in _shares(progress):
        table.add_row(task, f"{progress.right[task][0]:,}", share)
    return table


def _shares(progress: Progress) -> list[tuple[str, str]]:
    return [(task, f"{right / asked:.1%}") for task, (asked, right) in progress.right.items()]


def _headline(progress: Progress) -> str:
    left = progress.seconds_left
    there = f", {progress.known:,} were there" if progress.known else ""
    skipped = f", {len(progress.skipped)} configurations skipped" if progress.skipped else ""
    rest = "" if left is None else f", {duration(left)} left"
    return f"{progress.known + progress.made:,} of {progress.total:,} answers{there}{skipped}{rest}"


def duration(seconds: float) -> str:
    """Return a duration as people say it.

    >>> duration(42.4), duration(600), duration(8000)
    ('42 s', '10 min', '2 h 13 min')
    """
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60} min"


def say_resuming(what: str, file: str, out: Path) -> None:
    """Say on stderr that nothing that was written is lost, and how to go on."""
    command = f"kvcomp ablate {shlex.quote(file)} --out {shlex.quote(str(out))} --resume"
    typer.echo(f"{what}; every answer so far is in {out}. Go on with:\n  {command}", err=True)


def emit_end(progress: Progress, out: Path, seconds: float, as_json: bool) -> None:
    """Write what was done."""
    skipped = [
        {
            "strategy": entry.configuration.label,
            "budget": entry.configuration.budget,
            "task": entry.configuration.task,
            "reason": entry.reason,
        }
        for entry in progress.skipped.values()
    ]
    if as_json:
        counts = {"answers": progress.known + progress.made, "known": progress.known, "made": progress.made}
        emit_json({"out": str(out), **counts, "skipped": skipped, "seconds": round(seconds, 1)})
        return
    for reason in dict.fromkeys((entry["strategy"], entry["budget"], entry["reason"]) for entry in skipped):
        typer.echo(f"skipped: {reason[0]} at {reason[1]}: {reason[2]}", err=True)
    typer.echo(
        f"{progress.made:,} answers made, {progress.known:,} were there, in {duration(seconds)}: {out}\n"
        f"look at them with: kvcomp report {shlex.quote(str(out))}"
    )
