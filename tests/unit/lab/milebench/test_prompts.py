"""Placeholders and truncation, against cases counted by hand."""

import re

import pytest

from kvcomp.lab.milebench.prompts import Prompt, Truncation, build_prompt, place_from_the_end, truncate


def words(text):
    return re.findall(r"\S+", text)


def window(length, image=3):
    return Truncation(length, image, words, " ".join)


def build(context, images, policy="by_index", truncation=None):
    return build_prompt(context, images, "Look.", policy, truncation)


def test_a_placeholder_shows_the_image_of_its_number():
    prompt = build("a {image#2} b {table#1}", 2)
    assert prompt == Prompt(("Look.\na ", " b ", ""), (1, 0))


def test_a_repeated_placeholder_shows_its_image_again_and_an_unnamed_image_is_left_out():
    assert build("{image#1} {image#3} {image#1}", 3).images == (0, 2, 0)


def test_officially_images_fill_the_placeholders_from_the_end():
    assert build("{image#1} {image#3} {image#1} x", 3, "official").images == (0, 1, 2)
    assert build("{image#1} x {image#2}", 4, "official").images == (2, 3)


def test_officially_a_placeholder_without_an_image_vanishes():
    assert build("a {image#1} b {image#1} c", 1, "official") == Prompt(("Look.\na  b ", " c"), (0,))


def test_officially_a_number_without_an_image_stays_text():
    assert build("a {image#1} {image#7} {image#0}", 1, "official") == Prompt(
        ("Look.\na ", " {image#7} {image#0}"), (0,)
    )


def test_officially_the_scripts_own_mark_shows_an_image():
    assert place_from_the_end("a <ImageHere> b {image#1}", 2) == Prompt(("a ", " b ", ""), (0, 1))
    assert build("a <ImageHere> b", 0).images == ()


@pytest.mark.parametrize(
    ("placeholders", "texts"),
    [
        (1, ("", "D")),
        (2, ("", "\n", "\nD")),
        (3, ("", "\n", "\n", "D")),
        (4, ("", "\n", "\n", "\n", "\nD")),
    ],
)
def test_officially_adjacent_images_are_parted_in_pairs(placeholders, texts):
    context = "".join(f"{{image#{number}}}" for number in range(1, placeholders + 1)) + "D"
    assert build(context, placeholders, "official").texts == (f"Look.\n{texts[0]}", *texts[1:])
    assert build(context, placeholders).texts == ("Look.\n", *[""] * (placeholders - 1), "D")


CONTEXT = "one two {image#1} three {image#2} four five six"


@pytest.mark.parametrize(
    ("length", "expected"),
    [
        (100, Prompt(("one two", "three", "four five six"), (0, 1))),
        (13, Prompt(("one two", "three", "four five six"), (0, 1))),  # 1 instruction, 3 + 3 + 1 + 3 + 2
        (12, Prompt(("", "three", "four five six"), (0, 1))),  # the text of two words is dropped whole
        (10, Prompt(("three", "four five six"), (1,))),  # the first image does not fit
        (7, Prompt(("", "four five six"), (1,))),
        (6, Prompt(("four five six",), ())),
        (4, Prompt(("four five six",), ())),
        (3, Prompt(("five six",), ())),  # of the last text the end is kept
        (2, Prompt(("six",), ())),
    ],
)
def test_truncation_keeps_the_end(length, expected):
    prompt = build(CONTEXT, 2, truncation=window(length))
    assert prompt == Prompt((f"Look.\n{expected.texts[0]}", *expected.texts[1:]), expected.images)
    assert build(CONTEXT, 2, "official", window(length)) == prompt


def test_a_repeated_image_is_paid_for_each_time_and_a_missing_one_never():
    assert truncate(Prompt(("a", "b", "c"), (0, 0)), 7, window(0)).images == (0,)
    assert truncate(Prompt(("a", "b", "c"), (None, 0)), 6, window(0)).images == (None, 0)


def test_truncated_text_is_what_the_tokenizer_gives_back():
    assert build("a   b", 0, truncation=window(9)).texts == ("Look.\na b",)
    assert build("a   b", 0).texts == ("Look.\na   b",)
