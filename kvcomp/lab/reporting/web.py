"""A report as one HTML page that needs no other file, in light and dark."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape

from kvcomp.lab.page import render_page
from kvcomp.lab.plots import draw_svg
from kvcomp.lab.reporting.figures import Plot
from kvcomp.lab.reporting.findings import Findings, circumstances, describe
from kvcomp.lab.reporting.tables import Entry, Table
from kvcomp.lab.reporting.texts import plain

CLASSES = {1: "up", -1: "down", 0: "same"}
MEANING = {1: "significantly above the baseline", -1: "significantly below the baseline"}


def to_html(findings: Findings) -> str:
    """Return the whole page. Every text is escaped, and isolated from the direction of its neighbours."""
    sections = [
        ("tables", "Tables", "".join(map(_table, findings.tables))),
        ("figures", "Figures", "".join(map(_figure, findings.plots))),
        ("missing", "Missing", _missing(findings)),
        ("refused", "Not run", _refused(findings)),
        ("lost", "Lost to compression", _examples(findings)),
        ("how", "How it was run", _circumstances(findings)),
    ]
    shown = [section for section in sections if section[2]]
    links = "".join(f'<a href="#{anchor}">{title}</a> ' for anchor, title, _ in shown)
    state = "lead notice" if findings.missing else "lead"
    head = f'<h1>{_text(findings.title)}</h1>\n<p class="{state}">{_text(findings.state)}</p>\n<nav>{links}</nav>\n'
    parts = (f'<section id="{anchor}">\n<h2>{title}</h2>\n{content}</section>\n' for anchor, title, content in shown)
    return render_page(findings.title, head + "".join(parts))


def _text(text: str, most: int = 1000) -> str:
    """Return a text of unknown origin, shortened, on one line."""
    return f"<bdi>{escape(plain(text, most))}</bdi>"


def _table(table: Table) -> str:
    head = "".join(f'<th scope="col">{_text(title, 60)}</th>' for title in table.head)
    body = "\n".join(f"<tr>{_row(row)}</tr>" for row in table.body)
    return (
        f"<h3>{_text(table.title)}</h3>\n"
        f'<div class="scroll" tabindex="0"><table>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody>\n'
        f'</table></div>\n<p class="caption">{_text(table.caption)}</p>\n'
    )


def _row(row: Sequence[Entry]) -> str:
    first, *others = row
    return f'<th scope="row">{_text(first.text, 60)}</th>' + "".join(map(_entry, others))


def _entry(entry: Entry) -> str:
    text = _text(entry.text, 60)
    shown = f"<b>{text}</b>" if entry.bold else text
    note = f" <small>{_text(entry.note, 60)}</small>" if entry.note else ""
    title = f' title="{MEANING[entry.mark]}"' if entry.mark else ""
    return f'<td class="{CLASSES[entry.mark]}"{title}>{shown}{note}</td>'


def _figure(plot: Plot) -> str:
    title = escape(plain(plot.title), quote=True)
    return (
        f'<h3>{_text(plot.title)}</h3>\n<figure class="plot" tabindex="0" aria-label="{title}">'
        f"{draw_svg(plot.draw)}<figcaption>{_text(plot.caption)}</figcaption></figure>\n"
    )


def _missing(findings: Findings) -> str:
    items = (f"{_text(describe(made))}: {count} lacking" for made, count in findings.missing)
    return _list(items, "These configurations lack answers; every comparison uses the samples that both sides have.")


def _refused(findings: Findings) -> str:
    return _list((f"{_text(describe(made))}: {_text(reason)}" for made, reason in findings.refused), "")


def _examples(findings: Findings) -> str:
    if not findings.examples:
        return ""
    rows = "\n".join(
        f"<tr><td>{_text(str(each.arm), 80)}</td><td>{_text(each.task, 60)} {each.sample}</td>"
        f'<td class="wide">{_text(each.reference, 200)}</td><td class="wide">{_text(each.prediction, 200)}</td></tr>'
        for each in findings.examples
    )
    head = '<th>method</th><th class="text">sample</th><th class="text">right</th><th class="text">answered</th>'
    return (
        "<p>The full cache answers these right. The first few of each method, not chosen.</p>\n"
        f"<details><summary>{len(findings.examples)} answers</summary>\n"
        f'<div class="scroll"><table>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{rows}\n</tbody>\n</table></div>\n'
        "</details>\n"
    )


def _list(items: Iterable[str], lead: str) -> str:
    lines = "".join(f"<li>{item}</li>\n" for item in items)
    start = f"<p>{escape(lead)}</p>\n" if lead else ""
    return f"{start}<ul>\n{lines}</ul>\n" if lines else ""


def _circumstances(findings: Findings) -> str:
    terms = "\n".join(
        f"<dt>{_text(name, 60)}</dt><dd>{_text(value)}</dd>" for name, value in circumstances(findings.study)
    )
    return f"<dl>\n{terms}\n</dl>\n"
