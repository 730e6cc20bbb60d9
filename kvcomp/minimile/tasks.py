"""The three tasks that `minimile-xs` is trained for: text needle, image recall, image needle."""

from __future__ import annotations

from random import Random
from typing import ClassVar

from kvcomp.lab.tasks import Sample, Task
from kvcomp.minimile.stories import Recipe, compose, seeded


class MiniTask(Task):
    """A task whose samples are stories of one shape, asked one question of certain kinds."""

    images: ClassVar[int]
    facts: ClassVar[int]
    codes: ClassVar[int]
    kinds: ClassVar[tuple[str, ...]]

    def sample(self, split: str, index: int) -> Sample:
        """Return the sample with this index; name, split and index alone decide it."""
        rng = seeded(self.name, split, index)
        story = compose(rng, self.draw_recipe(rng))
        kind = self.kinds[index % len(self.kinds)]
        question = rng.choice([question for question in story.questions if question.kind == kind])
        return Sample(story.parts, question.text, question.answer)

    def draw_recipe(self, rng: Random) -> Recipe:
        """Return the size of one story: fixed counts, 255 to 310 context tokens."""
        return Recipe(self.images, self.facts, self.codes, rng.randint(255, 310))


class TextNeedle(MiniTask):
    """Repeat the three digits that one of three sentences gave, among images and filler sentences."""

    name = "mini/text-needle"
    images, facts, codes, kinds = 10, 3, 0, ("number",)


class ImageRecall(MiniTask):
    """Name the colour or the shape in one of sixteen labelled images."""

    name = "mini/image-recall"
    images, facts, codes, kinds = 16, 2, 0, ("colour", "shape")


class ImageNeedle(MiniTask):
    """Read the four digits shown by the one image of thirteen that shows a code."""

    name = "mini/image-needle"
    images, facts, codes, kinds = 12, 2, 1, ("code",)


TASKS: tuple[MiniTask, ...] = (TextNeedle(), ImageRecall(), ImageNeedle())
