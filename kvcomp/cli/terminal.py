"""What a terminal is shown: tables and progress bars with rich, plain text where the stream is no terminal."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.table import Table

PLAIN_SECONDS = 10.0  # between two lines of progress where stderr is no terminal

Advance = Callable[[str], None]
Meter = Callable[[str, int, int | None], None]


def emit_json(document: Any) -> None:
    """Write one JSON document to stdout."""
    typer.echo(json.dumps(document, indent=2, ensure_ascii=False, allow_nan=False))


def emit_table(
    head: Sequence[str], body: Sequence[Sequence[str]], numbers: Sequence[str] = (), texts: Sequence[str] = ()
) -> None:
    """Write a table to stdout; the columns named in `numbers` are aligned on the right, and those in `texts` may take
    several lines on a terminal.
    """
    console = Console()
    if not console.is_terminal:
        typer.echo(plain_table(head, body, numbers))
        return
    table = Table(header_style="bold", box=None, pad_edge=False)
    for title in head:
        table.add_column(title, justify="right" if title in numbers else "left", no_wrap=title not in texts)
    for cells in body:
        table.add_row(*(cell.replace("[", r"\[") for cell in cells))
    console.print(table)


def plain_table(head: Sequence[str], body: Sequence[Sequence[str]], numbers: Sequence[str] = ()) -> str:
    """Return the table as aligned text.

    >>> print(plain_table(["name", "size"], [["a", "10"], ["long", "2"]], numbers=["size"]))
    name  size
    a       10
    long     2
    """
    lines = [head, *body]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if title in numbers else cell.ljust(width)
            for cell, width, title in zip(line, widths, head, strict=True)
        ).rstrip()
        for line in lines
    )


@contextmanager
def progress(what: str, steps: int | None = None) -> Iterator[Advance]:
    """Give a function that is told of each step before it runs; `steps` is None where nobody knows how many.

    Everything goes to stderr, so that stdout holds results alone.
    """
    console = Console(stderr=True)
    if not console.is_terminal:
        yield _plain_progress(what, steps)
        return
    counted = [] if steps is None else [MofNCompleteColumn()]
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), *counted, TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as bars:
        task = bars.add_task(what, total=steps)

        def advance(step: str) -> None:
            bars.update(task, advance=1, description=f"{what}: {step}" if step else what)

        yield advance


def _plain_progress(what: str, steps: int | None) -> Advance:
    started = last = time.monotonic()
    done = 0

    def advance(step: str) -> None:
        nonlocal last, done
        done += 1
        now = time.monotonic()
        if now - last >= PLAIN_SECONDS:
            last = now
            of = "" if steps is None else f" of {steps}"
            typer.echo(f"{what}: {done}{of}, {now - started:.0f} s{f', {step}' if step else ''}", err=True)

    return advance


@contextmanager
def byte_progress() -> Iterator[Meter]:
    """Give a function that is told what is going on, how many bytes are done, and of how many. All goes to stderr."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield _plain_meter()
        return
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, TimeRemainingColumn(), console=console, transient=True) as bars:
        known: dict[str, Any] = {}

        def show(what: str, done: int, total: int | None) -> None:
            if what not in known:
                known[what] = bars.add_task(what, total=total)
            bars.update(known[what], completed=done, total=total)

        yield show


def _plain_meter() -> Meter:
    last = time.monotonic()

    def show(what: str, done: int, total: int | None) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last >= PLAIN_SECONDS:
            last = now
            of = "" if total is None else f" of {total:,}"
            typer.echo(f"{what}: {done:,}{of} bytes" if done or of else what, err=True)

    return show
