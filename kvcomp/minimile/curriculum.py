"""What to show at which stage: one image first, then more items, then the tasks' own lengths, and copies."""

from __future__ import annotations

from random import Random

from kvcomp.minimile.batching import Batch, Row, collate, copy_row, plain_row, recall_row, story_row
from kvcomp.minimile.stories import Question, Recipe, Story, compose, seeded
from kvcomp.minimile.tasks import TASKS
from kvcomp.minimile.vocabulary import DIGITS, NAMES, NOUNS, SPECIALS, WORDS, encode

STAGES = (
    Recipe(images=1, facts=1, codes=1, tokens=24),
    Recipe(images=3, facts=3, codes=1, tokens=60),
    Recipe(images=6, facts=3, codes=1, tokens=110),
    Recipe(images=12, facts=3, codes=1, tokens=180),
)
"""The stage after the last of these is the tasks themselves, at their own lengths."""

FINAL_STAGE = len(STAGES)
NEWEST_SHARE = 0.7
QUESTIONS = 12
COPY_LENGTH = 24
PAIRS = 8
PLAIN_SHARE, LAST_PLAIN_SHARE = 0.5, 0.25


def story_batch(seed: int, step: int, stage: int, budget: int) -> Batch:
    """Return the stories of one step: 70 % from the newest stage, the rest from earlier ones.

    Stories are added until the batch has `budget` tokens.
    """
    rng = seeded("train", seed, step)
    rows: list[Row] = []
    tokens = asked = 0
    share = LAST_PLAIN_SHARE if stage == FINAL_STAGE else PLAIN_SHARE
    while tokens < budget:
        current = stage if rng.random() < NEWEST_SHARE else rng.randint(0, stage)
        story = compose(rng, draw_recipe(rng, current))
        write = plain_row if rng.random() < share else story_row
        rows.append(write(story, choose_questions(rng, story), asked))
        asked += len(rows[-1].kinds)
        tokens += len(rows[-1].ids)
    return collate(rows)


def draw_recipe(rng: Random, stage: int) -> Recipe:
    """Return the size of one story of a stage: up to the stage's own size, at least half of it."""
    if stage == FINAL_STAGE:
        return rng.choice(TASKS).draw_recipe(rng)
    limit = STAGES[stage]
    return Recipe(
        rng.randint((limit.images + 1) // 2, limit.images),
        rng.randint((limit.facts + 1) // 2, limit.facts),
        limit.codes,
        rng.randint(0, limit.tokens),
    )


def choose_questions(rng: Random, story: Story) -> list[Question]:
    """Return up to twelve questions in random order; the rare kind, the code, is always among them."""
    codes = [question for question in story.questions if question.kind == "code"]
    others = [question for question in story.questions if question.kind != "code"]
    chosen = codes + rng.sample(others, min(len(others), QUESTIONS - len(codes)))
    rng.shuffle(chosen)
    return chosen


def copy_batch(seed: int, step: int, copies: int, recalls: int) -> Batch:
    """Return the rotated copies and the shuffled pairs of one step."""
    rng = seeded("copy", seed, step)
    words = range(len(SPECIALS), len(WORDS))
    rows = [copy_row(rng.sample(words, COPY_LENGTH), rng.randrange(COPY_LENGTH), row) for row in range(copies)]
    answers = copies
    for _ in range(recalls):
        rows.append(recall_row(draw_pairs(rng), rng.sample(range(PAIRS), PAIRS), answers))
        answers += PAIRS
    return collate(rows)


def draw_pairs(rng: Random) -> list[tuple[int, list[int]]]:
    """Return names with either one word or four digits each."""
    keys = rng.sample(encode(" ".join(NAMES)), PAIRS)
    if rng.random() < 0.5:
        return [(key, [word]) for key, word in zip(keys, rng.sample(encode(" ".join(NOUNS)), PAIRS), strict=True)]
    return [(key, rng.sample(encode(" ".join(DIGITS)), 4)) for key in keys]
