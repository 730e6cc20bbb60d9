"""Draw the images, always 56 x 56 pixels: one shape, a scene of small shapes, a code, a table of digits.

No font and no anti-aliasing is involved, so the bytes depend on no font file and on no machine. An image is four
cells of 28 x 28 pixels; one visual token sees one cell.
"""

from __future__ import annotations

from collections.abc import Mapping
from random import Random
from typing import NamedTuple

from PIL import Image, ImageChops, ImageDraw

SIDE = 56
CELL = 28
"""A visual token sees a square of this side (two patches of 14 pixels each way)."""
CELLS = 4
PATCH = 14

RGB = {
    "red": (225, 30, 40),
    "green": (30, 165, 50),
    "blue": (40, 70, 225),
    "yellow": (235, 220, 40),
    "purple": (130, 30, 165),
    "orange": (240, 130, 20),
    "cyan": (40, 205, 215),
    "pink": (240, 150, 195),
}
WHITE, BLACK = (235, 235, 235), (10, 10, 10)
DIGIT_ROWS = {
    "0": "01110 10001 10011 10101 11001 10001 01110",
    "1": "00100 01100 00100 00100 00100 00100 01110",
    "2": "01110 10001 00001 00010 00100 01000 11111",
    "3": "11111 00010 00100 00010 00001 10001 01110",
    "4": "00010 00110 01010 10010 11111 00010 00010",
    "5": "11111 10000 11110 00001 00001 10001 01110",
    "6": "00110 01000 10000 11110 10001 10001 01110",
    "7": "11111 00001 00010 00100 01000 01000 01000",
    "8": "01110 10001 10001 01110 10001 10001 01110",
    "9": "01110 10001 10001 01111 00001 00010 01100",
}
"""A 5 x 7 bitmap for each digit."""


class Thing(NamedTuple):
    """A coloured shape."""

    colour: str
    shape: str

    def __str__(self) -> str:
        """Return it in words."""
        return f"{self.colour} {self.shape}"


def draw_thing(rng: Random, thing: Thing) -> Image.Image:
    """Return an image of one large shape of a random size at a random place."""
    image = Image.new("RGB", (SIDE, SIDE), _grey(rng))
    radius = rng.randint(15, 21)
    x, y = (rng.randint(radius + 1, SIDE - radius - 2) for _ in range(2))
    _PAINTERS[thing.shape](ImageDraw.Draw(image), x, y, radius, RGB[thing.colour])
    return _noisy(rng, image)


def draw_scene(rng: Random, things: Mapping[int, Thing], background: str | None = None, radius: int = 9) -> Image.Image:
    """Return an image of small shapes, each in its own cell (0 to 3, in reading order).

    The lower row is tinted red and the right column blue, in every image. Without that nothing but M-RoPE would tell
    where a token lies, and from one column to the next that turns by a thousandth of a radian.

    Args:
        rng: decides places to two pixels, and the noise.
        things: by cell.
        background: a colour, drawn dark; None for grey.
        radius: of the shapes, in pixels.
    """
    image = Image.new("RGB", (SIDE, SIDE))
    draw = ImageDraw.Draw(image)
    red, green, blue = _grey(rng, 24) if background is None else _dark(RGB[background])
    for cell in range(CELLS):
        fill = (red + _TINT * (cell // 2), green, blue + _TINT * (cell % 2))
        left, top = CELL * (cell % 2), CELL * (cell // 2)
        draw.rectangle((left, top, left + CELL - 1, top + CELL - 1), fill=fill)
    for cell, thing in things.items():
        x, y = (CELL * place + CELL // 2 + rng.randint(-2, 2) for place in (cell % 2, cell // 2))
        _PAINTERS[thing.shape](draw, x, y, radius, RGB[thing.colour])
    return _noisy(rng, image)


def draw_walk(rng: Random, agent: int, things: Mapping[int, Thing]) -> Image.Image:
    """Return a scene with the agent, a white frame, in a cell of its own."""
    image = draw_scene(rng, things)
    left, top = CELL * (agent % 2) + 6, CELL * (agent // 2) + 6
    ImageDraw.Draw(image).rectangle((left, top, left + 15, top + 15), outline=WHITE, width=4)
    return image


def draw_code(rng: Random, digits: str) -> Image.Image:
    """Return an image with four digits in one random cell, two rows of two, one to each patch."""
    image = Image.new("RGB", (SIDE, SIDE), _grey(rng))
    draw = ImageDraw.Draw(image)
    cell = rng.randrange(CELLS)
    for place, digit in enumerate(digits):
        left = CELL * (cell % 2) + PATCH * (place % 2) + rng.randint(1, 3)
        _draw_digit(draw, left, CELL * (cell // 2) + PATCH * (place // 2), digit, 2, WHITE)
    return _noisy(rng, image)


def draw_table(rng: Random, cells: Mapping[str, str]) -> Image.Image:
    """Return an image of four coloured cells with a black digit each, `{colour: digit}` in reading order."""
    image = Image.new("RGB", (SIDE, SIDE))
    draw = ImageDraw.Draw(image)
    for cell, (colour, digit) in enumerate(cells.items()):
        left, top = CELL * (cell % 2), CELL * (cell // 2)
        draw.rectangle((left, top, left + CELL - 1, top + CELL - 1), fill=RGB[colour])
        _draw_digit(draw, left + rng.randint(5, 8), top + rng.randint(3, 4), digit, 3, BLACK)
    return _noisy(rng, image)


def _grey(rng: Random, most: int = 64) -> tuple[int, int, int]:
    level = rng.randint(16, most)
    return level, level, level


def _dark(colour: tuple[int, int, int]) -> tuple[int, int, int]:
    red, green, blue = (part // 3 for part in colour)
    return red, green, blue


def _noisy(rng: Random, image: Image.Image) -> Image.Image:
    noise = Image.frombytes("RGB", image.size, rng.randbytes(SIDE * SIDE * 3))
    return ImageChops.add(image, noise.point(_LOW_BITS))


_TINT = 40
_LOW_BITS = [value & 15 for value in range(256)] * 3


def _draw_digit(
    draw: ImageDraw.ImageDraw, left: int, top: int, digit: str, scale: int, fill: tuple[int, int, int]
) -> None:
    for row, bits in enumerate(DIGIT_ROWS[digit].split()):
        for column, bit in enumerate(bits):
            if bit == "1":
                x, y = left + scale * column, top + scale * row
                draw.rectangle((x, y, x + scale - 1, y + scale - 1), fill=fill)


def _circle(draw: ImageDraw.ImageDraw, x: int, y: int, radius: int, fill: tuple[int, int, int]) -> None:
    draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=fill)


def _square(draw: ImageDraw.ImageDraw, x: int, y: int, radius: int, fill: tuple[int, int, int]) -> None:
    draw.rectangle((x - radius, y - radius, x + radius, y + radius), fill=fill)


def _triangle(draw: ImageDraw.ImageDraw, x: int, y: int, radius: int, fill: tuple[int, int, int]) -> None:
    draw.polygon([(x, y - radius), (x - radius, y + radius), (x + radius, y + radius)], fill=fill)


def _cross(draw: ImageDraw.ImageDraw, x: int, y: int, radius: int, fill: tuple[int, int, int]) -> None:
    arm = radius // 3
    draw.rectangle((x - arm, y - radius, x + arm, y + radius), fill=fill)
    draw.rectangle((x - radius, y - arm, x + radius, y + arm), fill=fill)


_PAINTERS = {"circle": _circle, "square": _square, "triangle": _triangle, "cross": _cross}
