from hashlib import sha256
from random import Random

import pytest

from kvcomp.minimile.rendering import (
    CELL,
    DIGIT_ROWS,
    RGB,
    SIDE,
    Thing,
    draw_code,
    draw_scene,
    draw_table,
    draw_thing,
    draw_walk,
)
from kvcomp.minimile.vocabulary import COLOURS, DIGITS, SHAPES

SCENE = {0: Thing("red", "circle"), 3: Thing("cyan", "cross")}
DRAWN = {
    "things": lambda rng: [draw_thing(rng, Thing(colour, shape)) for colour in COLOURS for shape in SHAPES],
    "scenes": lambda rng: [draw_scene(rng, SCENE, "green", radius) for radius in (6, 9, 12)],
    "walks": lambda rng: [draw_walk(rng, agent, SCENE) for agent in (1, 2)],
    "codes": lambda rng: [draw_code(rng, code) for code in ("4071", "2536", "8900")],
    "tables": lambda rng: [draw_table(rng, dict(zip(COLOURS, digits, strict=False))) for digits in ("0123", "9876")],
}
DIGESTS = {
    "things": "b8615f19a31f4464",
    "scenes": "b43d0b12b5f37c2a",
    "walks": "218f0459370c603c",
    "codes": "ee15bcc0b1617eb5",
    "tables": "aaf6ad02bdd5de2c",
}


def lit(image, cell):
    """How many pixels of a cell are bright in every channel."""
    left, top = CELL * (cell % 2), CELL * (cell // 2)
    crop = image.crop((left, top, left + CELL, top + CELL))
    return sum(min(pixel) > 180 for pixel in zip(*[iter(crop.tobytes())] * 3, strict=True))


def test_every_colour_and_digit_of_the_vocabulary_can_be_drawn():
    assert set(RGB) == set(COLOURS)
    assert set(DIGIT_ROWS) == set(DIGITS)


@pytest.mark.parametrize("kind", DRAWN)
def test_images_are_the_same_bytes_everywhere(kind):
    images = DRAWN[kind](Random(7))
    assert {image.size for image in images} == {(SIDE, SIDE)}
    assert sha256(b"".join(image.tobytes() for image in images)).hexdigest()[:16] == DIGESTS[kind]


@pytest.mark.parametrize("shape", SHAPES)
def test_a_shape_is_visible_in_its_colour_and_its_place_varies(shape):
    rng = Random(0)
    boxes = set()
    for _ in range(20):
        reds = draw_thing(rng, Thing("red", shape)).getchannel("R").point(lambda value: 255 * (value > 200))
        assert reds.histogram()[255] > 200
        boxes.add(reds.getbbox())
    assert len(boxes) > 10


def test_the_things_of_a_scene_stay_in_their_cells():
    image = draw_scene(Random(2), {1: Thing("red", "square")}, radius=12)
    left, top, right, bottom = image.getchannel("R").point(lambda value: 255 * (value > 150)).getbbox()
    assert left >= CELL
    assert bottom <= CELL
    assert right - left == bottom - top == 25


def test_a_code_lies_in_one_cell_so_that_one_visual_token_carries_it():
    for seed in range(8):
        image = draw_code(Random(seed), "8888")
        counts = sorted(lit(image, cell) for cell in range(4))
        assert counts == [0, 0, 0, 4 * 4 * "".join(DIGIT_ROWS["8"]).count("1")]


def test_the_agent_is_a_white_frame_in_its_cell():
    image = draw_walk(Random(1), 2, SCENE)
    assert [lit(image, cell) for cell in range(4)] == [0, 0, 16 * 16 - 8 * 8, 0]
