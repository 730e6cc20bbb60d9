"""What the tasks of MiniMile have in common."""

from __future__ import annotations

from abc import abstractmethod
from random import Random
from typing import ClassVar

from kvcomp.lab.tasks import Sample, Task
from kvcomp.minimile.stories import Story, seeded

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
