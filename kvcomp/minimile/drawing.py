"""Draw what the tasks of MiniMile tell and show: facts, things, scenes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from random import Random

from kvcomp.minimile.rendering import CELLS, Thing, draw_thing
from kvcomp.minimile.stories import Item, Question, Story, assemble
from kvcomp.minimile.vocabulary import COLOURS, DIGITS, SHAPES

HELD_OUT = (Thing("red", "triangle"), Thing("blue", "cross"), Thing("yellow", "circle"))
"""Combinations that are drawn in no split but `held-out`."""
THINGS = tuple(
    thing for thing in (Thing(colour, shape) for colour in COLOURS for shape in SHAPES) if thing not in HELD_OUT
)


def scaled(most: int, size: float) -> int:
    """Return how many things a story of this relative size holds, at least one."""
    return max(1, round(most * size))


def compose_story(
    rng: Random,
    items: Sequence[Item],
    questions: Sequence[Question],
    tokens: float,
    depth: float | None,
    *,
    ordered: bool = False,
) -> Story:
    """Return a story of at least this many tokens.

    Args:
        rng: decides what filler is used, and where.
        items: the parts that stand together.
        questions: about them.
        tokens: how long the context is at least.
        depth: where the first item stands, from 0 to 1; anywhere by default.
        ordered: whether the items stand in their own order.
    """
    needle = None if depth is None else (0, depth)
    return assemble(rng, items, questions, tokens=round(tokens), ordered=ordered, needle=needle)


def draw_facts(rng: Random, names: Sequence[str], start: int) -> tuple[list[Item], list[Question]]:
    """Return a sentence with four digits for each name; no digit occurs twice in two of them."""
    digits = [digit for _ in range(0, len(names), 2) for digit in rng.sample(DIGITS, 8)]
    items: list[Item] = []
    questions = []
    for number, name in enumerate(names):
        value = " ".join(digits[4 * number : 4 * number + 4])
        items.append((f"number of {name} {value} .",))
        questions.append(Question("number", "number of", name, value, (start + number,)))
    return items, questions


def draw_pictures(
    rng: Random, names: Sequence[str], start: int, *, held_out: bool
) -> tuple[list[Item], list[Question]]:
    """Return an image of one thing for each name; colours and shapes occur equally often, give or take one."""
    things = [
        Thing(*look) for look in zip(_spread(rng, COLOURS, len(names)), _spread(rng, SHAPES, len(names)), strict=True)
    ]
    things = [rng.choice(THINGS) if thing in HELD_OUT else thing for thing in things]
    if held_out:
        things[0] = rng.choice(HELD_OUT)
    items: list[Item] = []
    questions = []
    for number, (name, thing) in enumerate(zip(names, things, strict=True)):
        items.append((name, draw_thing(rng, thing)))
        questions += [
            Question("colour", "colour of", name, thing.colour, (start + number,)),
            Question("shape", "shape of", name, thing.shape, (start + number,)),
        ]
    return items, questions


def draw_things(rng: Random, count: int, *, held_out: bool) -> list[Thing]:
    """Return things that are all different, with `held_out` one of `HELD_OUT` first."""
    things = rng.sample(THINGS, count)
    return [rng.choice(HELD_OUT), *things[1:]] if held_out else things


def caption(name: str, scenes: Sequence[Mapping[int, Thing]], item: int) -> list[Question]:
    """Return questions after the things in an image, in reading order, which only a training asks."""
    asks = ("first of", "next of")
    shown = [" ".join(str(scene[cell]) for cell in sorted(scene)) for scene in scenes]
    return [Question("caption", ask, name, value, (item,)) for ask, value in zip(asks, shown, strict=False)]


def place_things(rng: Random, count: int, *, held_out: bool) -> dict[int, Thing]:
    """Return different things in different cells, cells ascending."""
    cells = rng.sample(range(CELLS), count)
    return dict(sorted(zip(cells, draw_things(rng, count, held_out=held_out), strict=True)))


def place_unlike_things(rng: Random, *, held_out: bool) -> dict[int, Thing]:
    """Return a scene of three things that share neither a colour nor a shape."""
    while True:
        scene = place_things(rng, 3, held_out=held_out)
        if len({thing.colour for thing in scene.values()}) == len({thing.shape for thing in scene.values()}) == 3:
            return scene


def _spread(rng: Random, values: tuple[str, ...], count: int) -> list[str]:
    """Return a random sequence in which every value occurs equally often, give or take one."""
    bag: list[str] = []
    while len(bag) < count:
        bag += rng.sample(values, len(values))
    return bag[:count]
