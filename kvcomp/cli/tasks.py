"""`kvcomp tasks`: what there is to ask, written to folders, read from folders, fetched from the hub."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from kvcomp.cli.folders import ImageMode, Policy
from kvcomp.cli.terminal import Advance, byte_progress, emit_json, emit_table, plain_table, progress
from kvcomp.cli.testbeds import ALL, TESTBED, find_tasks
from kvcomp.core.errors import ConfigError, DataError, InputError
from kvcomp.core.registry import registry
from kvcomp.lab.milebench import MileBenchTask, Opened, export_samples, open_folder
from kvcomp.lab.milebench.archives import LICENCE, Archive, archives_of
from kvcomp.lab.milebench.fetching import fetch
from kvcomp.lab.milebench.hub import download_from_hub
from kvcomp.lab.milebench.names import KNOWN
from kvcomp.lab.milebench.reading import Reading
from kvcomp.lab.tasks import Sample, Task

app = typer.Typer(help="List, export, verify and fetch tasks.", no_args_is_help=True)

INSTRUCTIONS = (
    "Read the text, look at the images, and answer the question at the end.",
    "Answer the last question; text and images hold what you need.",
    "The question comes last. Answer it from the images and the text before it.",
)
AsJson = Annotated[bool, typer.Option("--json", help="Write one JSON document to stdout.")]


HEAD = ("archive", "bytes", "SHA-256", "tasks")


class Benchmark(StrEnum):
    """What can be fetched."""

    milebench = "milebench"


# --- list ---


@app.command("list")
def list_tasks(
    folder: Annotated[Path | None, typer.Argument(help="A folder of tasks in MileBench's format.")] = None,
    as_json: AsJson = False,
) -> None:
    """List the tasks that are registered, and with a folder those in it."""
    entries = [describe(entry.value, entry.package) for entry in registry.entries("task")]
    entries += [describe(task, str(folder)) for task in open_folder(folder).tasks] if folder else []
    if as_json:
        emit_json(entries)
        return
    body = [[entry["name"], entry["metric"], count(entry["samples"]), entry["source"]] for entry in entries]
    emit_table(("name", "metric", "samples", "from"), body, numbers=["samples"])


def describe(task: Task, source: str) -> dict[str, Any]:
    """Return what is listed of a task; samples are None where there is always one more."""
    return {"name": task.name, "metric": task.metric, "samples": task.size, "source": source}


def count(samples: int | None) -> str:
    """Return a number of samples as text."""
    return "any" if samples is None else f"{samples:,}"


# --- export ---


@app.command()
def export(
    task: Annotated[
        list[str], typer.Argument(help=f"Names of registered tasks, or {ALL}; `kvcomp tasks list` has them.")
    ],
    out: Annotated[Path, typer.Option(help="Gets one new folder per task.")],
    samples: Annotated[int, typer.Option(min=1, help="Samples per task.")] = 100,
    seed: Annotated[int, typer.Option(help="Every seed gives samples of its own.")] = 0,
    instruction: Annotated[
        list[str] | None, typer.Option(help="A paraphrase of the instruction; repeat it for several.")
    ] = None,
) -> None:
    """Write samples of tasks in MileBench's format: one JSON file and PNG images per task."""
    tasks, unknown = find_tasks(",".join(task), TESTBED)
    if unknown:
        raise ConfigError(unknown, source="kvcomp tasks export")
    with progress("exporting", samples * len(tasks)) as advance:
        for chosen in tasks:
            split = f"export-{seed}"
            drawn = draw(chosen, split, samples, advance)
            typer.echo(str(export_samples(chosen, drawn, out, instruction or INSTRUCTIONS, split)))


def draw(task: Task, split: str, samples: int, advance: Advance) -> Iterator[Sample]:
    """Return samples one by one."""
    for index in range(samples):
        advance(task.name)
        yield task.sample(split, index)


# --- verify ---


@app.command()
def verify(
    folder: Annotated[Path, typer.Argument(help="A folder of tasks in MileBench's format.")],
    task: Annotated[list[str] | None, typer.Option(help="Only this task; repeat it for several.")] = None,
    placeholders: Annotated[Policy, typer.Option(help="Which image a placeholder shows.")] = Policy.by_index,
    images: Annotated[
        ImageMode, typer.Option(help="combined: check the image that shows all of a sample, where there is one.")
    ] = ImageMode.separate,
    pixels: Annotated[bool, typer.Option("--pixels", help="Decode every image too; takes longer.")] = False,
    as_json: AsJson = False,
) -> None:
    """Check every file and image of a folder: a table of its tasks, or every fault with exit code 1."""
    try:
        with progress("checking") as advance:
            opened = open_folder(
                folder, task, reading=Reading(placeholders.value, images=images.value), advance=advance
            )
            if pixels:
                decode(opened.tasks, folder, advance)
    except DataError as error:
        if as_json:
            emit_json({"tasks": [], "unread": [], "faults": list(error.faults)})
        else:
            count = len(error.faults)
            typer.echo("\n".join((*error.faults, f"{folder}: {count} fault{'s' * (count > 1)}")), err=True)
        raise typer.Exit(1) from None
    emit_opened(opened, as_json)


