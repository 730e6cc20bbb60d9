"""The command line called in this process, and models in folders for it to open."""

import json
from pathlib import Path
from typing import Any

from click.testing import Result
from typer.testing import CliRunner

from kvcomp.cli import app
from kvcomp.minimile.model import build_model
from kvcomp.minimile.processor import build_processor


def call(*arguments: object) -> Result:
    """Return what `kvcomp ARGUMENTS` does."""
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def document(*arguments: object) -> Any:
    """Return the JSON document that `kvcomp ARGUMENTS --json` writes."""
    result = call(*arguments, "--json")
    assert result.exit_code == 0, result.stderr
    return json.loads(result.stdout)


def save_untrained(folder: Path) -> Path:
    """Write an untrained model of the testbed's shape, which takes images, with its processor; return the folder."""
    build_model(0).eval().save_pretrained(folder)
    build_processor().save_pretrained(folder)
    return folder
