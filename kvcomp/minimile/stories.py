"""Compose a context of labelled images, facts and filler, with every question that can be asked of it."""

from __future__ import annotations

from dataclasses import dataclass
from hashlib import sha256
from random import Random
from typing import NamedTuple

from PIL import Image

from kvcomp.lab.tasks import Part
from kvcomp.minimile.rendering import draw_code, draw_shape
from kvcomp.minimile.vocabulary import ADJECTIVES, COLOURS, DIGITS, NAMES, NOUNS, SHAPES, VERBS

VERSION = "minimile-1"
IMAGE_TOKENS = 6
"""Four visual tokens between the start and the end mark."""
FACT_DIGITS = 3


class Question(NamedTuple):
    """A question, its whole answer, and what kind it is (`colour`, `shape`, `number`, `code`)."""

    kind: str
    text: str
    answer: str

    @property
    def value(self) -> str:
        """The answer without its lead and without the name that it repeats."""
        words = self.answer.split()
        return " ".join(words[2:] if self.kind == "code" else words[3:])


@dataclass(frozen=True)
class Recipe:
    """How much of everything goes into a context, and how many tokens it has at least."""

    images: int
    facts: int
    codes: int = 0
    tokens: int = 0


@dataclass(frozen=True)
class Story:
    """A context and its questions."""

    parts: tuple[Part, ...]
    questions: tuple[Question, ...]


def seeded(*names: object) -> Random:
    """Return a generator that depends on these names only: different names never share a seed."""
    text = "/".join(map(str, (VERSION, *names)))
    return Random(int.from_bytes(sha256(text.encode()).digest()))


def compose(rng: Random, recipe: Recipe) -> Story:
    """Return a story: its items in random order, filler sentences in random gaps."""
    names = rng.sample(NAMES, recipe.images + recipe.facts + recipe.codes)
    colours, shapes = _spread(rng, COLOURS, recipe.images), _spread(rng, SHAPES, recipe.images)
    items: list[tuple[tuple[Part, ...], list[Question]]] = []
    items += [_picture(rng, names.pop(), *look) for look in zip(colours, shapes, strict=True)]
    items += [_fact(names.pop(), digits) for digits in _numbers(rng, recipe.facts)]
    items += [_code(rng, names.pop()) for _ in range(recipe.codes)]
    questions = tuple(question for _, asked in items for question in asked)
    chunks = [parts for parts, _ in items]
    chunks += _filler(rng, recipe.tokens - sum(map(count_tokens, chunks)))
    rng.shuffle(chunks)
    return Story(tuple(part for chunk in chunks for part in chunk), questions)


def count_tokens(parts: tuple[Part, ...]) -> int:
    """Return how many tokens these parts become."""
    return sum(IMAGE_TOKENS if isinstance(part, Image.Image) else len(part.split()) for part in parts)


def _spread(rng: Random, values: tuple[str, ...], count: int) -> list[str]:
    """Return a random sequence in which every value occurs equally often, give or take one."""
    bag: list[str] = []
    while len(bag) < count:
        bag += rng.sample(values, len(values))
    return bag[:count]


def _numbers(rng: Random, count: int) -> list[str]:
    """Return numbers of three digits, no digit twice, so that each digit but the first follows from the last one."""
    digits = rng.sample(DIGITS, FACT_DIGITS * count)
    return [" ".join(digits[start : start + FACT_DIGITS]) for start in range(0, len(digits), FACT_DIGITS)]


def _picture(rng: Random, name: str, colour: str, shape: str) -> tuple[tuple[Part, ...], list[Question]]:
    asked = [
        Question("colour", f"colour of {name} ?", f"answer : {name} {colour}"),
        Question("shape", f"shape of {name} ?", f"answer : {name} {shape}"),
    ]
    return (name, draw_shape(rng, colour, shape)), asked


def _fact(name: str, digits: str) -> tuple[tuple[Part, ...], list[Question]]:
    asked = Question("number", f"number of {name} ?", f"answer : {name} {digits}")
    return (f"number of {name} {digits} .",), [asked]


def _code(rng: Random, name: str) -> tuple[tuple[Part, ...], list[Question]]:
    digits = rng.choices(DIGITS, k=4)
    image = draw_code(rng, "".join(digits))
    return (name, image), [Question("code", "code of image ?", f"answer : {' '.join(digits)}")]


def _filler(rng: Random, tokens: int) -> list[tuple[Part, ...]]:
    sentences: list[tuple[Part, ...]] = []
    while tokens > 0:
        subject, thing = rng.sample(NOUNS, 2)
        first, second = rng.sample(ADJECTIVES, 2)
        sentences.append((f"the {first} {subject} {rng.choice(VERBS)} the {second} {thing} .",))
        tokens -= 8
    return sentences
