"""The command line. One module per group of commands; everything they do is a call into the library."""

from kvcomp.cli.app import app

__all__ = ["app", "main"]


def main() -> None:
    """Run `kvcomp`."""
    app(prog_name="kvcomp")
