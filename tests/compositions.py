"""Random compositions of all registered parts: which of them a strategy accepts, and why it refuses the others."""

from __future__ import annotations

import random
from functools import cache
from typing import Any

import kvcomp
from kvcomp.core.config import PART_KEYS
from kvcomp.core.registry import registry

ACCEPTED = 160
STORES: dict[str, tuple[dict[str, Any], ...]] = {  # of stores that shrink, small enough for a prompt of a test
    "quantized": ({"bits": 2, "group": 4, "residual": 8}, {"bits": 8, "window": "block", "rank": 2}, {"evict": True}),
    "mixed": ({"bits": 2, "recent": 4}, {"bits": 4, "important_bits": 8}, {"evict": True}),
}
SETTINGS: dict[str, tuple[Any, ...]] = {
    "budget": (0.05, 0.3, 0.6, 1.0, {"tokens": 12}),
    "trigger": ("prefill-end", "over-budget", {"every": 3}),
    "turns": ("recompress", "append"),
    "mass_preserving": (False, True),
}
ABSENT = {"selector": 0.1, "scorer": 0.05}  # how often a part is left out that a recipe may do without


@cache
def compositions() -> tuple[list[kvcomp.Strategy], list[tuple[dict[str, Any], str]]]:
    """Return strategies that were accepted, and documents that were refused with the message, in the order drawn."""
    dice, accepted, refused = random.Random(0), [], []
    while len(accepted) < ACCEPTED:
        document = _document(dice)
        try:
            accepted.append(kvcomp.strategy(document))
        except kvcomp.ConfigError as error:
            refused.append((document, str(error)))
    return accepted, refused


def _document(dice: random.Random) -> dict[str, Any]:
    document = {name: dice.choice(values) for name, values in SETTINGS.items()}
    for kind in PART_KEYS:
        document[kind] = None if dice.random() < ABSENT.get(kind, 0.0) else _part(kind, dice)
    return document


def _part(kind: str, dice: random.Random, inner: bool = False) -> dict[str, Any]:
    """Return a part with parts inside it where it holds any, but none deeper than that."""
    entries = [entry for entry in registry.entries(kind) if not (inner and entry.value.part_fields())]
    entry = dice.choice(entries)
    part = {"use": entry.name, **dice.choice(STORES.get(entry.name, ({},)))}
    return part | {name: _part(interface.kind, dice, True) for name, interface in entry.value.part_fields().items()}
