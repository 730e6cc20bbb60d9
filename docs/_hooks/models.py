"""The page of model families, from the document that `make families` writes."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path

from docstrings import one_line
from kvcomp.core.types import Modality
from kvcomp.testing.families import FAMILIES
from kvcomp.testing.families.family import AUDIO, IMAGE, VIDEO
from transformers import CONFIG_MAPPING

TESTED = Path(__file__).parents[1] / "families.json"
KINDS = {IMAGE: Modality.IMAGE, VIDEO: Modality.VIDEO, AUDIO: Modality.AUDIO}
MARKS = {"passed": "yes", "failed": "**no**", "skipped": "not run"}
LEGEND = (
    ("budget 1", "`flowmm` at a budget of 1.0 gives the tokens and logits of `generate()` without kvcomp, bit for bit"),
    ("media", "images, videos and audio are told from text, and change the answer"),
    ("turns", "a second turn of text at a budget of 1.0 gives what one run of the whole conversation gives"),
    (
        "recipes",
        "of all recipes at a budget of 0.4, or the least that the recipe can do with: those with which each row of a "
        "left-padded batch of two prompts gives the tokens that it gives alone",
    ),
)


def models_page() -> Iterator[str]:
    """Return what was run with every family, and what is refused."""
    document = json.loads(TESTED.read_text(encoding="utf-8"))
    versions = ", ".join(f"{name} {version}" for name, version in document["versions"].items())
    yield from ("# Model families", "", "What the tests ran with every family of `kvcomp.testing.families`.", "")
    yield (
        "Each family is a seeded model of three layers with random weights, built from its configuration, with pixels "
        "or sound that go through its own towers. So the table is about control flow, shapes and positions; nothing "
        "here says how well a compressed model of that family answers. No published checkpoint was run."
    )
    yield from ("", f"Run by `make families` on a CPU with {versions}. ")
    yield from ("Features beyond these, and the families that they were tried with: [The envelope](envelope.md).", "")
    yield from ("| column | what was run |", "|---|---|")
    yield from (f"| {column} | {run} |" for column, run in LEGEND)
    yield from ("", "| family | configuration | beside text | budget 1 | media | turns | recipes | |")
    yield "|---|---|---|---|---|---|---|---|"
    yield from (family_row(name, document["families"].get(name, {})) for name in FAMILIES)
    yield from ("", "## Refused", "", "`kvcomp.compress` raises `UnsupportedModelError` before the model runs.", "")
    yield from ("| `model_type` | what the message names | refused in the tests |", "|---|---|---|")
    for name, found in document["refused"].items():
        yield f"| `{name}` | {one_line(found['reason'])} | {MARKS[found['outcome']]} |"


def family_row(name: str, found: Mapping[str, str | Mapping[str, str]]) -> str:
    """Return the row of a family; what the document does not hold was not run."""
    family = FAMILIES[name]
    kinds = ", ".join(KINDS[medium.token].name.lower() for medium in family.media) or "-"
    media = [str(found.get(check, "skipped")) for check in ("media", "answer")]
    shown = MARKS[max(media, key=list(MARKS).index)] if family.media else "-"
    kind = family.configuration["model_type"]
    config = f"`{CONFIG_MAPPING[kind].__name__}`" if family.available else "not in this version"
    cells = (
        f"`{name}`",
        config,
        kinds,
        MARKS[str(found.get("stock", "skipped"))],
        shown,
        MARKS[str(found.get("turns", "skipped"))],
        recipes_cell(found.get("recipes", {})),
        one_line(family.note),
    )
    return f"| {' | '.join(cells)} |"


def recipes_cell(outcomes: str | Mapping[str, str]) -> str:
    """Return how many recipes passed, and which did not."""
    assert not isinstance(outcomes, str)
    run = [found for found in outcomes.values() if found != "skipped"]
    if not run:
        return "not run"
    cell = f"{run.count('passed')} of {len(run)}"
    named = ", ".join(f"`{recipe}`" for recipe, found in outcomes.items() if found == "failed")
    return f"{cell}; failed: {named}" if named else cell
