"""The envelope as tables: features down, methods or families across."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby

from kvcomp.testing.envelope.matrix import Cell, Envelope, Verdict

MARKS = {Verdict.GREEN: "ok", Verdict.RED: "RED", Verdict.DASH: "-"}
Table = tuple[str, list[str], list[list[str]]]


def tables(envelope: Envelope, columns: int) -> Iterator[Table]:
    """Yield title, head and body of each table, of at most so many columns beside the names of features.

    One method on several families is one table with families across; else there is one per family with methods across.
    """
    methods, families = envelope.named("method"), envelope.named("family")
    at = {(cell.method, cell.family, cell.feature): MARKS[cell.verdict] for cell in envelope.cells}
    features = envelope.named("feature")
    if len(methods) == 1:
        for group in _in_groups(families, columns):
            body = [[name, *(at.get((methods[0], family, name), "") for family in group)] for name in features]
            yield methods[0], ["feature", *group], body
        return
    for family in families:
        for group in _in_groups(methods, columns):
            body = [[name, *(at.get((method, family, name), "") for method in group)] for name in features]
            yield family, ["feature", *group], body


def reasons(envelope: Envelope, verdict: Verdict) -> list[tuple[str, str, str]]:
    """Return `(feature, where, reason)` of the cells with this verdict, those with the same reason together."""
    found = [cell for cell in envelope.cells if cell.verdict is verdict]
    key = lambda cell: (cell.feature, cell.reason)  # noqa: E731
    order = {name: place for place, name in enumerate(envelope.named("feature"))}
    found.sort(key=lambda cell: (order[cell.feature], cell.reason))
    return [(name, _where(list(cells), envelope), reason) for (name, reason), cells in groupby(found, key)]


def _where(cells: Sequence[Cell], envelope: Envelope) -> str:
    """Return of which methods and families cells are, briefly."""
    parts = []
    for family in envelope.named("family"):
        methods = [cell.method for cell in cells if cell.family == family]
        every = len(methods) == sum(1 for _ in envelope.named("method")) > 1
        if methods:
            parts.append(f"{family}: {'every method' if every else ', '.join(methods)}")
    return "; ".join(parts)


def _in_groups(names: Sequence[str], length: int) -> Iterator[Sequence[str]]:
    for start in range(0, len(names), length):
        yield names[start : start + length]
