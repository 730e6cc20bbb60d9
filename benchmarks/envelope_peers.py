"""The envelope of another library: the features of `kvcomp verify`, tried with kvpress in an environment of its own.

    python benchmarks/envelope_peers.py [--environment build/peers] [--page docs/explanation/peers.md]

kvpress needs an older transformers than kvcomp, so the script makes a virtual environment, installs kvpress and the
versions that it asks for (torch as a CPU build), runs itself there on the same tiny Llama, prompts and checks, and
writes the table between the two marks of the page. The functions that decide about a cell are those that decide about
kvcomp's own. kvpress promises none of them to the tolerance used here, so a feature that a run does not show is a dash,
whose note says what was seen; what a run shows is ok.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
REQUIREMENTS = ("kvpress==0.5.5", "torch==2.13.0", "einops", "pluggy", "pydantic", "PyYAML")
START, END = "<!-- measured: start -->\n", "<!-- measured: end -->\n"
MARKS = {"green": "ok", "red": "**broken**", "dash": "-", "absent": "not run"}

# Claimed for other interfaces of kvpress, which are not tried here.
ELSEWHERE = {
    "every-n-tokens": "claimed for DecodingPress, which is not tried here",
    "over-budget": "claimed for DecodingPress, which is not tried here",
    "many-questions": "claimed for its own pipeline, which is not tried here",
}
# Beside each press, the recipe of kvcomp that follows the same paper.
METHODS = {"KnormPress": "key-norm", "SnapKVPress": "snapkv", "StreamingLLMPress": "streaming-llm"}
METHODS |= {"TOVAPress": "tova", "PyramidKVPress": "pyramidkv", "AdaKVPress": "ada-kv"}


def presses() -> dict[str, Callable[[float], Any]]:
    """Return what makes each press of the ratio that is removed."""
    import kvpress

    plain = {name: getattr(kvpress, name) for name in METHODS if name != "AdaKVPress"}
    made = {name: lambda removed, kind=kind: kind(compression_ratio=removed) for name, kind in plain.items()}
    made["SnapKVPress"] = lambda removed: kvpress.SnapKVPress(compression_ratio=removed, window_size=8)
    made["PyramidKVPress"] = lambda removed: kvpress.PyramidKVPress(compression_ratio=removed, window_size=8)
    made["AdaKVPress"] = lambda removed: kvpress.AdaKVPress(kvpress.SnapKVPress(removed, window_size=8))
    return made


def try_peer() -> dict[str, Any]:
    """Return the cells of every press, as this environment has them."""
    from importlib.metadata import version

    from transformers import DynamicCache

    from kvcomp.testing.envelope import FEATURES, Engine, NotClaimedError, run_envelope
    from kvcomp.testing.families import FAMILIES

    class Press(Engine):
        """A press of kvpress, in `generate()`."""

        refusals = (NotImplementedError, AssertionError)

        def __init__(self, name: str, make: Callable[[float], Any]) -> None:
            self.name, self.make = name, make

        @contextmanager
        def compressing(self, model: Any, ratio: float, **options: Any) -> Iterator[Any]:
            if options:
                raise NotClaimedError(f"no interface for {', '.join(options)}")
            with self.make(1 - ratio)(model):
                yield DynamicCache(config=model.config)

        def kept_bytes(self, cache: Any) -> int:
            return sum(part.untyped_storage().nbytes() for layer in cache.layers for part in (layer.keys, layer.values))

    engines = [Press(name, make) for name, make in presses().items()]
    envelope = run_envelope(engines, [FAMILIES["llama"]], list(FEATURES.values()))
    cells = [as_claimed(cell) for cell in envelope.cells]
    document = replace(envelope, cells=tuple(cells)).dump()
    return document | {"versions": document["versions"] | {"kvpress": version("kvpress")}}


def as_claimed(cell: Any) -> Any:
    """Return a cell that is never broken: kvpress promises none of this to our tolerance, so what a run does not show
    is a dash that says what was seen.
    """
    dash = type(cell.verdict)("dash")
    if cell.feature in ELSEWHERE:
        return replace(cell, verdict=dash, reason=ELSEWHERE[cell.feature])
    return replace(cell, verdict=dash, reason=f"run all the same: {cell.reason}") if cell.verdict == "red" else cell


def make_environment(folder: Path) -> Path:
    """Return the Python of a virtual environment with kvpress; it is made where there is none."""
    python = folder / "bin" / "python"
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
        pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        subprocess.run([*pip, *REQUIREMENTS], check=True)
    return python


def measure(python: Path) -> dict[str, Any]:
    """Return the document that this script writes in the other environment."""
    path = os.pathsep.join(str(ROOT / name) for name in ("", "strategies", "adapters"))
    environment = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    command = [str(python), str(Path(__file__).resolve()), "--inside"]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    document: dict[str, Any] = json.loads(done.stdout)
    return document


def ours() -> dict[tuple[str, str], str]:
    """Return the verdicts of kvcomp's recipes on Llama, `(recipe, feature)`, as `make envelope` wrote them."""
    document = json.loads((ROOT / "docs" / "envelope.json").read_text(encoding="utf-8"))
    mine = [cell for cell in document["cells"] if cell["family"] == "llama"]
    return {(cell["method"], cell["feature"]): cell["verdict"] for cell in mine}


