"""All images of a sample in one: what MileBench's combined mode shows.

MileBench ships these images ready (`combined_1_images`). Where a folder has none they are drawn here, as MileBench's
script draws them, but for the caption: its font does not come with kvcomp, so Pillow's own is taken.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

SIDE = 800
"""Pixels of each image's side, whatever its shape was."""
CAPTION = 40
"""Pixels of the caption's letters."""


def draw_grid(images: Sequence[Image.Image]) -> Image.Image:
    """Return images row by row in the smallest square grid that holds them, each with its number; the rest is black.

    Args:
        images: at least one.

    >>> draw_grid([Image.new("RGB", (8, 4), "red")] * 3).size
    (1600, 1600)
    """
    columns = math.ceil(math.sqrt(len(images)))
    grid = Image.new("RGB", (columns * SIDE, columns * SIDE))
    for number, image in enumerate(images):
        cell = image.resize((SIDE, SIDE), Image.Resampling.LANCZOS)
        _write_caption(cell, f"Image {number + 1}")
        grid.paste(cell, (number % columns * SIDE, number // columns * SIDE))
    return grid


def _write_caption(cell: Image.Image, text: str) -> None:
    """Write a caption in white on black at the bottom centre of an image."""
    draw, font = ImageDraw.Draw(cell), ImageFont.load_default(CAPTION)
    place = (SIDE // 2, SIDE - CAPTION // 4)
    draw.rectangle(draw.textbbox(place, text, font, anchor="md"), fill="black")
    draw.text(place, text, "white", font, anchor="md")
