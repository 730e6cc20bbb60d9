"""The pages of recipes: what a method is, its file, equations, settings, and where it is not what its paper says."""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import dropwhile
from pathlib import Path
from typing import Any

import kvcomp
import torch
import yaml
from docstrings import attributes, default_of, one_line, prose
from kvcomp.core.about import About
from kvcomp.core.composition import trigger_conflicts
from kvcomp.core.config import DEFAULT_PARTS, recipe_document
from kvcomp.core.interfaces import Part
from kvcomp.core.registry import Entry, registry
from kvcomp.core.strategy import Strategy
from kvcomp.core.trigger import Trigger
from kvcomp.core.types import SlotForm

ARXIV = re.compile(r"arXiv:(\d{4}\.\d{5})")
DEVIATES = re.compile(r"(?:^|(?<=[.:] ))(?=(?:Deviations?|Left open|What is different)\b)", re.MULTILINE)
TOKENS, FORM = 4096, SlotForm(layers=32, kv_heads=8, key_dim=128, value_dim=128, itemsize=2)
NOTATION = """\
In the equations, `T` is the number of tokens seen, `B` the slots of one KV head in one layer, `B_l` those of layer `l`
of `L`, `a_ij` the attention probability of query `i` on token `j`, averaged over the query heads that share a KV head,
and `k_j`, `v_j` its key (after rotary embedding) and value. `n_j` counts the tokens that are merged into `j`. `//`
rounds down. "Kept" lists what comes first, until `B` is full; equal scores go to the earlier token. Where layers or
heads share a budget, numbers are rounded so that the sum is exact."""


def index_page(here: str) -> Iterator[str]:
    """Return the table of all recipes."""
    yield from ("# Recipes", "", here + "A recipe is a named strategy file: `kvcomp.compress(model, NAME)`.", "")
    yield from (NOTATION, "", "| recipe | idea | source |", "|---|---|---|")
    for entry in registry.entries("recipe"):
        about = About.of(entry.value)
        yield f"| [`{entry.name}`]({entry.name}.md) | {one_line(about.idea)} | {linked(about.source)} |"


def recipe_page(entry: Entry) -> Iterator[str]:
    """Return the page of one recipe."""
    about, built, document = About.of(entry.value), kvcomp.strategy(entry.name), recipe_document(entry.name)
    yield from (f"# {about.title or entry.name}", "", f"`{entry.name}`, from {entry.package} {entry.version}. ")
    yield from ((f"Source: {linked(about.source)}.", "") if about.source else ("",))
    yield from (f"{about.idea[:1].upper()}{about.idea[1:]} {about.notes}".strip(), "", "```yaml")
    yield from (body_of(entry.value), "```", "")
    if base := document.get("base"):
        yield from (f"Everything else is that of [`{base}`]({base}.md).", "")
    page, _, own_deviations = about.page.partition("## Deviations\n")
    yield from (page.strip(), "")
    yield from settings(built)
    yield from limits(built)
    yield from deviations(built, own_deviations.strip())


def body_of(recipe: Path | dict[str, Any]) -> str:
    """Return the file without the comment at its head."""
    if isinstance(recipe, dict):
        return yaml.safe_dump(recipe, sort_keys=False, default_flow_style=None).strip()
    lines = Path(recipe).read_text(encoding="utf-8").splitlines()
    return "\n".join(dropwhile(lambda line: line.startswith("#"), lines)).strip()


def settings(built: Strategy) -> Iterator[str]:
    """Return what every part of the method is set to, defaults included; a change from its default is bold."""
    if not any(walk(built)):
        return
    yield from ("## Parts and settings", "", f"Budget {built.budget} unless another is given.", "")
    yield from ("| part | field | value | default | |", "|---|---|---|---|---|")
    for path, part in walk(built):
        notes = attributes(type(part))
        link = f"{path} [`{part.use}`](../parts/{part.kind}.md#{part.use})"
        fields = {name: field for name, field in type(part).model_fields.items() if name not in part.part_fields()}
        if not fields:
            yield f"| {link} | | | | |"
        for name, field in fields.items():
            value, default = f"`{getattr(part, name)!r}`".replace("'", ""), default_of(field)
            shown = value if value == default else f"**{value}**"
            yield f"| {link} | `{name}` | {shown} | {default} | {one_line(notes.get(name, ''))} |"
            link = ""
    yield ""


def walk(built: Strategy) -> Iterator[tuple[str, Part]]:
    """Return the parts with their paths, those inside others after them; defaults without a field are left out."""

    def inside(path: str, part: Part) -> Iterator[tuple[str, Part]]:
        yield path, part
        for name in part.part_fields():
            yield from inside(f"{path}.{name}", getattr(part, name))

    for part in built.parts:
        if part.use != DEFAULT_PARTS.get(part.kind):
            yield from inside(part.kind, part)


def limits(built: Strategy) -> Iterator[str]:
    """Return what the method needs, when it can run, and how small it can be."""
    yield from ("## When it runs", "")
    members = [member for part in built.parts for member in part.family()]
    if any(getattr(part, "scope", "layer") == "model" for part in members):
        yield "- It divides one budget among layers: every layer is held whole until the forward ends."
    repeats = [seen for seen in built.observations if seen.repeat() is not None]
    if repeats:
        yield "- It feeds the context once more, which costs about one more prefill."
    if built.observations:
        seen = ", ".join(f"[`{each.use}`](../parts/observation.md#{each.use})" for each in built.observations)
        yield f"- It observes {seen}."
    faults = trigger_conflicts(built.parts, Trigger(over_budget=True), built.turns)
    if faults:
        yield f"- Not while tokens are decoded: {faults[0].rpartition(': ')[2]}."
    elif built.selector is not None:
        yield "- At the end of a forward of more than one token; while tokens are decoded too, with a `trigger`."
    else:
        yield "- It has nothing to do."
    if built.store.shrinks and built.selector is None:
        yield f"- {smallest(built)}"
    yield ""


def smallest(built: Strategy) -> str:
    """Return the smallest budget of a method that keeps every token, for one form of model."""
    ratio = int(built.store.smallest(torch.tensor(TOKENS), FORM)) / (TOKENS * FORM.heads * FORM.slot_bytes)
    return (
        f"Its smallest budget depends on model and prompt. With {FORM.layers} layers, {FORM.kv_heads} KV heads of "
        f"{FORM.key_dim} dimensions in bfloat16 and {TOKENS} tokens it is {ratio:.3f}; less raises `BudgetError`, "
        "whose `smallest` is a ratio that fits."
    )


def deviations(built: Strategy, own: str) -> Iterator[str]:
    """Return where the recipe, and then each of its parts, is not what the source says."""
    found = {path: (part, said) for path, part in walk(built) if (said := deviations_of(type(part)))}
    if own or found:
        yield from ("## Deviations", "")
    if own:
        yield from (own, "")
    for path, (part, said) in found.items():
        yield from (f"**{path}** [`{part.use}`](../parts/{part.kind}.md#{part.use}). {said}", "")


def deviations_of(part: type[Any]) -> str:
    """Return what a docstring says from its first word of deviations on."""
    pieces = DEVIATES.split(prose(part), maxsplit=1)
    return pieces[1].strip() if len(pieces) > 1 else ""


def linked(source: str) -> str:
    """Return a source with its papers as links."""
    return ARXIV.sub(r"[arXiv:\1](https://arxiv.org/abs/\1)", source)