def table(document: dict[str, Any]) -> Iterator[str]:
    """Yield the lines of the dated table, and the reason of every cell that is not green."""
    versions, today = document["versions"], datetime.datetime.now(datetime.UTC).date()
    named = ", ".join(f"{name} {versions[name]}" for name in ("kvpress", "transformers", "torch", "python"))
    yield f"Run on {today} with {named}; the columns of kvcomp are from [the envelope](../reference/envelope.md)."
    yield from ("", "| feature | " + " | ".join(f"kvpress `{press}` | `{METHODS[press]}`" for press in METHODS) + " |")
    yield "|---" * (1 + 2 * len(METHODS)) + "|"
    theirs = {(cell["method"], cell["feature"]): cell for cell in document["cells"]}
    mine = ours()
    for feature in document["promises"]:
        verdicts = [
            (theirs[press, feature]["verdict"], mine.get((METHODS[press], feature), "absent")) for press in METHODS
        ]
        yield f"| `{feature}` | " + " | ".join(f"{MARKS[their]} | {MARKS[our]}" for their, our in verdicts) + " |"
    yield from ("", "What was seen where a cell of kvpress is not ok:", "")
    for feature in document["promises"]:
        yield from reasons([theirs[press, feature] for press in METHODS])


def reasons(cells: list[dict[str, str]]) -> Iterator[str]:
    """Yield a line for each reason that cells of one feature are not green."""
    found: dict[str, list[str]] = {}
    for cell in cells:
        if cell["verdict"] != "green":
            found.setdefault(cell["reason"].replace("|", "\\|"), []).append(f"`{cell['method']}`")
    for reason, methods in found.items():
        yield f"- `{cells[0]['feature']}`, {', '.join(methods)}: {reason}"


def main() -> None:
    """Run what the command line asks for."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--environment", type=Path, default=ROOT / "build" / "peers")
    parser.add_argument("--page", type=Path, default=ROOT / "docs" / "explanation" / "peers.md")
    parser.add_argument("--inside", action="store_true", help="print the cells as JSON; for the environment itself")
    arguments = parser.parse_args()
    if arguments.inside:
        print(json.dumps(try_peer()))
        return
    document = measure(make_environment(arguments.environment.resolve()))
    page = arguments.page.read_text(encoding="utf-8")
    before, after = page.partition(START)[0], page.partition(END)[2]
    arguments.page.write_text(
        before + START + "\n" + "\n".join(table(document)) + "\n\n" + END + after, encoding="utf-8"
    )


if __name__ == "__main__":
    main()
