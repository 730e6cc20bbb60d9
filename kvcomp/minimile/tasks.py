"""The ten tasks and their hard variants. Every task composes a story with many questions; a sample asks one.

Everything that is asked for is named: a city labels each fact, each image and each pair of images, and the answer
repeats what was asked for before it says anything (`colour of lisbon ?`, `lisbon red`).
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from itertools import pairwise
from random import Random
from typing import ClassVar, NamedTuple

from kvcomp.lab.tasks import Sample, Task
from kvcomp.minimile.rendering import (
    CELLS,
    Thing,
    draw_code,
    draw_scene,
    draw_table,
    draw_thing,
    draw_walk,
)
from kvcomp.minimile.stories import Item, Question, Story, assemble, seeded
from kvcomp.minimile.vocabulary import COLOURS, DIGITS, NAMES, SHAPES

HELD_OUT = (Thing("red", "triangle"), Thing("blue", "cross"), Thing("yellow", "circle"))
"""Combinations that are drawn in no split but `held-out`."""
THINGS = tuple(
    thing for thing in (Thing(colour, shape) for colour in COLOURS for shape in SHAPES) if thing not in HELD_OUT
)
DEPTHS = 10
HELD_OUT_SPLIT = "held-out"


class MiniTask(Task):
    """A task whose samples are stories of one shape, asked one question of certain kinds.

    Attributes:
        kinds: of the questions that a sample may ask; a story holds others too, which train the same skills.
        tokens: how long the context is at least, at the reference size.
        grid: whether the item that is asked for stands at each of ten depths in turn.
        chance: how often a guess among the possible answers is right.
    """

    kinds: ClassVar[tuple[str, ...]]
    tokens: ClassVar[int] = 200
    grid: ClassVar[bool] = False
    chance: ClassVar[float]

    @abstractmethod
    def compose(self, rng: Random, size: float, *, held_out: bool = False, depth: float | None = None) -> Story:
        """Return a story.

        Args:
            rng: decides everything else.
            size: of the context relative to the reference, above 0, at most 1.
            held_out: draw a combination of `HELD_OUT` for item 0.
            depth: where item 0 stands; anywhere by default.
        """

    def sample(self, split: str, index: int) -> Sample:
        """Return the sample with this index; name, split and index alone decide it."""
        rng = seeded(self.name, split, index)
        held_out = split == HELD_OUT_SPLIT
        depth = (index % DEPTHS + 0.5) / DEPTHS if self.grid else None
        story = self.compose(rng, rng.uniform(0.5, 1.0) if self.grid else 1.0, held_out=held_out, depth=depth)
        kind = self.kinds[index % len(self.kinds)]
        asked = [question for question in story.questions if question.kind == kind]
        if held_out or self.grid:
            asked = [question for question in asked if 0 in question.items] or asked
        asked = [question for question in asked if not story.answerable_late(question)] or asked
        return story.sample(rng.choice(asked), depth)


class TextNeedle(MiniTask):
    """Repeat the four digits that one of two sentences gave, among images and filler sentences."""

    name = "mini/text_needle"
    kinds = ("number",)
    chance = 1e-4
    grid = True
    facts: ClassVar[int] = 2

    def compose(self, rng: Random, size: float, *, held_out: bool = False, depth: float | None = None) -> Story:
        """Return facts, images and filler."""
        facts = self.facts if size > 0.1 else 1
        names = rng.sample(NAMES, facts + _scaled(6, size))
        items, questions = _facts(rng, names[:facts], 0)
        pictures, asked = _pictures(rng, names[facts:], facts, held_out=False)
        return _story(rng, items + pictures, questions + asked, self.tokens * size, depth)


class TextNeedleHard(TextNeedle):
    """The same with four sentences, whose digits are drawn apart."""

    name = "mini/text_needle_hard"
    facts = 4


class ImageNeedle(MiniTask):
    """Read the four digits shown in a corner of the one image, of thirteen, that shows a code."""

    name = "mini/image_needle"
    kinds = ("code",)
    chance = 1e-4
    grid = True
    codes: ClassVar[int] = 1

    def compose(self, rng: Random, size: float, *, held_out: bool = False, depth: float | None = None) -> Story:
        """Return images with a code, images with a shape, filler."""
        names = rng.sample(NAMES, self.codes + _scaled(12, size))
        items: list[Item] = []
        questions: list[Question] = []
        for number, name in enumerate(names[: self.codes]):
            digits = rng.choices(DIGITS, k=4)
            items.append((name, draw_code(rng, "".join(digits))))
            ask, key = ("", "code") if self.codes == 1 else ("code of", name)
            questions.append(Question(self.kinds[0], ask, key, " ".join(digits), (number,)))
        pictures, asked = _pictures(rng, names[self.codes :], self.codes, held_out=False)
        return _story(rng, items + pictures, questions + asked, self.tokens * size, depth)


class ImageNeedleHard(ImageNeedle):
    """The same with three codes, asked for by the name of the image."""

    name = "mini/image_needle_hard"
    kinds = ("named code",)
    codes = 3


class Recall(MiniTask):
    """Name the colour or the shape in one of twenty images."""

    name = "mini/recall"
    kinds = ("colour", "shape")
    chance = (1 / 8 + 1 / 4) / 2

    def compose(self, rng: Random, size: float, *, held_out: bool = False, depth: float | None = None) -> Story:
        """Return images with one shape each, filler."""
        items, questions = _pictures(rng, rng.sample(NAMES, _scaled(20, size)), 0, held_out=held_out)
        return _story(rng, items, questions, self.tokens * size, depth)


class RecallHard(MiniTask):
    """Name the colour of a shape, or the shape of a colour, in one of sixteen images of three shapes each."""

    name = "mini/recall_hard"
    kinds = ("colour inside", "shape inside")
    chance = (1 / 8 + 1 / 4) / 2

    def compose(self, rng: Random, size: float, *, held_out: bool = False, depth: float | None = None) -> Story:
        """Return images with three shapes each, filler."""
        items: list[Item] = []
        questions: list[Question] = []
        for number, name in enumerate(rng.sample(NAMES, _scaled(16, size))):
            scene = _unlike_things(rng, held_out=held_out and number == 0)
            items.append((name, draw_scene(rng, scene)))
            questions += _captions(name, [scene], number)
            for thing in scene.values():
                inside = f"in {name}"
                questions += [
                    Question("colour inside", "colour of", f"{thing.shape} {inside}", thing.colour, (number,)),
                    Question("shape inside", "shape of", f"{thing.colour} {inside}", thing.shape, (number,)),
                ]
        return _story(rng, items, questions, self.tokens * size, depth)


class Retrieve(MiniTask):
    """Name the image that shows a thing, of nine images of three things each."""

    name = "mini/retrieve"
    kinds = ("name",)
    chance = 1 / 9

    def compose(self, rng: Random, size: float, *, held_out: bool = False, depth: float | None = None) -> Story:
        """Return images of things that are all different, filler."""
        names = rng.sample(NAMES, _scaled(9, size))
        things = iter(_things(rng, 3 * len(names), held_out=held_out))
        items: list[Item] = []
        questions: list[Question] = []
        for number, name in enumerate(names):
            cells = sorted(rng.sample(range(CELLS), 3))
            scene = {cell: next(things) for cell in cells}
            items.append((name, draw_scene(rng, scene)))
            questions += [Question("name", "name of", str(thing), name, (number,)) for thing in scene.values()]
            questions += _captions(name, [scene], number)
        return _story(rng, items, questions, 0.7 * self.tokens * size, depth)


class Order(MiniTask):
    """Name the thing in the image right after, or right before, the one that shows a thing."""

    name = "mini/order"
    kinds = ("after", "before")
    chance = 1 / 29

    def compose(self, rng: Random, size: float, *, held_out: bool = False, depth: float | None = None) -> Story:
        """Return a row of images of things that are all different."""
        names = rng.sample(NAMES, max(2, _scaled(16, size)))
        things = _things(rng, len(names), held_out=held_out)
        items: list[Item] = [(name, draw_thing(rng, thing)) for name, thing in zip(names, things, strict=True)]
        questions = []
        for number, (first, second) in enumerate(pairwise(things)):
            both = (number, number + 1)
            questions += [
                Question("after", "after", str(first), str(second), both),
                Question("before", "before", str(second), str(first), both),
            ]
        return _story(rng, items, questions, 0.7 * self.tokens * size, None, ordered=True)


class MMCoQA(MiniTask):
    """Answer from tables, sentences or images, after two earlier questions with their answers."""

    name = "mini/mmcoqa"
    kinds = ("cell", "number", "colour")
    chance = (1 / 10 + 1e-4 + 1 / 8) / 3

    def compose(self, rng: Random, size: float, *, held_out: bool = False, depth: float | None = None) -> Story:
        """Return images, tables and sentences in random order, then the earlier turns."""
        pictures, tables, facts = _scaled(8, size), _scaled(4, size), _scaled(2, size)
        names = rng.sample(NAMES, pictures + tables + facts)
        items, questions = _pictures(rng, names[:pictures], 0, held_out=held_out)
        told, asked = _facts(rng, names[pictures : pictures + facts], len(items))
        items, questions = items + told, questions + asked
        for name in names[pictures + facts :]:
            cells = dict(zip(rng.sample(COLOURS, CELLS), rng.sample(DIGITS, CELLS), strict=True))
            for colour, digit in cells.items():
                questions.append(Question("cell", "cell", f"{colour} in {name}", digit, (len(items),)))
            items.append((name, draw_table(rng, cells)))
        story = _story(rng, items, questions, 0.85 * self.tokens * size, depth)
        shapes = [question for question in questions if question.kind == "shape"]  # which no sample asks for
        turns = rng.sample(shapes, min(2, len(shapes)))
        history = tuple(f"question {turn.text} answer {turn.answer} ." for turn in turns)
        fresh = tuple(question for question in story.questions if question not in turns)
        return Story((*story.parts, *history), fresh, story.places)


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
        for number, name in enumerate(rng.sample(NAMES, _scaled(self.pairs, size))):
            pair = self.pair(rng, 1 if size < 0.1 else 2, held_out=held_out and number == 0)
            items.append((name, *pair.parts))
            questions.append(Question(self.kinds[0], self.ask, name, pair.said, (number,)))
            questions += _captions(name, pair.scenes, number)
        return _story(rng, items, questions, self.tokens * size, depth)

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
        before = _scene(rng, things, held_out=held_out)
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
        before = _scene(rng, things, held_out=held_out)
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
        before = _scene(rng, things, held_out=held_out)
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


class Alfred(MiniTask):
    """Plan the steps of the agent, a white frame, to a goal in one of sixteen rooms, the horizontal one first."""

    name = "mini/alfred"
    kinds = ("plan",)
    chance = 1 / 8

    def compose(self, rng: Random, size: float, *, held_out: bool = False, depth: float | None = None) -> Story:
        """Return rooms of three things and the agent, filler."""
        items: list[Item] = []
        questions: list[Question] = []
        for number, name in enumerate(rng.sample(NAMES, _scaled(16, size))):
            room = _scene(rng, 1 if size < 0.1 else 3, held_out=held_out and number == 0)
            agent = rng.choice([cell for cell in range(CELLS) if cell not in room])
            items.append((name, draw_walk(rng, agent, room)))
            questions += [
                Question("plan", "plan of", f"{thing} in {name}", _steps(agent, cell), (number,))
                for cell, thing in room.items()
            ]
            questions += _captions(name, [room], number)
        return _story(rng, items, questions, self.tokens * size, depth)


TASKS: tuple[MiniTask, ...] = (
    TextNeedle(),
    ImageNeedle(),
    Recall(),
    Retrieve(),
    MMCoQA(),
    ClevrChange(),
    SpotDiff(),
    IEdit(),
    Alfred(),
    Order(),
)
"""The ten tasks, in the order of their tables."""
HARD_TASKS: tuple[MiniTask, ...] = (TextNeedleHard(), ImageNeedleHard(), RecallHard())


def _scaled(most: int, size: float) -> int:
    return max(1, round(most * size))


def _story(
    rng: Random,
    items: Sequence[Item],
    questions: Sequence[Question],
    tokens: float,
    depth: float | None,
    *,
    ordered: bool = False,
) -> Story:
    needle = None if depth is None else (0, depth)
    return assemble(rng, items, questions, tokens=round(tokens), ordered=ordered, needle=needle)


def _facts(rng: Random, names: Sequence[str], start: int) -> tuple[list[Item], list[Question]]:
    """Return a sentence with four digits for each name; no digit occurs twice in two of them."""
    digits = [digit for _ in range(0, len(names), 2) for digit in rng.sample(DIGITS, 8)]
    items: list[Item] = []
    questions = []
    for number, name in enumerate(names):
        value = " ".join(digits[4 * number : 4 * number + 4])
        items.append((f"number of {name} {value} .",))
        questions.append(Question("number", "number of", name, value, (start + number,)))
    return items, questions


def _pictures(rng: Random, names: Sequence[str], start: int, *, held_out: bool) -> tuple[list[Item], list[Question]]:
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


def _things(rng: Random, count: int, *, held_out: bool) -> list[Thing]:
    """Return things that are all different, with `held_out` one of `HELD_OUT` first."""
    things = rng.sample(THINGS, count)
    return [rng.choice(HELD_OUT), *things[1:]] if held_out else things


def _steps(agent: int, goal: int) -> str:
    """Return the steps from one cell to another, the horizontal one first."""
    steps = []
    if goal % 2 != agent % 2:
        steps.append("right" if goal % 2 else "left")
    if goal // 2 != agent // 2:
        steps.append("down" if goal // 2 else "up")
    return " ".join(steps)


def _captions(name: str, scenes: Sequence[Mapping[int, Thing]], item: int) -> list[Question]:
    """Return questions after the things in an image, in reading order, which only a training asks."""
    asks = ("first of", "next of")
    shown = [" ".join(str(scene[cell]) for cell in sorted(scene)) for scene in scenes]
    return [Question("caption", ask, name, value, (item,)) for ask, value in zip(asks, shown, strict=False)]


def _scene(rng: Random, count: int, *, held_out: bool) -> dict[int, Thing]:
    """Return different things in different cells, cells ascending."""
    cells = rng.sample(range(CELLS), count)
    return dict(sorted(zip(cells, _things(rng, count, held_out=held_out), strict=True)))


def _unlike_things(rng: Random, *, held_out: bool) -> dict[int, Thing]:
    """Return a scene of three things that share neither a colour nor a shape."""
    while True:
        scene = _scene(rng, 3, held_out=held_out)
        if len({thing.colour for thing in scene.values()}) == len({thing.shape for thing in scene.values()}) == 3:
            return scene


def _spread(rng: Random, values: tuple[str, ...], count: int) -> list[str]:
    """Return a random sequence in which every value occurs equally often, give or take one."""
    bag: list[str] = []
    while len(bag) < count:
        bag += rng.sample(values, len(values))
    return bag[:count]
