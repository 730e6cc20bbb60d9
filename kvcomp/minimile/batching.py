"""Turn stories into training batches: many questions after one context, loss on their answers only. Drills, which
are to be repeated word by word, stand in the same rows: in rows of their own they would train a mode of its own.

It builds the very tokens, positions and pixels that the processor and the model would, only faster; a test
compares them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from kvcomp.minimile.rendering import SIDE
from kvcomp.minimile.stories import Question, Story
from kvcomp.minimile.vocabulary import (
    IM_END,
    IM_START,
    IMAGE,
    PAD,
    TOKEN_IDS,
    VISION_END,
    VISION_START,
    encode,
)

IGNORED = -100
COPY, PAIRS = "copy", "pairs"
"""The kinds of the drills."""
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
_OPENING = encode(f"{IM_START} user")
_TURN = encode(f"{IM_END} {IM_START} assistant")
_CLOSING = encode(IM_END)
_IMAGE_ROWS = ((0, 0, 0), (0, 0, 1), (0, 1, 0), (0, 1, 1))
"""Offsets in time, height and width of the four visual tokens of an image."""


class Batch(NamedTuple):
    """Sequences padded on the right; causal attention needs no mask for that.

    Attributes:
        input_ids: (batch, tokens).
        position_ids: time, height and width (3, batch, tokens).
        targets: the next token where that one belongs to an answer, else -100 (batch, tokens).
        answers: the number of the answer that the next token belongs to, else -1 (batch, tokens).
        pixel_values: (images * 16, 1176).
        kinds: the kind of each answer.
    """

    input_ids: Tensor
    position_ids: Tensor
    targets: Tensor
    answers: Tensor
    pixel_values: Tensor
    kinds: tuple[str, ...]


@dataclass
class Row:
    """One conversation in the making."""

    ids: list[int] = field(default_factory=list)
    places: list[tuple[int, int, int]] = field(default_factory=list)
    answers: list[int] = field(default_factory=list)
    images: list[Image.Image] = field(default_factory=list)
    kinds: list[str] = field(default_factory=list)
    place: int = 0

    def text(self, ids: Sequence[int], answer: int = -1) -> None:
        """Append tokens of text."""
        self.ids += ids
        self.places += [(self.place + step,) * 3 for step in range(len(ids))]
        self.answers += [answer] * len(ids)
        self.place += len(ids)

    def answer(self, ids: Sequence[int], kind: str) -> None:
        """Append tokens that are to be predicted."""
        self.text(ids, len(self.kinds))
        self.kinds.append(kind)

    def context(self, story: Story) -> None:
        """Append the context of a story."""
        for part in story.parts:
            self.image(part) if isinstance(part, Image.Image) else self.text(encode(part))

    def image(self, image: Image.Image) -> None:
        """Append an image between its start and its end mark."""
        self.text([TOKEN_IDS[VISION_START]])
        self.ids += [TOKEN_IDS[IMAGE]] * 4
        self.places += [(self.place + t, self.place + h, self.place + w) for t, h, w in _IMAGE_ROWS]
        self.answers += [-1] * 4
        self.place += 2
        self.images.append(image)
        self.text([TOKEN_IDS[VISION_END]])


def write_row(story: Story, questions: Sequence[Question], label: str, drills: Sequence[Drill] = ()) -> Row:
    """Return the conversation that asks these questions in turn, as the chat template writes it.

    Args:
        story: the context.
        questions: each is followed by its whole answer.
        label: what the kinds of the row begin with.
        drills: written before the context.
    """
    row = open_row(drills)
    row.context(story)
    for number, question in enumerate(questions):
        row.text((_OPENING if number else []) + encode(question.text) + _TURN)
        row.answer(encode(question.answer) + _CLOSING, f"{label} {question.kind}")
    return row


def write_plain_row(story: Story, questions: Sequence[Question], label: str, drills: Sequence[Drill] = ()) -> Row:
    """Return the same without the frame: `colour of lisbon red`, and the next question follows at once."""
    row = open_row(drills)
    row.context(story)
    for question in questions:
        row.text(encode(f"{question.ask} {question.key}"))
        row.answer(encode(question.value), f"{label} {question.kind}")
    return row


def open_row(drills: Sequence[Drill] = ()) -> Row:
    """Return a row that holds the opening of a conversation and drills."""
    row = Row()
    row.text(_OPENING)
    for drill in drills:
        drill(row)
    return row


Drill = Callable[[Row], None]
"""Writes something to be repeated into a row."""


def copy_drill(ids: Sequence[int], turn: int) -> Drill:
    """Return a drill of distinct tokens, then the same ones rotated: all but the first of those are predictable."""

    def write(row: Row) -> None:
        row.text([*ids, ids[turn]])
        row.answer([*ids[turn + 1 :], *ids[:turn]], COPY)

    return write


def pairs_drill(pairs: Sequence[tuple[int, list[int]]], order: Sequence[int]) -> Drill:
    """Return a drill of keys with their values, then the same pairs in another order: each value follows from its
    key.
    """

    def write(row: Row) -> None:
        for key, values in pairs:
            row.text([key, *values])
        for index in order:
            key, values = pairs[index]
            row.text([key])
            row.answer(values, PAIRS)

    return write


def collate(rows: Sequence[Row]) -> Batch:
    """Return one batch of these rows."""
    length = max(len(row.ids) for row in rows)
    ids = np.full((len(rows), length), TOKEN_IDS[PAD])
    answers = np.full((len(rows), length), -1)
    places = np.zeros((3, len(rows), length), dtype=np.int64)
    kinds: list[str] = []
    for index, row in enumerate(rows):
        ids[index, : len(row.ids)] = row.ids
        answers[index, : len(row.ids)] = [number if number < 0 else number + len(kinds) for number in row.answers]
        kinds += row.kinds
        places[:, index, : len(row.ids)] = np.array(row.places).T
    answers = np.concatenate([answers[:, 1:], np.full((len(rows), 1), -1)], axis=1)
    targets = np.where(answers >= 0, np.roll(ids, -1, axis=1), IGNORED)
    return Batch(
        torch.from_numpy(ids),
        torch.from_numpy(places),
        torch.from_numpy(targets),
        torch.from_numpy(answers),
        patchify([image for row in rows for image in row.images]),
        tuple(kinds),
    )


def patchify(images: Sequence[Image.Image]) -> Tensor:
    """Return the patches of 56 x 56 images as the image processor lays them out (images * 16, 1176)."""
    if not images:
        return torch.zeros(0, 1176)
    raw = np.stack([np.frombuffer(image.tobytes(), dtype=np.uint8) for image in images])
    pixels = torch.from_numpy(raw).view(-1, SIDE, SIDE, 3).float().div_(255)
    pixels = (pixels - torch.tensor(CLIP_MEAN)) / torch.tensor(CLIP_STD)
    # (images, cell row, row, y, cell column, column, x, channel)
    grid = pixels.view(-1, 2, 2, 14, 2, 2, 14, 3)
    patches = grid.permute(0, 1, 4, 2, 5, 7, 3, 6).reshape(-1, 3, 1, 196)
    return patches.expand(-1, 3, 2, 196).reshape(-1, 1176)
