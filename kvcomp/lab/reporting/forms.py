"""A report as Markdown, and its tables as LaTeX."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from kvcomp.lab.reporting.findings import Findings, circumstances, describe
from kvcomp.lab.reporting.tables import Entry, Table
from kvcomp.lab.reporting.texts import file_name, latex, markdown

MARKS = {1: " ▲", -1: " ▼", 0: ""}
LATEX_MARKS = {1: r"$^{\uparrow}$", -1: r"$^{\downarrow}$", 0: ""}


def to_markdown(findings: Findings) -> str:
    """Return the whole report; figures are the PNG files beside it."""
    parts = [f"# {findings.title}", markdown(findings.state, 1000)]
    parts += [_markdown_table(table) for table in findings.tables]
    for plot in findings.plots:
        image = f"![{markdown(plot.title)}](figures/{plot.name}.png)"
        parts.append(f"## {markdown(plot.title)}\n\n{image}\n\n{markdown(plot.caption, 1000)}")
    parts += list(_markdown_lists(findings))
    return "\n\n".join(parts) + "\n"


def _markdown_table(table: Table) -> str:
    lines = [
        f"| {' | '.join(map(markdown, table.head))} |",
        f"|---|{'---:|' * (len(table.head) - 1)}",
        *(f"| {' | '.join(map(_markdown_entry, row))} |" for row in table.body),
    ]
    body = "\n".join(lines)
    return f"## {markdown(table.title)}\n\n{body}\n\n{markdown(table.caption, 1000)}"


def _markdown_entry(entry: Entry) -> str:
    text = markdown(entry.text, 60)
    note = f" ({markdown(entry.note)})" if entry.note else ""
    return (f"**{text}**" if entry.bold else text) + MARKS[entry.mark] + note


def _markdown_lists(findings: Findings) -> Iterator[str]:
    if findings.missing:
        lines = [f"- {markdown(describe(made))}: {count} lacking" for made, count in findings.missing]
        yield "## Missing\n\n" + "\n".join(lines)
    if findings.refused:
        lines = [f"- {markdown(describe(made))}: {markdown(reason)}" for made, reason in findings.refused]
        yield "## Not run\n\n" + "\n".join(lines)
    if findings.examples:
        lines = [
            f"- {markdown(str(each.arm))}, {markdown(each.task)} {each.sample}: {markdown(each.prediction)} instead of "
            f"{markdown(each.reference)}"
            for each in findings.examples
        ]
        yield "## Lost to compression\n\nThe full cache answers these right.\n\n" + "\n".join(lines)
    lines = [f"- {markdown(name)}: {markdown(value)}" for name, value in circumstances(findings.study)]
    yield "## How it was run\n\n" + "\n".join(lines)


def to_latex(findings: Findings) -> str:
    r"""Return the tables for `\input`; they need the package booktabs."""
    head = "% Made by kvcomp report. Needs \\usepackage{booktabs}.\n% " + latex(findings.state, 1000) + "\n"
    return head + "\n".join(map(_latex_table, findings.tables))


def _latex_table(table: Table) -> str:
    columns = "l" + "r" * (len(table.head) - 1)
    rows = [_latex_row(row) for row in table.body]
    return "\n".join(
        [
            "\\begin{table}[t]",
            "\\centering",
            f"\\caption{{{_latex_caption(table)}}}",
            f"\\label{{tab:{file_name(table.name)}}}",
            f"\\begin{{tabular}}{{{columns}}}",
            "\\toprule",
            f"{' & '.join(_latex_text(title) for title in table.head)} \\\\",
            "\\midrule",
            *rows,
            "\\bottomrule",
            "\\end{tabular}",
            "\\end{table}",
            "",
        ]
    )


def _latex_row(row: Sequence[Entry]) -> str:
    return " & ".join(map(_latex_entry, row)) + " \\\\"


def _latex_entry(entry: Entry) -> str:
    text = latex(entry.text, 60)
    note = f" {{\\scriptsize ({latex(entry.note)})}}" if entry.note else ""
    return (f"\\textbf{{{text}}}" if entry.bold else text) + LATEX_MARKS[entry.mark] + note


def _latex_caption(table: Table) -> str:
    return f"{_latex_text(table.title)}. {_latex_text(table.caption)}"


def _latex_text(text: str) -> str:
    written = latex(text, 1000)
    for mark, symbol in (("▲", "$\\uparrow$"), ("▼", "$\\downarrow$"), ("Δ", "$\\Delta$"), ("†", "$\\dagger$")):
        written = written.replace(mark, symbol)
    return written
