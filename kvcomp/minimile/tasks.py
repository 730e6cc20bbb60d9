"""The ten tasks and their hard variants. Every task composes a story with many questions; a sample asks one.

Everything that is asked for is named: a city labels each fact, each image and each pair of images, and the answer
repeats what was asked for before it says anything (`colour of lisbon ?`, `lisbon red`).
"""

from __future__ import annotations

from itertools import pairwise
from random import Random
from typing import ClassVar

from kvcomp.minimile.base import MiniTask
from kvcomp.minimile.drawing import (
    HELD_OUT,
    caption,
    compose_story,
    draw_facts,
    draw_pictures,
    draw_things,
    place_things,
    place_unlike_things,
    scaled,
)
from kvcomp.minimile.pairs import ClevrChange, IEdit, SpotDiff
from kvcomp.minimile.rendering import CELLS, draw_code, draw_scene, draw_table, draw_thing, draw_walk
from kvcomp.minimile.stories import Item, Question, Story
from kvcomp.minimile.vocabulary import COLOURS, DIGITS, NAMES


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
        names = rng.sample(NAMES, facts + scaled(6, size))
        items, questions = draw_facts(rng, names[:facts], 0)
        pictures, asked = draw_pictures(rng, names[facts:], facts, held_out=False)
        return compose_story(rng, items + pictures, questions + asked, self.tokens * size, depth)


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
        names = rng.sample(NAMES, self.codes + scaled(12, size))
        items: list[Item] = []
        questions: list[Question] = []
        for number, name in enumerate(names[: self.codes]):
            digits = rng.choices(DIGITS, k=4)
            items.append((name, draw_code(rng, "".join(digits))))
            ask, key = ("", "code") if self.codes == 1 else ("code of", name)
            questions.append(Question(self.kinds[0], ask, key, " ".join(digits), (number,)))
        pictures, asked = draw_pictures(rng, names[self.codes :], self.codes, held_out=False)
        return compose_story(rng, items + pictures, questions + asked, self.tokens * size, depth)


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
        items, questions = draw_pictures(rng, rng.sample(NAMES, scaled(20, size)), 0, held_out=held_out)
        return compose_story(rng, items, questions, self.tokens * size, depth)


class RecallHard(MiniTask):
    """Name the colour of a shape, or the shape of a colour, in one of sixteen images of three shapes each."""

    name = "mini/recall_hard"
    kinds = ("colour inside", "shape inside")
    chance = (1 / 8 + 1 / 4) / 2

    def compose(self, rng: Random, size: float, *, held_out: bool = False, depth: float | None = None) -> Story:
        """Return images with three shapes each, filler."""
        items: list[Item] = []
        questions: list[Question] = []
        for number, name in enumerate(rng.sample(NAMES, scaled(16, size))):
            scene = place_unlike_things(rng, held_out=held_out and number == 0)
            items.append((name, draw_scene(rng, scene)))
            questions += caption(name, [scene], number)
            for thing in scene.values():
                inside = f"in {name}"
                questions += [
                    Question("colour inside", "colour of", f"{thing.shape} {inside}", thing.colour, (number,)),
                    Question("shape inside", "shape of", f"{thing.colour} {inside}", thing.shape, (number,)),
                ]
        return compose_story(rng, items, questions, self.tokens * size, depth)


class Retrieve(MiniTask):
    """Name the image that shows a thing, of nine images of three things each."""

    name = "mini/retrieve"
    kinds = ("name",)
    chance = 1 / 9

    def compose(self, rng: Random, size: float, *, held_out: bool = False, depth: float | None = None) -> Story:
        """Return images of things that are all different, filler."""
        names = rng.sample(NAMES, scaled(9, size))
        first = rng.sample(HELD_OUT, 3) if held_out else []
        things = iter([*first, *draw_things(rng, 3 * len(names) - len(first), held_out=False)])
        items: list[Item] = []
        questions: list[Question] = []
        for number, name in enumerate(names):
            cells = sorted(rng.sample(range(CELLS), 3))
            scene = {cell: next(things) for cell in cells}
            items.append((name, draw_scene(rng, scene)))
            questions += [Question("name", "name of", str(thing), name, (number,)) for thing in scene.values()]
            questions += caption(name, [scene], number)
        return compose_story(rng, items, questions, 0.7 * self.tokens * size, depth)


