"""The report of a comparison: one HTML page that needs no other file, in light and dark."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from typing import Any

from kvcomp.lab.document import Document, Line, budgets, ranked, rho_by_task, summarize, thresholds, verdict
from kvcomp.lab.page import render_page
from kvcomp.lab.plots import to_svg


def render_report(document: Document) -> str:
    """Return the whole page. Every name and text of the document is escaped."""
    sections = (
        _head(document),
        _overview(document),
        f"<h2>Every recipe</h2>\n<figure>{to_svg(document)}</figure>",
        _rho(document),
        _skipped(document),
        _method(document),
        _details(document),
    )
    return render_page(_title(document), "".join(sections), end=_footer(document))


def _title(document: Document) -> str:
    return f"{document['testbed']}: exact match under a compressed cache"


def _head(document: Document) -> str:
    asked = f"{document['samples']} questions of each of {len(document['tasks'])} tasks"
    return (
        f"<h1>{escape(_title(document))}</h1>\n"
        f'<p class="lead">The same {asked}, answered with the KV cache compressed to each budget by each recipe. '
        f"{escape(verdict(document))}</p>\n"
    )


def _overview(document: Document) -> str:
    """Return the table of mean exact match, a line per recipe and a column per budget."""
    lines = {(line.recipe, line.budget): line for line in summarize(document["rows"])}
    known = budgets(document["rows"])
    body = [
        [_text(recipe), *(_overview_cell(lines.get((recipe, budget))) for budget in known)]
        for recipe in ranked(document["rows"])
    ]
    return "<h2>Exact match, bytes and decode time</h2>\n" + _table(
        ["recipe", *(f"budget {budget}" for budget in known)],
        body,
        "Mean exact match over the tasks, KV bytes per sample, and time per decoded token relative to the full cache. "
        "The best at the smallest budget come first.",
    )


def _overview_cell(line: Line | None) -> str:
    if line is None:
        return "<td></td>"
    ratio = "" if line.decode_ratio is None else f" &middot; {line.decode_ratio:.2f} x"
    return _share(line.exact_match, f" <small>{_kib(line.kv_bytes)}{ratio}</small>")


def _rho(document: Document) -> str:
    """Return the table of rho per layer and task, nothing where no recipe measures it."""
    rho = rho_by_task(document)
    if not rho:
        return ""
    layers = len(next(iter(rho.values())))
    names = sorted({row["recipe"] for row in document["rows"] if row["rho"] and None not in row["rho"]})
    limits = ", ".join(f"{value:g}" for value in thresholds(document))
    caption = f"Measured by {', '.join(names)} before anything is compressed. " + (
        f"A layer whose rho is above the threshold ({limits}) may merge across modalities." if limits else ""
    )
    body = [[_text(task), *(_number(f"{value:.3f}") for value in values)] for task, values in rho.items()]
    head = ["task", *(f"layer {layer}" for layer in range(layers))]
    return "<h2>Flow between modalities</h2>\n" + _table(head, body, caption)


def _details(document: Document) -> str:
    """Return the table of all rows."""
    order = {recipe: place for place, recipe in enumerate(ranked(document["rows"]))}
    rows = sorted(document["rows"], key=lambda row: order[row["recipe"]])
    head = ["recipe", "budget", "task", "exact match", "95 % interval", "KV bytes", "decode time", "rho per layer"]
    table = _table(head, map(_detail, rows), "", text_columns=("task",))
    return f"<h2>All rows</h2>\n<details><summary>{len(rows)} rows</summary>\n{table}</details>\n"


def _detail(row: dict[str, Any]) -> list[str]:
    low, high = row["ci"]
    ratio = "" if row["decode_ratio"] is None else f"{row['decode_ratio']:.2f} x"
    return [
        _text(row["recipe"]),
        _number(str(row["budget"])),
        _text(row["task"]),
        _share(row["exact_match"]),
        _number(f"{low:.0%} to {high:.0%}"),
        _number(f"{row['kv_bytes']:,.0f}"),
        _number(ratio),
        _number(format_rho(row["rho"])),
    ]


def _skipped(document: Document) -> str:
    if not document["skipped"]:
        return ""
    body = [[_text(entry["recipe"]), _text(entry["budget"]), _text(entry["reason"])] for entry in document["skipped"]]
    return "<h2>Not run</h2>\n" + _table(["recipe", "budget", "reason"], body, "", text_columns=("budget", "reason"))


def _method(document: Document) -> str:
    terms = "\n".join(
        f"<dt><code>{escape(name)}</code></dt><dd>{escape(text)}</dd>" for name, text in document["fields"].items()
    )
    return (
        "<h2>How it was measured</h2>\n"
        "<p>Every recipe answers the same prompts: greedy decoding, the question inside the compressed prompt "
        f"(<code>{escape(document['question'])}</code>), split <code>{escape(document['split'])}</code>, at most "
        f"{document['max_new_tokens']} new tokens. Decode time comes from {document['timed_samples']} prompts per "
        "task, one at a time, which all recipes decode in turns of one token. It says little about a model of this "
        "size, whose cache is small: it shows what compression costs, not what it saves on a long prompt.</p>\n"
        f"<dl>\n{terms}\n</dl>\n"
    )


def _footer(document: Document) -> str:
    versions = ", ".join(f"{name} {number}" for name, number in document["versions"].items())
    machine = f"{document['hardware_threads']} hardware threads ({document['machine']})"
    run = f"{document['seconds']:.0f} seconds on {machine}, seed {document['seed']}"
    return f"<footer>{escape(run)}. {escape(versions)}.</footer>\n"


def format_rho(rho: Sequence[float | None]) -> str:
    """Return rho per layer with two digits, empty where no layer was measured.

    >>> format_rho([0.257, None]), format_rho([None, None])
    ('0.26 -', '')
    """
    if all(value is None for value in rho):
        return ""
    return " ".join("-" if value is None else f"{value:.2f}" for value in rho)


def _table(head: Sequence[str], body: Iterable[Sequence[str]], caption: str, text_columns: Sequence[str] = ()) -> str:
    titles = "".join(
        f'<th class="text">{escape(title)}</th>' if title in text_columns else f"<th>{escape(title)}</th>"
        for title in head
    )
    lines = "\n".join(f"<tr>{''.join(cells)}</tr>" for cells in body)
    note = f"<caption>{escape(caption)}</caption>\n" if caption else ""
    return (
        f'<div class="scroll"><table>\n{note}<thead><tr>{titles}</tr></thead>\n<tbody>\n{lines}\n</tbody>\n'
        "</table></div>\n"
    )


def _text(value: object) -> str:
    return f'<td class="text">{escape(str(value))}</td>'


def _number(value: str) -> str:
    return f"<td>{escape(value)}</td>"


def _share(value: float, note: str = "") -> str:
    return f'<td class="share" style="--value: {value:.3f}">{value:.0%}{note}</td>'


def _kib(num_bytes: float) -> str:
    return f"{num_bytes / 1024:,.1f} KiB"