def decode(tasks: Sequence[MileBenchTask], folder: Path, advance: Advance) -> None:
    """Make every sample of every task.

    Raises:
        DataError: listing those that cannot be made.
    """
    faults = []
    for task in tasks:
        for index in range(task.size):
            advance(task.name)
            try:
                task.sample("test", index)
            except InputError as error:
                faults.append(str(error))
    if faults:
        raise DataError(faults, str(folder))


def emit_opened(opened: Opened, as_json: bool) -> None:
    """Write what a sound folder holds."""
    tasks = [
        {"name": task.name, "metric": task.metric, **task.summary(), "num_sample": task.file.meta.num_sample}
        for task in opened.tasks
    ]
    if as_json:
        emit_json({"tasks": tasks, "unread": list(opened.unread), "faults": []})
        return
    numbers = ("samples", "images", "repeated", "unused")
    body = [[str(task["name"]), str(task["metric"]), *(f"{task[key]:,}" for key in numbers)] for task in tasks]
    emit_table(("name", "metric", *numbers), body, numbers)
    for task in opened.tasks:
        if task.name in KNOWN and task.size != KNOWN[task.name].samples:
            typer.echo(f"{task.name}: the benchmark has {KNOWN[task.name].samples} samples, this folder {task.size}")
        if (counted := task.file.meta.num_sample) not in (None, task.size):
            typer.echo(f"{task.name}: meta_data.num_sample says {counted}, and the file holds {task.size} samples")
    if opened.unread:
        typer.echo(
            f"not read, neither of the seven nor exported by kvcomp: {', '.join(opened.unread)}; name them in --task"
        )


# --- fetch ---


@app.command("fetch")
def fetch_benchmark(
    benchmark: Annotated[Benchmark, typer.Argument(help="What to fetch.")],
    out: Annotated[Path, typer.Option(help="Gets one folder per task.")] = Path(Benchmark.milebench),
    task: Annotated[list[str] | None, typer.Option(help="Only what this task needs; repeat it for several.")] = None,
    keep_archives: Annotated[bool, typer.Option("--keep-archives", help="Keep archives once unpacked.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Name the archives, and fetch nothing.")] = False,
    endpoint: Annotated[str | None, typer.Option(help="Hub to fetch from, by default the library's own.")] = None,
    as_json: AsJson = False,
) -> None:
    """Download the archives of MileBench's seven tasks, check them, and unpack those tasks. It resumes."""
    archives = archives_of(task)
    if dry_run:
        emit_archives(archives, as_json)
        return
    total = sum(archive.num_bytes for archive in archives)
    typer.echo(plain_table(HEAD, rows(archives), HEAD[1:2]), err=True)
    typer.echo(f"{total / 1e9:.1f} GB go to {out}. The data is under {LICENCE}.", err=True)
    with byte_progress() as meter:
        fetched = fetch(
            out, task, download=partial(download_from_hub, endpoint=endpoint), meter=meter, keep=keep_archives
        )
    if as_json:
        emit_json([each.describe() for each in fetched])
        return
    for each in fetched:
        typer.echo(f"{each.archive.name}: {'was here already' if each.again else f'{each.files:,} files'}")
        if len(each.archive.sha256) < len(each.sha256):
            typer.echo(f"  of its SHA-256 only the first {len(each.archive.sha256)} digits are known; those are right")


def emit_archives(archives: Sequence[Archive], as_json: bool) -> None:
    """Write names, lengths and checksums of archives."""
    if as_json:
        keys = ("name", "num_bytes", "exact", "sha256", "tasks")
        emit_json([{key: getattr(archive, key) for key in keys} for archive in archives])
        return
    emit_table(HEAD, rows(archives), HEAD[1:2])


def rows(archives: Sequence[Archive]) -> list[list[str]]:
    """Return the cells of a table of archives."""
    return [
        [
            archive.name,
            f"{'' if archive.exact else 'about '}{archive.num_bytes:,}",
            archive.sha256 + ("" if len(archive.sha256) == 64 else "..."),
            ", ".join(archive.tasks),
        ]
        for archive in archives
    ]
