"""Which tokens of a prompt show which part of which image."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image

from kvcomp.core.types import Modality

GRID = "image_grid_thw"


@dataclass(frozen=True, eq=False)
class Picture:
    """An image of a prompt and the tokens that stand for it, in reading order.

    Attributes:
        image: as it was given.
        positions: of its tokens in the prompt, rows one after another.
        columns: tokens in a row.
        exact: whether the model's inputs say how the tokens lie; else they are spread over the image by its shape.
    """

    image: Image.Image
    positions: tuple[int, ...]
    columns: int
    exact: bool

    @property
    def rows(self) -> int:
        """Return the rows of tokens, the last one perhaps not full."""
        return -(-len(self.positions) // self.columns)


def find_pictures(
    images: Sequence[Image.Image], modality: Sequence[int], inputs: Mapping[str, Any], config: Any
) -> tuple[Picture, ...]:
    """Return where the images of one prompt stand among its tokens; none where that cannot be told.

    Args:
        images: of the prompt, in order.
        modality: of each token, a `Modality`.
        inputs: of the model; a grid of each image (`image_grid_thw`, in patches) is used where there is one.
        config: of the model, which says how many patches become one token.
    """
    places = [place for place, kind in enumerate(modality) if kind == Modality.IMAGE]
    shapes = _known_shapes(len(images), len(places), inputs, config)
    exact = shapes is not None
    if shapes is None:
        shapes = _guessed_shapes(images, len(places))
    pictures, start = [], 0
    for image, (count, columns) in zip(images, shapes, strict=False):
        pictures.append(Picture(image, tuple(places[start : start + count]), columns, exact))
        start += count
    return tuple(pictures)


def _known_shapes(images: int, tokens: int, inputs: Mapping[str, Any], config: Any) -> list[tuple[int, int]] | None:
    """Return tokens and columns of each image as its grid says; None without grids that account for every token."""
    grid = inputs.get(GRID)
    merge = getattr(getattr(config, "vision_config", None), "spatial_merge_size", None)
    if grid is None or not merge:
        return None
    shapes = [(t * h * w // merge**2, w // merge) for t, h, w in grid.tolist()]
    return shapes if len(shapes) == images and sum(count for count, _ in shapes) == tokens else None


def _guessed_shapes(images: Sequence[Image.Image], tokens: int) -> list[tuple[int, int]]:
    """Return tokens and columns of each image where all have as many tokens; nothing where they cannot."""
    if not images or tokens == 0 or tokens % len(images):
        return []
    count = tokens // len(images)
    return [(count, _columns(image, count)) for image in images]


def _columns(image: Image.Image, count: int) -> int:
    """Return the columns that make cells nearest to squares.

    >>> _columns(Image.new("RGB", (200, 100)), 8), _columns(Image.new("RGB", (50, 50)), 9)
    (4, 3)
    """
    return max(1, min(count, round(math.sqrt(count * image.width / image.height))))
