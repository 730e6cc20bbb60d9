"""Texts of unknown origin say what they said, and do nothing."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvcomp.lab.reporting.texts import file_name, latex, markdown, plain

MARKS = '\\{}$&#_%~^<>|"`*[]()!+/. ab\n'
TEXTS = st.text() | st.text(st.sampled_from(MARKS), min_size=5)
WORDS = "\u05e9\u05dc\u05d5\u05dd, \u4e16\u754c, \u00f1"


@given(TEXTS)
def test_a_plain_text_is_one_short_line(text):
    line = plain(text, 50)
    assert len(line) <= 50
    assert len(line.splitlines()) <= 1
    assert line == plain(line, 50)


def test_what_turns_the_direction_of_writing_goes_and_letters_stay():
    assert plain("a\u202eb\u2066c\u200fd\x00\x1b[31m") == "abcd[31m"
    assert plain(WORDS) == WORDS


@given(TEXTS)
def test_in_latex_nothing_but_escapes_has_a_meaning(text):
    rest = re.sub(r"\\text[a-z]+\{\}|\\[{}$&#_%]", "", latex(text, 500))
    assert not re.search(r"[\\{}$&#_%~^<>|\"`]", rest)


@given(TEXTS)
def test_in_markdown_no_html_no_cell_and_no_link_begins(text):
    written = markdown(text, 500)
    assert not re.search(r"[<>]", written)
    assert not re.search(r"(?<!\\)[|*_`\[\]$]", re.sub(r"\\\\", "", written))


@given(TEXTS)
def test_a_file_name_stays_in_its_folder(text):
    name = file_name(text)
    assert re.fullmatch(r"[A-Za-z0-9.-]{1,60}", name)
    assert name not in (".", "..")


@pytest.mark.parametrize("write", [plain, markdown, latex])
def test_a_long_text_is_cut(write):
    assert len(write("x" * 100_000)) == 200
    assert write("x" * 100_000).endswith("...")
