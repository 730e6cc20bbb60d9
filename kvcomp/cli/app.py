"""The application: its commands, `--version`, and how errors and warnings are shown."""

from __future__ import annotations

import errno
import warnings
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from kvcomp.cli.ablate import ablate
from kvcomp.cli.bench import JsonToStdout, bench
from kvcomp.cli.catalogue import check, list_entries, show
from kvcomp.cli.demo import demo
from kvcomp.cli.evaluate import evaluate
from kvcomp.cli.inspect import inspect
from kvcomp.cli.report import report
from kvcomp.cli.run import run
from kvcomp.cli.tasks import app as tasks
from kvcomp.cli.verify import verify
from kvcomp.core.errors import KVCompError, KVCompWarning
from kvcomp.version import __version__


class ErrorsAsMessages(TyperGroup):
    """Shows an error of kvcomp, or of the operating system (a full disk, a read-only folder), as one
    message on stderr, with exit code 2; warnings of kvcomp as one line each.
    """

    def invoke(self, ctx: Any) -> Any:
        """Run the command that was asked for."""
        with warnings.catch_warnings():
            stock = warnings.showwarning

            def show_warning(message: Any, category: type[Warning], *where: Any, **more: Any) -> None:
                if issubclass(category, KVCompWarning):
                    typer.echo(f"warning: {message}", err=True)
                else:
                    stock(message, category, *where, **more)

            warnings.showwarning = show_warning
            try:
                return super().invoke(ctx)
            except KVCompError as error:
                typer.echo(f"error: {error}", err=True)
                raise typer.Exit(2) from None
            except OSError as error:
                if error.errno == errno.EPIPE:  # the reader of a pipe has left, as `head` does; typer ends quietly
                    raise
                typer.echo(f"error: {_what_failed(error)}", err=True)
                raise typer.Exit(2) from None


def _what_failed(error: OSError) -> str:
    if error.strerror is None:
        return str(error)
    return error.strerror if error.filename is None else f"{error.filename}: {error.strerror}"


app = typer.Typer(
    cls=ErrorsAsMessages,
    help="KV-cache compression for multimodal and text models, composed from parts in a config file.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"kvcomp {__version__}")
        raise typer.Exit


@app.callback()
def kvcomp(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and stop.")
    ] = False,
) -> None:
    """KV-cache compression for multimodal and text models, composed from parts in a config file."""


app.command("list")(list_entries)
app.command()(show)
app.command()(check)
app.command()(run)
app.command()(verify)
app.command("eval")(evaluate)
app.command()(inspect)
app.command()(ablate)
app.command()(report)
app.command()(demo)
app.command(cls=JsonToStdout)(bench)
app.add_typer(tasks, name="tasks")
