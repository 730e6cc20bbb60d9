"""What to show at which point of a training: small contexts first, one task after the other, drills until they are
learned.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from random import Random

from kvcomp.minimile.base import MiniTask
from kvcomp.minimile.batching import (
    COPY,
    PAIRS,
    Batch,
    Drill,
    Row,
    collate,
    copy_drill,
    open_row,
    pairs_drill,
    write_plain_row,
    write_row,
)
from kvcomp.minimile.stories import Question, Story, seeded
from kvcomp.minimile.tasks import HARD_TASKS, TASKS
from kvcomp.minimile.vocabulary import DIGITS, NAMES, NOUNS, SPECIALS, WORDS, encode

SIZES = (0.05, 0.15, 0.4, 1.0)
"""Of the contexts, relative to the tasks' own, level by level."""
FINAL_LEVEL = len(SIZES) - 1
PASS, LEARNED = 0.85, 0.97
"""A level is passed, and a task learned, when the running share of right answers reaches this."""
FIRST_TASKS = ("mini/recall", "mini/text_needle", "mini/image_needle")
BINDING_TASKS = FIRST_TASKS[:2]
"""The others, and the frame of a chat, wait until these have passed their second level: they rest on binding a name
to what it names.
"""
HARD_AFTER = {
    "mini/text_needle_hard": "mini/text_needle",
    "mini/recall_hard": "mini/recall",
}
NEWEST_SHARE = 0.7
QUESTIONS, OTHER_QUESTIONS = 10, 2
COPY_LENGTH = 24
COPY_SHARE = 0.75
PAIR_COUNT = 8
MEMORY = 0.95
FRAMED_SHARE = 0.6
"""How many of the steps ask as a chat does, once the first tasks have bound names to what they name."""
OFTEN_DRILLS, RARE_DRILLS = 0.25, 0.05
IDLE_WEIGHT = 0.2
EARLIER = "earlier"
"""What the kinds of rows below a task's newest level begin with."""
DRILLED = 0.9
"""Drills are learned when this share of their tokens is right."""
DRILL_ROWS = 0.5
"""The share of a step's tokens that stands in rows of copies or pairs alone, until drills are learned."""


@dataclass
class Course:
    """Where a training stands in the curriculum.

    Attributes:
        levels: how far each task has come; a task that has not begun is missing.
        steps: how many steps each task has had at its level.
        right: the running share of right answers by kind, `TASK KIND` for the newest level of a task.
    """

    levels: dict[str, int] = field(default_factory=lambda: dict.fromkeys(FIRST_TASKS, 0))
    steps: dict[str, int] = field(default_factory=dict)
    right: dict[str, float] = field(default_factory=dict)

    def share(self, task: MiniTask) -> float:
        """Return the smallest share of right answers among the task's own kinds of question."""
        return min(self.right.get(f"{task.name} {kind}", 0.0) for kind in task.kinds)

    def learned(self, task: MiniTask) -> bool:
        """Return whether a task is learned at its own size."""
        return self.levels.get(task.name) == FINAL_LEVEL and self.share(task) >= LEARNED

    @property
    def bound(self) -> bool:
        """Return whether names are bound to what they name."""
        return all(self.levels[name] >= 2 for name in BINDING_TASKS)

    @property
    def drilled(self) -> bool:
        """Return whether copies and pairs are learned."""
        return min(self.right.get(COPY, 0.0), self.right.get(PAIRS, 0.0)) >= DRILLED

    @property
    def finished(self) -> bool:
        """Return whether every task is learned at its own size."""
        return all(map(self.learned, (*TASKS, *HARD_TASKS)))

    def draw_task(self, rng: Random, level: int | None = None) -> MiniTask:
        """Return a task that has not learned all yet more often than one that has.

        Args:
            rng: decides.
            level: only tasks that have come to this level, and those that are beyond it as rarely as learned ones.
        """
        tasks = [task for task in (*TASKS, *HARD_TASKS) if self.levels.get(task.name, -1) >= (level or 0)]
        busy = [level in (None, self.levels[task.name]) and not self.learned(task) for task in tasks]
        return rng.choices(tasks, [1.0 if wanted else IDLE_WEIGHT for wanted in busy])[0]

    def remember(self, shares: dict[str, float]) -> None:
        """Take in the shares of right answers of one step."""
        for kind, share in shares.items():
            self.right[kind] = MEMORY * self.right.get(kind, 0.0) + (1 - MEMORY) * share
            task = kind.split()[0]
            self.steps[task] = self.steps.get(task, 0) + 1

    def advance(self) -> None:
        """Let tasks go on to their next level, and new tasks begin."""
        for task in (*TASKS, *HARD_TASKS):
            level = self.levels.get(task.name)
            if level is None:
                if self.bound and self._may_begin(task):
                    self.levels[task.name] = 0
            elif level < FINAL_LEVEL and self.share(task) >= PASS and self.steps.get(task.name, 0) >= 40:
                self.levels[task.name] += 1
                self.steps[task.name] = 0

    def _may_begin(self, task: MiniTask) -> bool:
        easier = HARD_AFTER.get(task.name)
        return easier is None or self.levels.get(easier) == FINAL_LEVEL


