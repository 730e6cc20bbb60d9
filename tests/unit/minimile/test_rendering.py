from hashlib import sha256
from random import Random

import pytest

from kvcomp.minimile.rendering import CELL, DIGIT_ROWS, RGB, SIDE, draw_code, draw_shape
from kvcomp.minimile.vocabulary import COLOURS, DIGITS, SHAPES


def digest(images):
    return sha256(b"".join(image.tobytes() for image in images)).hexdigest()[:16]


def test_every_colour_and_digit_of_the_vocabulary_can_be_drawn():
    assert set(RGB) == set(COLOURS)
    assert set(DIGIT_ROWS) == set(DIGITS)


def test_shapes_are_the_same_bytes_everywhere():
    images = [draw_shape(Random(7), colour, shape) for colour in COLOURS for shape in SHAPES]
    assert digest(images) == "9736f5144f040e13"


def test_codes_are_the_same_bytes_everywhere():
    assert digest(draw_code(Random(3), code) for code in ("4071", "2536", "8900")) == "923c5f82214a67ed"


@pytest.mark.parametrize("shape", SHAPES)
def test_a_shape_is_visible_in_its_colour_and_its_place_varies(shape):
    rng = Random(0)
    boxes = set()
    for _ in range(20):
        image = draw_shape(rng, "red", shape)
        assert image.size == (SIDE, SIDE)
        reds = image.getchannel("R").point(lambda value: 255 * (value > 200))
        assert reds.histogram()[255] > 200
        boxes.add(reds.getbbox())
    assert len(boxes) > 10


def test_one_digit_fits_one_visual_token():
    lit = draw_code(Random(1), "8888").getchannel("R").point(lambda value: 255 * (value > 200))
    for x in (0, CELL):
        for y in (0, CELL):
            cell = lit.crop((x, y, x + CELL, y + CELL))
            assert cell.histogram()[255] == 16 * "".join(DIGIT_ROWS["8"]).count("1")