class Order(MiniTask):
    """Name the thing in the image right after, or right before, the one that shows a thing."""

    name = "mini/order"
    kinds = ("after", "before")
    chance = 1 / 29

    def compose(self, rng: Random, size: float, *, held_out: bool = False, depth: float | None = None) -> Story:
        """Return a row of images of things that are all different."""
        names = rng.sample(NAMES, max(2, scaled(16, size)))
        things = draw_things(rng, len(names), held_out=held_out)
        items: list[Item] = [(name, draw_thing(rng, thing)) for name, thing in zip(names, things, strict=True)]
        questions = []
        for number, (first, second) in enumerate(pairwise(things)):
            both = (number, number + 1)
            questions += [
                Question("after", "after", str(first), str(second), both),
                Question("before", "before", str(second), str(first), both),
            ]
        return compose_story(rng, items, questions, 0.7 * self.tokens * size, None, ordered=True)


class MMCoQA(MiniTask):
    """Answer from tables, sentences or images, after two earlier questions with their answers."""

    name = "mini/mmcoqa"
    kinds = ("cell", "number", "colour")
    chance = (1 / 10 + 1e-4 + 1 / 8) / 3

    def compose(self, rng: Random, size: float, *, held_out: bool = False, depth: float | None = None) -> Story:
        """Return images, tables and sentences in random order, then the earlier turns."""
        pictures, tables, facts = scaled(8, size), scaled(4, size), scaled(2, size)
        names = rng.sample(NAMES, pictures + tables + facts)
        items, questions = draw_pictures(rng, names[:pictures], 0, held_out=held_out)
        told, asked = draw_facts(rng, names[pictures : pictures + facts], len(items))
        items, questions = items + told, questions + asked
        for name in names[pictures + facts :]:
            cells = dict(zip(rng.sample(COLOURS, CELLS), rng.sample(DIGITS, CELLS), strict=True))
            for colour, digit in cells.items():
                questions.append(Question("cell", "cell", f"{colour} in {name}", digit, (len(items),)))
            items.append((name, draw_table(rng, cells)))
        story = compose_story(rng, items, questions, 0.85 * self.tokens * size, depth)
        shapes = [question for question in questions if question.kind == "shape"]  # which no sample asks for
        turns = rng.sample(shapes, min(2, len(shapes)))
        history = tuple(f"question {turn.text} answer {turn.answer} ." for turn in turns)
        fresh = tuple(question for question in story.questions if question not in turns)
        return Story((*story.parts, *history), fresh, story.places)


class Alfred(MiniTask):
    """Plan the steps of the agent, a white frame, to a goal in one of sixteen rooms, the horizontal one first."""

    name = "mini/alfred"
    kinds = ("plan",)
    chance = 1 / 8

    def compose(self, rng: Random, size: float, *, held_out: bool = False, depth: float | None = None) -> Story:
        """Return rooms of three things and the agent, filler."""
        items: list[Item] = []
        questions: list[Question] = []
        for number, name in enumerate(rng.sample(NAMES, scaled(16, size))):
            room = place_things(rng, 1 if size < 0.1 else 3, held_out=held_out and number == 0)
            agent = rng.choice([cell for cell in range(CELLS) if cell not in room])
            items.append((name, draw_walk(rng, agent, room)))
            questions += [
                Question("plan", "plan of", f"{thing} in {name}", _steps(agent, cell), (number,))
                for cell, thing in room.items()
            ]
            questions += caption(name, [room], number)
        return compose_story(rng, items, questions, self.tokens * size, depth)


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


def _steps(agent: int, goal: int) -> str:
    """Return the steps from one cell to another, the horizontal one first."""
    steps = []
    if goal % 2 != agent % 2:
        steps.append("right" if goal % 2 else "left")
    if goal // 2 != agent // 2:
        steps.append("down" if goal // 2 else "up")
    return " ".join(steps)
