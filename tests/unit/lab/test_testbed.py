"""Loading a model's processor, and the sizes that it makes of images."""

from __future__ import annotations

import pytest
from PIL import Image

from kvcomp.core.errors import InputError
from kvcomp.lab.codec import Codec
from kvcomp.lab.tasks import Sample
from kvcomp.lab.testbed import load_codec
from kvcomp.minimile.processor import build_processor


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("processor")
    build_processor().save_pretrained(folder)
    return folder


def visual_tokens(codec: Codec) -> int:
    sample = Sample((Image.new("RGB", (112, 112)),), "which ?", "none")
    return int(codec.encode([sample])["image_grid_thw"].prod()) // 4


def test_limits_on_pixels_change_the_tokens_of_an_image(folder):
    assert visual_tokens(load_codec(folder)) == 4  # the checkpoint's 56 x 56
    assert visual_tokens(load_codec(folder, max_pixels=112 * 112)) == 16
    codec = load_codec(folder, min_pixels=28 * 28, max_pixels=28 * 28)
    assert visual_tokens(codec) == 1
    assert codec.describe_images()["size"] == {"shortest_edge": 784, "longest_edge": 784}


def test_an_image_processor_that_counts_no_pixels_refuses_limits(folder, monkeypatch):
    monkeypatch.setattr(Codec, "counts_pixels", False)
    with pytest.raises(InputError, match=r"counts pixels, and that in .* \(Qwen2VLImageProcessorPil\) does not"):
        load_codec(folder, max_pixels=784)


def test_a_folder_without_a_processor_is_an_input_error(tmp_path):
    with pytest.raises(InputError, match="cannot be loaded"):
        load_codec(tmp_path)
    with pytest.raises(InputError, match="this one does not exist"):
        load_codec(tmp_path / "none")
