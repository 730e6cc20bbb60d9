"""The files of a report."""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from kvcomp.core.errors import ResultsError
from kvcomp.lab.plots import write_png
from kvcomp.lab.reporting.exports import has_pyarrow, write_csv, write_parquet
from kvcomp.lab.reporting.findings import Findings, find
from kvcomp.lab.reporting.forms import to_latex, to_markdown
from kvcomp.lab.reporting.web import to_html
from kvcomp.lab.results import Study

PAGE, MARKDOWN, LATEX, TABLE, PARQUET, TESTS = (
    "report.html",
    "report.md",
    "report.tex",
    "results.csv",
    "results.parquet",
    "comparisons.csv",
)
FIGURES = "figures"


@dataclass(frozen=True, eq=False)
class Written:
    """What was written.

    Attributes:
        findings: what it says.
        files: in the order in which they were written.
        parquet: whether the Parquet file is among them; it needs pyarrow.
    """

    findings: Findings
    files: tuple[Path, ...]
    parquet: bool


def write_report(
    study: Study, out: Path, baseline: str | None = None, on_file: Callable[[str], None] = lambda name: None
) -> Written:
    """Write the report of a study: a page, Markdown, LaTeX, tables of all results, and every figure as PNG and CSV.

    Args:
        study: complete or not.
        out: the folder; made if it is not there. Files of an earlier report are replaced.
        baseline: the strategy that others are held against, by default the full cache.
        on_file: is told the name of each file before it is made.

    Raises:
        UnknownNameError: no strategy of the baseline's name was run.
        ResultsError: a file cannot be written.
    """
    findings = find(study, baseline)
    files = []
    try:
        (out / FIGURES).mkdir(parents=True, exist_ok=True)
        for name, write in _files(findings):
            on_file(name)
            write(out / name)
            files.append(out / name)
    except OSError as error:
        if isinstance(error, ResultsError):
            raise
        raise ResultsError(f"the report cannot be written to {out}: {error.strerror or error}") from None
    return Written(findings, tuple(files), has_pyarrow())


def _files(findings: Findings) -> Iterator[tuple[str, Callable[[Path], object]]]:
    """Yield the name of each file and what writes it, the page last."""
    yield TABLE, partial(write_csv, findings.study.results)
    if has_pyarrow():
        yield PARQUET, partial(write_parquet, findings.study.results)
    yield TESTS, partial(_write_rows, findings.comparisons)
    for plot in findings.plots:
        yield f"{FIGURES}/{plot.name}.csv", partial(_write_rows, plot.rows)
        yield f"{FIGURES}/{plot.name}.png", partial(write_png, plot.draw)
    for name, render in ((MARKDOWN, to_markdown), (LATEX, to_latex), (PAGE, to_html)):
        yield name, partial(_write_text, render, findings)


def _write_text(render: Callable[[Findings], str], findings: Findings, path: Path) -> None:
    path.write_text(render(findings), encoding="utf-8")


def _write_rows(rows: Sequence[dict[str, Any]], path: Path) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]) if rows else [])
        writer.writeheader()
        writer.writerows(rows)
