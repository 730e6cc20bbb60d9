"""The page of the envelope, from the document that `kvcomp verify --json` writes."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from docstrings import one_line
from kvcomp.testing.envelope import Cell, Envelope, Verdict
from kvcomp.testing.envelope.tables import reasons

MEASURED = Path(__file__).parents[1] / "envelope.json"


def envelope_page(here: str) -> Iterator[str]:
    """Return what every feature promises, and what was found per family."""
    document = json.loads(MEASURED.read_text(encoding="utf-8"))
    envelope = Envelope.load(document)
    versions = ", ".join(f"{name} {version}" for name, version in document["versions"].items())
    yield from ("# The envelope", "", here + "What holds when a recipe runs in `generate()`, feature by feature.", "")
    yield (
        "Every cell was run by `kvcomp verify` with tiny models that have random weights, on a CPU: they show that "
        "control flow, shapes, bytes and positions are right, and nothing about the quality of answers. "
        "[How to run it](../how-to/check.md#what-holds-in-generate)."
    )
    yield from (
        "",
        f"Measured with {versions}.",
        "",
        "## What a feature promises",
        "",
        "| feature | promise |",
        "|---|---|",
    )
    yield from (f"| `{name}` | {one_line(promise)} |" for name, promise in document["promises"].items())
    for family in envelope.named("family"):
        yield from family_section(family, [cell for cell in envelope.cells if cell.family == family], envelope)


def family_section(family: str, cells: list[Cell], envelope: Envelope) -> Iterator[str]:
    """Return the table of one family, and the reasons for what is not green."""
    methods = list(dict.fromkeys(cell.method for cell in cells))
    named = ", ".join(f"`{name}`" for name in methods)
    yield from ("", f"## {family}", "", f"{len(methods)} recipes: {named}.", "")
    yield from ("| feature | ok | broken | not promised |", "|---|---|---|---|")
    for feature in envelope.named("feature"):
        mine = [cell for cell in cells if cell.feature == feature]
        green = sum(cell.verdict is Verdict.GREEN for cell in mine)
        yield f"| `{feature}` | {green} of {len(mine)} | {who(mine, Verdict.RED)} | {who(mine, Verdict.DASH)} |"
    alone = Envelope(tuple(cells), envelope.versions)
    for verdict, heading in ((Verdict.RED, "Broken"), (Verdict.DASH, "Not promised")):
        found = reasons(alone, verdict)
        if found:
            yield from ("", f"{heading}:", "")
            yield from (f"- `{name}` ({where.partition(': ')[2]}): {one_line(reason)}" for name, where, reason in found)


def who(cells: list[Cell], verdict: Verdict) -> str:
    """Return the recipes whose cells have this verdict."""
    names = [cell.method for cell in cells if cell.verdict is verdict]
    return "all" if names and len(names) == len(cells) > 1 else ", ".join(f"`{name}`" for name in names)
