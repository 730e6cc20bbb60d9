"""MileBench's scoring: known vectors, the package it is built on, and the documented ends of the range."""

from __future__ import annotations

import random
import sys

import pytest
from rouge import Rouge

from kvcomp.core.errors import InputError
from kvcomp.lab.scoring import (
    PUNCTUATION,
    SCORERS,
    choice_official,
    exact_match,
    mmcoqa_official,
    multi_choice_official,
    needle_lenient,
    needle_official,
    normalise_official,
    rouge_l,
    rouge_l_official,
)

NORMALISED = {
    "The special magic number is 5,626,534.": "the special magic number is 5626534",
    "**5626534**": "**5626534**",
    "It's '5626534'": "it's '5626534",
    "Spider-Man": "spider man",
    "It was Spider-Man - 2002": "it was spiderman  2002",
    "A. Closed the closet/cabinet.": "a closed the closet cabinet",
    "U.S.A.": "usa",
    "a.b": "ab",
    "3.5 apples.": "3.5 apples",
    "red, blue": "red blue",
    " tab\tand\nline ": "tab and line",
    "": "",
    "." * 40: "." * 8,
}

ROUGE_L = {
    ("the cat sat on the mat", "the cat sat on the mat"): 0.999999995,
    ("the the the the", "the cat"): 0.6666666622,
    ("the cat the cat the cat", "the cat"): 0.999999995,
    ("Walk to the sink.", "Turn left and walk to the right sink."): 0.6666666622,
    ("The two people are gone.", "There are 2 people on the left image."): 0.1538461491,
    ("the red car is gone. the man moved", "the man moved. the red car is gone"): 0.7142857093,
    ("cat", "dog"): 0.0,
    ("", "the cat"): 0.0,
    ("the cat", ""): 0.0,
    ("." * 40, "the cat"): 0.0,
    ("the cat", "." * 40): 0.0,
    (" \n", "the cat"): 0.0,
}

WORDS = [
    "the",
    "cat",
    "a",
    "5,626,534",
    "3.5",
    "x.y",
    "It's",
    "Spider-Man",
    "no",
    "...",
    "-",
    "é",
    "red,",
    "(two)",
    "?",
]


@pytest.mark.parametrize(("text", "expected"), NORMALISED.items())
def test_normalisation_is_the_official_one(text, expected):
    assert normalise_official(text) == expected


def test_only_the_first_32_periods_go():
    assert normalise_official("a." * 40) == "a" * 33 + ".a" * 7 + "."


@pytest.mark.parametrize("mark", PUNCTUATION)
def test_a_mark_is_deleted_beside_a_space_and_a_space_elsewhere(mark):
    assert normalise_official(f"a{mark}b") == "a b"
    assert normalise_official(f"a{mark}b{mark} c") == "ab c"
    assert normalise_official(f"a{mark}b 1,2") == "ab 12"


@pytest.mark.parametrize(("pair", "expected"), ROUGE_L.items())
def test_rouge_l_is_the_official_one(pair, expected):
    assert rouge_l_official(*pair) == pytest.approx(expected, abs=5e-11)


def fuzzed_pairs(count: int, seed: int) -> list[tuple[str, str]]:
    rng = random.Random(seed)

    def text() -> str:
        return rng.choice([" ", " ", "  ", ". ", "\n"]).join(rng.choices(WORDS, k=rng.randint(1, 60)))

    return [(text(), text()) for _ in range(count)]


@pytest.mark.parametrize("normalise", [str, normalise_official], ids=["raw", "normalised"])
def test_rouge_l_agrees_with_the_package_on_2000_pairs(normalise):
    pairs = [(normalise(one), normalise(two)) for one, two in fuzzed_pairs(2000, seed=8)]
    pairs = [pair for pair in pairs if all(text.replace(".", "") for text in pair)]
    assert len(pairs) > 1900
    assert any(one.count(".") > 5 for one, _ in pairs)
    theirs = Rouge(metrics=["rouge-l"]).get_scores(*zip(*pairs, strict=True))
    assert [rouge_l(*pair) for pair in pairs] == [score["rouge-l"]["f"] for score in theirs]


def test_rouge_l_official_agrees_with_the_package_on_what_normalisation_leaves():
    pairs = fuzzed_pairs(200, seed=9)
    pairs = [pair for pair in pairs if all(normalise_official(text).replace(".", "") for text in pair)]
    theirs = Rouge().get_scores(*([normalise_official(text) for text in side] for side in zip(*pairs, strict=True)))
    assert [rouge_l_official(*pair) for pair in pairs] == [score["rouge-l"]["f"] for score in theirs]


