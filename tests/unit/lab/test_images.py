"""Image files: whole ones come out in RGB, everything else is named."""

import pytest
from PIL import Image

from kvcomp.core.errors import InputError
from kvcomp.lab.images import open_image


def test_images_come_out_in_rgb(tmp_path):
    Image.new("RGBA", (3, 2), (255, 0, 0, 128)).save(tmp_path / "red.png")
    assert open_image(tmp_path / "red.png").mode == "RGB"


def test_a_file_that_is_no_image_is_named(tmp_path):
    (tmp_path / "notes.png").write_text("no image")
    with pytest.raises(InputError, match=r"notes\.png"):
        open_image(tmp_path / "notes.png")


def test_a_damaged_image_is_named(tmp_path):
    Image.effect_noise((64, 64), 50).save(tmp_path / "whole.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "whole.png").read_bytes()[:300])
    with pytest.raises(InputError, match=r"cut\.png"):
        open_image(tmp_path / "cut.png")


def test_a_missing_image_is_named(tmp_path):
    with pytest.raises(InputError, match=r"none\.png cannot be read: .*No such file"):
        open_image(tmp_path / "none.png")
