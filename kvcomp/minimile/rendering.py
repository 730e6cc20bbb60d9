"""Draw the images: one coloured shape, or a code of four digits, always 56 x 56 pixels.

No font and no anti-aliasing is involved, so the bytes depend on no font file and on no machine.
"""

from __future__ import annotations

from random import Random

from PIL import Image, ImageChops, ImageDraw

SIDE = 56
CELL = 28
"""A visual token sees a square of this side (two patches of 14 pixels each way)."""

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
"""A 5 x 7 bitmap for each digit; one bit becomes 4 x 4 pixels."""


def draw_shape(rng: Random, colour: str, shape: str) -> Image.Image:
    """Return an image of one shape of a random size at a random place."""
    image = Image.new("RGB", (SIDE, SIDE), _background(rng))
    radius = rng.randint(15, 21)
    x, y = (rng.randint(radius + 1, SIDE - radius - 2) for _ in range(2))
    _PAINTERS[shape](ImageDraw.Draw(image), x, y, radius, RGB[colour])
    return _noisy(rng, image)


def draw_code(rng: Random, digits: str) -> Image.Image:
    """Return an image of four digits, two rows of two: one digit to each visual token, in reading order."""
    image = Image.new("RGB", (SIDE, SIDE), _background(rng))
    draw = ImageDraw.Draw(image)
    for place, digit in enumerate(digits):
        _draw_digit(draw, (place % 2) * CELL + rng.randint(2, 6), place // 2 * CELL, digit)
    return _noisy(rng, image)


def _background(rng: Random) -> tuple[int, int, int]:
    grey = rng.randint(16, 64)
    return grey, grey, grey


def _noisy(rng: Random, image: Image.Image) -> Image.Image:
    noise = Image.frombytes("RGB", image.size, rng.randbytes(SIDE * SIDE * 3))
    return ImageChops.add(image, noise.point(_LOW_BITS))


_LOW_BITS = [value & 15 for value in range(256)] * 3


def _draw_digit(draw: ImageDraw.ImageDraw, left: int, top: int, digit: str) -> None:
    for row, bits in enumerate(DIGIT_ROWS[digit].split()):
        for column, bit in enumerate(bits):
            if bit == "1":
                x, y = left + 4 * column, top + 4 * row
                draw.rectangle((x, y, x + 3, y + 3), fill=(235, 235, 235))


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
