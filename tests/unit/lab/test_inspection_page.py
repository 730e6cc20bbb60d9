"""The page of an inspection holds every text as text, loads nothing, and carries the numbers that were found."""

import base64
import json
import re
import struct

import pytest
import torch
from pages import parse
from PIL import Image

from kvcomp.lab.inspection import Fate, LayerFate, Prompt
from kvcomp.lab.inspection_page import render_inspection
from kvcomp.lab.pictures import Picture

HOSTILE = "</script><script>alert(1)</script><img src=http://example.org/x.png onerror=alert(2)>&amp;\\u003c"
RIGHT_TO_LEFT = "\u202e\u05e9\u05dc\u05d5\u05dd"


def prompt(text: str = "word") -> Prompt:
    picture = Picture(Image.new("RGB", (40, 20), "red"), (1, 2), 2, True)
    return Prompt(
        title=text,
        inputs={},
        tokens=(text, "", "", text, "end"),
        modality=(0, 1, 1, 0, 0),
        pictures=(picture,),
        evidence=(1, 3),
        reference=text,
    )


def fate(answer: str = "yes", strategy: str = "flowmm") -> Fate:
    homes = torch.tensor([[0, 4, -1, 3, 4], [0, 1, 2, 3, 4]])
    layers = (LayerFate(0, homes, 0.25), LayerFate(2, homes.flip(0), None))
    return Fate(strategy, "0.2", 0.3, answer, False, 0.21, layers)


def data(page: str) -> dict:
    return json.loads(re.search(r'id="data">(.*?)</script>', page, re.DOTALL)[1])


def test_counts_are_kept_merged_evicted():
    layer = fate().layers[0]
    assert [layer.counts(head) for head in range(2)] == [(3, 1, 1), (5, 0, 0)]
    assert layer.mean_counts() == (4.0, 0.5, 0.5)


def test_the_data_of_the_page_is_what_was_found():
    found = data(render_inspection(prompt(), [fate(), fate(strategy="h2o")]))
    assert found["tokens"] == ["word", "", "", "word", "end"]
    assert found["evidence"] == [1, 3]
    assert [(picture["positions"], picture["columns"], picture["rows"]) for picture in found["pictures"]] == [
        ([1, 2], 2, 1)
    ]
    layer = found["fates"][1]["layers"][0]
    assert (layer["number"], layer["rho"], layer["counts"]) == (0, 0.25, [[3, 1, 1], [5, 0, 0]])
    assert struct.unpack("<10i", base64.b64decode(layer["homes"])) == (0, 4, -1, 3, 4, 0, 1, 2, 3, 4)


@pytest.mark.parametrize("text", [HOSTILE, RIGHT_TO_LEFT, "x" * 100_000])
def test_hostile_texts_stay_texts(text):
    page = render_inspection(prompt(text), [fate(text, text[:80])])
    parser = parse(page)
    assert page.count("<script") == 2  # the data and the one script that belongs to the page
    assert "img" not in parser.tags
    assert data(page)["tokens"][0].startswith(text[:200])
    assert len(page) < 400_000
    assert 'dir="auto"' in page


def test_the_page_can_load_nothing():
    page = render_inspection(prompt(), [fate()])
    assert "default-src 'none'; img-src data:" in page
    assert not re.search(r'(?:src|href)="(?!data:)', page)
    assert "url(" not in page
    assert "prefers-color-scheme: dark" in page


def test_large_images_are_made_small():
    big = Picture(Image.effect_noise((3000, 2000), 80).convert("RGB"), (1, 2), 2, True)
    asked = Prompt("t", {}, ("a", "", "", "b", "c"), (0, 1, 1, 0, 0), (big,))
    picture = data(render_inspection(asked, [fate()]))["pictures"][0]
    assert picture["source"].startswith("data:image/jpeg;base64,")
    assert len(picture["source"]) < 400_000
    assert (picture["width"], picture["height"]) == (3000, 2000)