def draw_batch(seed: int, step: int, course: Course, budget: int) -> Batch:
    """Return the rows of one step: about `budget` tokens. All rows are of one level, have the frame or none, and have
    drills or none, so that they are of much the same length.
    """
    rng = seeded("train", seed, step)
    write = write_row if course.bound and rng.random() < FRAMED_SHARE else write_plain_row
    drilled = course.drilled and rng.random() < (RARE_DRILLS if course.bound else OFTEN_DRILLS)
    newest = course.levels[course.draw_task(rng).name]
    level = newest if rng.random() < NEWEST_SHARE else rng.randint(0, newest)
    rows: list[Row] = []
    for _ in range(0 if course.drilled else int(DRILL_ROWS * budget / (2 * COPY_LENGTH))):
        rows.append(open_row([_draw_copy(rng) if rng.random() < COPY_SHARE else _draw_pairs(rng)]))
    budget -= sum(len(row.ids) for row in rows)
    while budget > 0:
        task = course.draw_task(rng, level)
        story = task.compose(rng, SIZES[level])
        drills = [_draw_copy(rng), _draw_pairs(rng)] if drilled else []
        rng.shuffle(drills)
        label = task.name if level == course.levels[task.name] else EARLIER
        rows.append(write(story, choose_questions(rng, story, task.kinds), label, drills))
        budget -= len(rows[-1].ids)
    return collate(rows)


def choose_questions(rng: Random, story: Story, kinds: tuple[str, ...]) -> list[Question]:
    """Return up to ten questions of the given kinds, or those and up to two others, in random order."""
    own = [question for question in story.questions if question.kind in kinds]
    others = [question for question in story.questions if question.kind not in kinds]
    chosen = rng.sample(own, min(len(own), QUESTIONS))
    chosen += rng.sample(others, min(len(others), OTHER_QUESTIONS, QUESTIONS - len(chosen)))
    rng.shuffle(chosen)
    return chosen


def _draw_copy(rng: Random) -> Drill:
    words = range(len(SPECIALS), len(WORDS))
    return copy_drill(rng.sample(words, COPY_LENGTH), rng.randrange(COPY_LENGTH))


def _draw_pairs(rng: Random) -> Drill:
    keys, order = rng.sample(encode(" ".join(NAMES)), PAIR_COUNT), rng.sample(range(PAIR_COUNT), PAIR_COUNT)
    if rng.random() < 0.5:
        nouns = rng.sample(encode(" ".join(NOUNS)), PAIR_COUNT)
        return pairs_drill([(key, [noun]) for key, noun in zip(keys, nouns, strict=True)], order)
    return pairs_drill([(key, rng.sample(encode(" ".join(DIGITS)), 4)) for key in keys], order)
