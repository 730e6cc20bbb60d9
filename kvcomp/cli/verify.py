"""`kvcomp verify`: what holds in `generate()`, feature by feature, each cell from a run."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from kvcomp.cli.quiet import quiet_transformers
from kvcomp.cli.run import strategy_source
from kvcomp.cli.terminal import emit_json, emit_table, progress
from kvcomp.cli.verified_model import families_named
from kvcomp.core.registry import registry
from kvcomp.testing.envelope import Cell, Envelope, KVCompEngine, Verdict, features_named
from kvcomp.testing.envelope.matrix import cells_of, versions
from kvcomp.testing.envelope.tables import reasons, tables

COLUMNS = 9  # methods or families side by side


def verify(
    names: Annotated[
        list[str] | None, typer.Argument(help="Recipes or YAML files; by default every recipe.", metavar="[NAME]...")
    ] = None,
    model: Annotated[
        list[str] | None,
        typer.Option(
            help="A family with a tiny model (`llama`), `all` of them, a testbed, or a model's folder; repeat it."
        ),
    ] = None,
    feature: Annotated[
        list[str] | None, typer.Option(help="Try this feature only; repeat it for several. Default: all.")
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Try only the few features that break most.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Write one JSON document.")] = False,
) -> None:
    """Try every feature with every recipe, and show what holds; exit code 1 where a promise is broken.

    ok: it was run and holds. RED: it was run and does not. -: it is not promised here; the reason is below the table.
    """
    engines = [KVCompEngine(strategy_source(name)) for name in names or every_recipe()]
    features = features_named(feature or None, quick and not feature)
    with quiet_transformers():
        families = families_named(model or ["llama"])
        envelope, finished = _run(engines, families, features)
    if as_json:
        emit_json(envelope.dump())
    else:
        _show(envelope)
    if not finished:
        typer.echo("stopped; the table holds what was run until then", err=True)
        raise typer.Exit(130)
    if envelope.broken:
        raise typer.Exit(1)


def every_recipe() -> list[str]:
    """Return the names of all registered recipes."""
    return [entry.name for entry in registry.entries("recipe")]


def _run(engines: list[KVCompEngine], families: list[Any], features: list[Any]) -> tuple[Envelope, bool]:
    """Return what was run, and whether that is everything: Ctrl-C ends it early."""
    cells: list[Cell] = []
    finished = True
    with progress("verifying", len(engines) * len(families) * len(features)) as advance:
        try:
            for family in families:
                model = family.model()
                for engine in engines:
                    for cell in cells_of(engine, family, features, model):
                        cells.append(cell)
                        advance(f"{family.name}, {engine.name}, {cell.feature}")
        except KeyboardInterrupt:
            finished = False
    return Envelope(tuple(cells), versions()), finished


def _show(envelope: Envelope) -> None:
    for title, head, body in tables(envelope, COLUMNS):
        typer.echo(title)
        emit_table(head, body)
        typer.echo("")
    for verdict, heading in ((Verdict.RED, "Broken:"), (Verdict.DASH, "Not promised:")):
        found = reasons(envelope, verdict)
        if found:
            typer.echo(heading)
            for name, where, reason in found:
                typer.echo(f"  {name} ({where}): {reason}")
    typer.echo(_summary(envelope))


def _summary(envelope: Envelope) -> str:
    count = {verdict: sum(cell.verdict is verdict for cell in envelope.cells) for verdict in Verdict}
    of = ", ".join(f"{name} {version}" for name, version in envelope.versions.items())
    return f"{count[Verdict.GREEN]} ok, {count[Verdict.RED]} broken, {count[Verdict.DASH]} not promised; {of}"
