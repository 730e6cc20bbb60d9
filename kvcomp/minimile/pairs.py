"""The tasks that compare two images: a dozen pairs, of which one is asked for by name."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from random import Random
from typing import ClassVar, NamedTuple

from kvcomp.minimile.base import MiniTask
from kvcomp.minimile.drawing import caption, compose_story, place_things, scaled
from kvcomp.minimile.rendering import CELLS, Thing, draw_scene
from kvcomp.minimile.stories import Item, Question, Story
from kvcomp.minimile.vocabulary import COLOURS, NAMES, SHAPES


class Pair(NamedTuple):
    """What follows a name in a task about pairs.

    Attributes:
        parts: of the context.
        said: what there is to say about it.
        scenes: what its images show, by cell.
    """

    parts: Item
    said: str
    scenes: tuple[Mapping[int, Thing], ...]


class Pairs(MiniTask):
    """A task about pairs of images, a first and a second one, of which one pair is asked for by name."""

    ask: ClassVar[str]
    pairs: ClassVar[int] = 12

    def compose(self, rng: Random, size: float, *, held_out: bool = False, depth: float | None = None) -> Story:
        """Return pairs of images, filler."""
        items: list[Item] = []
        questions: list[Question] = []
        for number, name in enumerate(rng.sample(NAMES, scaled(self.pairs, size))):
            pair = self.pair(rng, 1 if size < 0.1 else 2, held_out=held_out and number == 0)
            items.append((name, *pair.parts))
            questions.append(Question(self.kinds[0], self.ask, name, pair.said, (number,)))
            questions += caption(name, pair.scenes, number)
        return compose_story(rng, items, questions, self.tokens * size, depth)

    @abstractmethod
    def pair(self, rng: Random, things: int, *, held_out: bool) -> Pair:
        """Return one pair whose first image shows this many things."""


class ClevrChange(Pairs):
    """Say which of two things changed its colour or its shape, came or went."""

    name = "mini/clevr_change"
    kinds, ask = ("change",), "change of"
    chance = 1 / 29 * 1 / 8

    def pair(self, rng: Random, things: int, *, held_out: bool) -> Pair:
        """Return the two images and the change."""
        before = place_things(rng, things, held_out=held_out)
        cell, thing = rng.choice(list(before.items()))
        after = dict(before)
        change = rng.choice(("colour", "shape", "gone", "added"))
        if change == "colour":
            colour = rng.choice([colour for colour in COLOURS if colour != thing.colour])
            after[cell], said = Thing(colour, thing.shape), f"{thing} turned {colour}"
        elif change == "shape":
            shape = rng.choice([shape for shape in SHAPES if shape != thing.shape])
            after[cell], said = Thing(thing.colour, shape), f"{thing} turned {shape}"
        else:
            del after[cell]
            said = f"{thing} {change}"
        if change == "added":
            before, after = after, before
        return Pair((draw_scene(rng, before), draw_scene(rng, after)), said, (before, after))


class SpotDiff(Pairs):
    """Say which one or two things are gone or have moved to the free cell, in reading order."""

    name = "mini/spot_diff"
    kinds, ask = ("difference",), "difference of"
    chance = 1 / 29 * 1 / 4

    def pair(self, rng: Random, things: int, *, held_out: bool) -> Pair:
        """Return the two images and the differences."""
        before = place_things(rng, things, held_out=held_out)
        after = dict(before)
        changed = sorted(rng.sample(list(before), rng.randint(1, min(2, things))))
        free = rng.choice([cell for cell in range(CELLS) if cell not in before])
        mover = rng.choice([*changed, None])
        said = []
        for cell in changed:
            thing = after.pop(cell)
            if cell == mover:
                after[free] = thing
            said.append(f"{thing} {'moved' if cell == mover else 'gone'}")
        return Pair((draw_scene(rng, before), draw_scene(rng, after)), " ".join(said), (before, after))


class IEdit(Pairs):
    """Say which edit makes the second image of the first one."""

    name = "mini/iedit"
    kinds, ask = ("edit",), "edit of"
    chance = 1 / 6 * 1 / 2

    def pair(self, rng: Random, things: int, *, held_out: bool) -> Pair:
        """Return the two images and the edit."""
        before = place_things(rng, things, held_out=held_out)
        after, background, radius = dict(before), None, 9
        said = rng.choice(("background", "paint", "remove", "bigger", "smaller", "mirror"))
        if said in ("bigger", "smaller"):
            radius = 12 if said == "bigger" else 6
        elif said == "mirror":
            after = {cell ^ 1: thing for cell, thing in before.items()}  # the columns change places
        elif said == "remove":
            cell, thing = rng.choice(list(before.items()))
            del after[cell]
            said = f"remove {thing}"
        else:
            colour = rng.choice(COLOURS)
            if said == "background":
                background = colour
            else:
                after = {cell: Thing(colour, thing.shape) for cell, thing in before.items()}
            said = f"{said} {colour}"
        images = (draw_scene(rng, before), draw_scene(rng, after, background, radius))
        return Pair(images, said, (before, after))