def test_texts_longer_than_the_recursion_limit_are_scored():
    words = " ".join(f"w{number}" for number in range(sys.getrecursionlimit()))
    assert rouge_l_official(words, words) == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("prediction", "reference", "official", "lenient"),
    [
        ("The number is 5626534.", "5626534", 1.0, 1.0),
        ("5,626,534", "5626534", 1.0, 1.0),
        ("5626534!", "5626534", 1.0, 1.0),
        ("**5626534**", "5626534", 0.0, 1.0),
        ("number:5626534", "5626534", 0.0, 1.0),
        ("Answer:5,626,534", "5626534", 0.0, 1.0),
        ("blue-fox", "blue-fox", 0.0, 1.0),
        ("a blue fox", "blue fox", 0.0, 1.0),
        ("a blue red fox", "blue fox", 0.0, 0.0),
        ("56265340", "5626534", 0.0, 0.0),
        ("5,62", "562", 1.0, 1.0),
        ("**5,6265**", "56265", 0.0, 0.0),
        ("", "5626534", 0.0, 0.0),
        ("." * 40, "5626534", 0.0, 0.0),
        ("anything", "", 0.0, 0.0),
    ],
)
def test_needles(prediction, reference, official, lenient):
    assert needle_official(prediction, reference) == official
    assert needle_lenient(prediction, reference) == lenient


@pytest.mark.parametrize(
    ("prediction", "reference", "expected"),
    [
        ("cannot say", "no", 1.0),
        ("not 1992 but 1993", "1992", 1.0),
        ("Red and then blue", "red. blue", 0.0),
        ("red blue", "red. blue ", 1.0),
        ("", "red", 0.0),
    ],
)
def test_mmcoqa_is_a_substring(prediction, reference, expected):
    assert mmcoqa_official(prediction, reference) == expected


@pytest.mark.parametrize("name", SCORERS)
def test_every_scorer_gives_a_float_between_0_and_1(name):
    for pair in [("a b", "a b"), ("", "a"), ("." * 40, "." * 40), ("a", "")]:
        score = SCORERS[name](*pair)
        assert type(score) is float
        assert 0.0 <= score <= 1.0
    assert SCORERS[name]("word", "word") == pytest.approx(1.0)


@pytest.mark.parametrize("scorer", [rouge_l_official, needle_official, needle_lenient, mmcoqa_official])
@pytest.mark.parametrize("pair", [(None, "red"), ("red", 5626534)])
def test_what_is_no_text_is_refused(scorer, pair):
    with pytest.raises(InputError, match=r"what is scored must be a text, got .*; use str\(\.\.\.\) for a number"):
        scorer(*pair)


def test_exact_match_is_of_all_words():
    assert exact_match(" answer : 4 \n0", "answer : 4 0") == 1.0
    assert exact_match("answer : 4 0 0", "answer : 4 0") == 0.0


CUPS = ("A red cup.", "The blue cup", "no cup", "3,000 cups")


@pytest.mark.parametrize(
    ("prediction", "taken"),
    [
        ("B", "B"),
        ("B.", "B"),
        ("(B)", "B"),
        ("b", "B"),
        ("B. The blue cup", "B"),
        ("the  bluecup!", "B"),  # spaces do not matter
        ("no cup, or the blue cup", "C"),  # the leftmost
        ("d 3000 cups", "D"),
        ("The answer is B", "AB"),
        ("Answer: B", "AB"),
        ("", "C"),
        ("?!", "C"),
        ("zzz", ""),
        ("E", ""),
    ],
)
def test_choices_are_found_as_mile_bench_finds_them(prediction, taken):
    assert choice_official(prediction, CUPS) == taken
    for number, reference in enumerate(CUPS):
        assert multi_choice_official(prediction, reference, CUPS) == float(taken == "ABCD"[number])


def test_of_equal_choices_the_first_counts_and_past_z_letters_come_in_pairs():
    assert multi_choice_official("blue", "blue", ("red", "blue", "BLUE.")) == 1.0
    assert choice_official("blue", ("red", "blue", "BLUE.")) == "B"
    many = [f"item {number}" for number in range(80)]
    assert choice_official("item 27", many[:28]) == "C"  # `item 2` stands there too, and comes first
    assert choice_official("ab", ["x" * 9] * 28) == "AB"


def test_a_reference_that_nobody_offers_never_scores():
    assert multi_choice_official("red", "red", ("blue", "green")) == 0.0
