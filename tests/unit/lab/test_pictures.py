"""Which token shows which part of which image."""

from types import SimpleNamespace

import torch
from PIL import Image

from kvcomp.lab.pictures import find_pictures

WIDE, TALL = Image.new("RGB", (80, 40)), Image.new("RGB", (30, 60))
MERGE_2 = SimpleNamespace(vision_config=SimpleNamespace(spatial_merge_size=2))


def test_a_grid_of_patches_says_how_tokens_lie():
    inputs = {"image_grid_thw": torch.tensor([[1, 4, 8], [1, 8, 4]])}  # 2 x 4 and 4 x 2 tokens
    modality = [0, *[1] * 8, 0, 0, *[1] * 8, 0]
    first, second = find_pictures([WIDE, TALL], modality, inputs, MERGE_2)
    assert (first.positions, first.columns, first.rows, first.exact) == (tuple(range(1, 9)), 4, 2, True)
    assert (second.positions, second.columns, second.rows) == (tuple(range(11, 19)), 2, 4)
    assert second.image is TALL


def test_without_a_grid_tokens_are_spread_by_the_shape_of_the_image():
    first, second = find_pictures([WIDE, TALL], [1] * 8 + [0] + [1] * 8, {}, SimpleNamespace())
    assert (first.columns, first.rows, first.exact) == (4, 2, False)
    assert (second.columns, second.rows, second.positions) == (2, 4, tuple(range(9, 17)))


def test_a_row_that_is_not_full_and_tokens_between_rows():
    modality = [1, 1, 0, 1, 1, 0, 1]  # separators after each row of two are text
    (picture,) = find_pictures([Image.new("RGB", (9, 9))], modality, {}, None)
    assert picture.positions == (0, 1, 3, 4, 6)
    assert (picture.columns, picture.rows) == (2, 3)


def test_nothing_is_claimed_where_tokens_cannot_be_divided():
    assert find_pictures([WIDE, TALL], [1] * 7, {}, None) == ()
    assert find_pictures([], [0, 0], {}, None) == ()
    assert find_pictures([WIDE], [0, 2, 2], {}, None) == ()  # a video is no image
    wrong = {"image_grid_thw": torch.tensor([[1, 4, 4]])}  # 4 tokens, and there are 8
    (picture,) = find_pictures([WIDE], [1] * 8, wrong, MERGE_2)
    assert not picture.exact
