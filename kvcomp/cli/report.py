"""`kvcomp report`: what the results of an ablation say."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from kvcomp.cli.terminal import emit_json, emit_table, progress
from kvcomp.lab.database import read_study
from kvcomp.lab.reporting import Written, write_report
from kvcomp.lab.reporting.tables import Entry, Table
from kvcomp.lab.reporting.texts import plain

MARKS = {1: " ▲", -1: " ▼", 0: "  "}


def report(
    folder: Annotated[Path, typer.Argument(help="Folder that `kvcomp ablate` wrote, complete or not.")],
    baseline: Annotated[
        str | None, typer.Option(help="Strategy that the others are held against; by default the full cache.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Folder for the report; by default the folder of results.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Write the comparisons as one JSON document.")] = False,
) -> None:
    """Draw the report of an ablation: one HTML page, Markdown, LaTeX, CSV, and every figure as PNG and CSV."""
    study = read_study(folder)
    with progress("report") as advance:
        written = write_report(study, out or folder, baseline, advance)
    if as_json:
        emit_json(summarize(written))
    else:
        emit(written)


def summarize(written: Written) -> dict[str, Any]:
    """Return what was found as plain data."""
    findings = written.findings
    return {
        "answered": findings.answered,
        "planned": findings.planned,
        "baseline": findings.baseline,
        "comparisons": list(findings.comparisons),
        "files": [str(path) for path in written.files],
    }


def emit(written: Written) -> None:
    """Write the main tables, whether the results are complete, and where the files are."""
    findings = written.findings
    for table in findings.tables:
        if table.name.startswith("main "):
            typer.echo(f"\n{plain(table.title)}")
            emit_table(*_shown(table))
    if findings.baseline is not None:
        typer.echo(f"\n▲ ▼ significantly above, below {plain(findings.baseline)}; * significantly the best.")
    typer.echo(findings.state)
    if not written.parquet:
        typer.echo("No results.parquet: it needs pyarrow, `pip install 'kvcomp[parquet]'`.")
    typer.echo(f"See {written.files[-1]}")


def _shown(table: Table) -> tuple[tuple[str, ...], list[list[str]], tuple[str, ...]]:
    head = tuple(plain(title, 40) for title in table.head)
    return head, [[plain(row[0].text, 40), *map(_entry, row[1:])] for row in table.body], head[1:]


def _entry(entry: Entry) -> str:
    return plain(entry.text, 40) + ("*" if entry.bold else "") + MARKS[entry.mark]
