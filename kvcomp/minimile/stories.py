"""Compose a context of items, text and labelled images, with every question that can be asked of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256
from random import Random
from typing import NamedTuple

from PIL import Image

from kvcomp.lab.tasks import Part, Sample, Span
from kvcomp.minimile.vocabulary import ADJECTIVES, NOUNS, VERBS

VERSION = "minimile-2"
IMAGE_TOKENS = 6
"""Four visual tokens between the start and the end mark."""
TAIL = 24
"""So many tokens of context follow what a sample asks for: else the last slots alone would answer it."""


class Question(NamedTuple):
    """What is asked of a key, and its value: `colour of` `lisbon`, `red`.

    Attributes:
        kind: what is asked, for the running accuracies of a training.
        ask: the words before the key.
        key: what is asked for; the answer repeats it, so that its first token carries nothing.
        value: the words that the answer is about.
        items: the numbers of the items that it rests on.
    """

    kind: str
    ask: str
    key: str
    value: str
    items: tuple[int, ...]

    @property
    def text(self) -> str:
        """The question in words."""
        return f"{self.ask} {self.key} ?".strip()

    @property
    def answer(self) -> str:
        """The whole answer."""
        return f"{self.key} {self.value}"


Item = tuple[Part, ...]


@dataclass(frozen=True)
class Story:
    """A context and its questions.

    Attributes:
        parts: text and images in the order in which the model reads them.
        questions: all that can be asked.
        places: for each item, the number of its first part and the one after its last.
    """

    parts: tuple[Part, ...]
    questions: tuple[Question, ...]
    places: tuple[tuple[int, int], ...]

    def answerable_late(self, question: Question) -> bool:
        """Return whether what a question rests on stands so near to the end that the latest tokens answer it."""
        end = max(self.places[item][1] for item in question.items)
        return count_tokens(self.parts[end:]) < TAIL

    def sample(self, question: Question, depth: float | None = None) -> Sample:
        """Return the sample that asks one question."""
        evidence = tuple(Span(part) for item in question.items for part in range(*self.places[item]))
        key = len(question.key.split())
        slots = tuple(range(key, key + len(question.value.split())))
        return Sample(self.parts, question.text, question.answer, evidence, slots, depth)


def seeded(*names: object) -> Random:
    """Return a generator that depends on these names only: different names never share a seed."""
    text = "/".join(map(str, (VERSION, *names)))
    return Random(int.from_bytes(sha256(text.encode()).digest()))


def assemble(
    rng: Random,
    items: Sequence[Item],
    questions: Sequence[Question],
    *,
    tokens: int = 0,
    ordered: bool = False,
    needle: tuple[int, float] | None = None,
) -> Story:
    """Return the story of these items with filler sentences between them.

    Args:
        rng: decides the order.
        items: each stays together.
        questions: about the items, by their numbers in `items`.
        tokens: how many the context has at least.
        ordered: keep the items in order and after one another; filler then comes before and after.
        needle: an item and how deep it stands among the others, from 0 to 1, but never in the tail.
    """
    filler = [(None, sentence) for sentence in _filler(rng, tokens - sum(map(count_tokens, items)))]
    numbered: list[tuple[int | None, Item]] = list(enumerate(items))
    if ordered:
        cut = rng.randint(0, len(filler))
        chunks = [*filler[:cut], *numbered, *filler[cut:]]
    else:
        chunks = [*numbered, *filler]
        rng.shuffle(chunks)
    if needle is not None:
        number, depth = needle
        held = chunks.pop(next(place for place, (item, _) in enumerate(chunks) if item == number))
        place = round(depth * len(chunks))
        while place and sum(count_tokens(chunk) for _, chunk in chunks[place:]) < TAIL:
            place -= 1
        chunks.insert(place, held)
    parts: list[Part] = []
    places = {}
    for item, chunk in chunks:
        if item is not None:
            places[item] = (len(parts), len(parts) + len(chunk))
        parts += chunk
    return Story(tuple(parts), tuple(questions), tuple(places[item] for item in range(len(items))))


def count_tokens(parts: Sequence[Part]) -> int:
    """Return how many tokens these parts become."""
    return sum(IMAGE_TOKENS if isinstance(part, Image.Image) else len(part.split()) for part in parts)


def _filler(rng: Random, tokens: int) -> list[Item]:
    sentences: list[Item] = []
    while tokens > 0:
        subject, thing = rng.sample(NOUNS, 2)
        first, second = rng.sample(ADJECTIVES, 2)
        sentences.append((f"the {first} {subject} {rng.choice(VERBS)} the {second} {thing} .",))
        tokens -= 8
    return sentences
