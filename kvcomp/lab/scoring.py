"""How a prediction is scored against a reference: exact match, and MileBench's own rules with their quirks.

A name that ends in `official` gives what MileBench's evaluation script gives (FreedomIntelligence/MileBench,
`evaluate.py`, arXiv:2404.18532), written anew from its described behaviour. Functions normalise their arguments
themselves and return a share between 0 and 1.

Deviations from the official script, all where it would stop a run:

- a prediction or reference without a word (empty, or nothing but periods) has a ROUGE-L of 0; the script raises
  `Hypothesis is empty` when more than 32 periods are all there is;
- the longest common subsequence is found without recursion; the script's recursion ends at about 1,000 words.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence

from kvcomp.core.errors import InputError

PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
MOST_PERIODS = 32
"""How many periods normalisation removes: the script passes a flag (`re.UNICODE`, 32) where a count belongs."""

_DIGIT_COMMA_DIGIT = re.compile(r"\d,\d")
_PERIOD = re.compile(r"\.(?!\d)")
_THOUSANDS = re.compile(r"(?<=\d),(?=\d{3}(?!\d))")
_RUN = re.compile(r"\d+(?:\.\d+)*|[^\W\d_]+")


def normalise_official(text: str) -> str:
    r"""Return a text as MileBench compares it.

    Each punctuation mark is deleted everywhere where the text holds it beside a space, or holds a comma between two
    digits; else it becomes a space. So the result for a phrase depends on the rest of the text. Of the periods that no
    digit follows only the first 32 go. Articles and inner double spaces stay.

    >>> normalise_official("The special magic number is 5,626,534.")
    'the special magic number is 5626534'
    >>> normalise_official("Spider-Man"), normalise_official("It was Spider-Man - 2002")
    ('spider man', 'it was spiderman  2002')

    Raises:
        InputError: it is no text.
    """
    if not isinstance(text, str):
        raise InputError(f"what is scored must be a text, got {text!r}; use str(...) for a number")
    text = text.replace("\n", " ").replace("\t", " ").strip()
    joins = _DIGIT_COMMA_DIGIT.search(text) is not None
    bare = text
    for mark in PUNCTUATION:
        deleted = joins or f"{mark} " in text or f" {mark}" in text
        bare = bare.replace(mark, "" if deleted else " ")
    return _PERIOD.sub("", bare, count=MOST_PERIODS).strip("'").strip('"').strip().lower()


def rouge_l_official(prediction: str, reference: str) -> float:
    """Return the ROUGE-L F of two normalised texts: MileBench's score of ALFRED, IEdit, Spot-the-Diff, CLEVR-Change.

    >>> round(rouge_l_official("Walk to the sink.", "Turn left and walk to the right sink."), 10)
    0.6666666622
    """
    return rouge_l(normalise_official(prediction), normalise_official(reference))


def needle_official(prediction: str, reference: str) -> float:
    """Return 1.0 where the normalised reference is a word of the normalised prediction: MileBench's needle score.

    A reference of two words never scores, and neither does one that sticks to a mark that normalisation keeps.

    >>> needle_official("The number is 5,626,534.", "5626534"), needle_official("**5626534**", "5626534")
    (1.0, 0.0)
    """
    return float(normalise_official(reference) in normalise_official(prediction).split())


def needle_lenient(prediction: str, reference: str) -> float:
    """Return 1.0 where the prediction holds the reference at all, whatever marks surround it.

    Texts are compared as sequences of whole numbers and words: the reference's must occur in a row. A number is never
    found inside a longer one. What the official rule accepts is accepted here too.

    >>> needle_lenient("**5626534**", "5626534"), needle_lenient("it is 56265340", "5626534")
    (1.0, 0.0)
    >>> needle_lenient("it is 3.5", "5"), needle_lenient("it is 5.", "5")
    (0.0, 1.0)
    >>> needle_lenient("The blue-fox!", "blue fox")
    1.0
    """
    if needle_official(prediction, reference):
        return 1.0
    wanted, found = _runs(reference), _runs(prediction)
    starts = range(len(found) - len(wanted) + 1)
    return float(bool(wanted) and any(found[start : start + len(wanted)] == wanted for start in starts))


def mmcoqa_official(prediction: str, reference: str) -> float:
    """Return 1.0 where the normalised reference is a substring of the normalised prediction: MileBench's MMCoQA score.

    >>> mmcoqa_official("I cannot say", "no"), mmcoqa_official("1992", "1993")
    (1.0, 0.0)
    """
    return float(normalise_official(reference) in normalise_official(prediction))


def multi_choice_official(prediction: str, reference: str, choices: Sequence[str]) -> float:
    """Return 1.0 where the prediction is taken for the choice that is the reference: MileBench's score of multiple
    choice.

    >>> choices = ("red cup", "blue cup", "no cup")
    >>> [multi_choice_official(text, "blue cup", choices) for text in ("B", "(b) blue cup", "it was the blue cup")]
    [1.0, 1.0, 1.0]
    >>> multi_choice_official("The answer is B", "blue cup", choices)
    0.0
    """
    offered = [normalise_official(choice) for choice in choices]
    expected = normalise_official(reference)
    return float(expected in offered and choice_official(prediction, choices) == letter(offered.index(expected)))


def choice_official(prediction: str, choices: Sequence[str]) -> str:
    """Return the letter of the choice that MileBench takes a prediction for.

    The first of these that the normalised prediction holds: a letter with its choice, the text of a choice whatever its
    spaces, a letter and nothing else. Else all of its characters that are letters of choices, which is why a sentence
    about a letter rarely scores. Nothing at all counts as C. Deviation: a choice whose text has a mark of regular
    expressions (`3.5`, `$5`) is found by its text as any other; the script compares what it found with the escaped
    choice, finds that they differ, and goes on to the letters.

    >>> choice_official("Answer: B", ("red", "blue")), choice_official("", ("red", "blue"))
    ('AB', 'C')
    """
    text = normalise_official(prediction)
    if not text:
        return "C"
    offered = {letter(number): normalise_official(choice) for number, choice in enumerate(choices)}
    labelled = [normalise_official(f"{name} {choice}") for name, choice in offered.items()]
    if (found := _leftmost(text, labelled)) is not None:
        return labelled[found][0].upper()
    joined = [normalise_official(choice).replace(" ", "") for choice in offered.values()]
    if (found := _leftmost(text.replace(" ", ""), joined)) is not None:
        return letter(joined.index(joined[found]))
    if len(text) <= 2 and text.upper() in offered:
        return text.upper()
    return "".join(character.upper() for character in text if character.upper() in offered)


def letter(number: int) -> str:
    """Return what MileBench calls a choice, counted from 0.

    >>> letter(0), letter(25), letter(26), letter(52)
    ('A', 'Z', 'AA', 'BA')
    """
    before = min(number // 26, 2)
    return ("", "A", "B")[before] + chr(ord("A") + number - 26 * before)


def exact_match(prediction: str, reference: str) -> float:
    """Return 1.0 where the prediction is the whole reference, white space aside.

    >>> exact_match("answer :  4 0", "answer : 4 0"), exact_match("answer : 4", "answer : 4 0")
    (1.0, 0.0)
    """
    return float(prediction.split() == reference.split())


def rouge_l(prediction: str, reference: str) -> float:
    """Return the ROUGE-L F of two texts as the package `rouge` 1.0.1 (pltrdy/rouge, `rouge_score.py`) computes it.

    Texts are split into sentences at periods. Every pair of sentences gives one longest common subsequence; what counts
    is the *set* of their words, against the sets of all words: repetition costs nothing. 0.0 where a text has no
    sentence, for which the package raises.
    """
    predicted, expected = _sentences(prediction), _sentences(reference)
    if not (predicted and expected):
        return 0.0
    common = {word for row in expected for column in predicted for word in _common_words(row, column)}
    recall = len(common) / len({word for sentence in expected for word in sentence})
    precision = len(common) / len({word for sentence in predicted for word in sentence})
    return 2.0 * (precision * recall / (precision + recall + 1e-8))


SCORERS: Mapping[str, Callable[[str, str], float]] = {
    "exact match": exact_match,
    "rouge_l_official": rouge_l_official,
    "needle_official": needle_official,
    "needle_lenient": needle_lenient,
    "mmcoqa_official": mmcoqa_official,
}
"""Every scorer that needs nothing else, by the name of its metric: `score(prediction, reference)`."""


def _leftmost(text: str, wanted: Sequence[str]) -> int | None:
    """Return which of the texts stands first in another, of two in one place the earlier in the list."""
    places = [(place, number) for number, part in enumerate(wanted) if (place := text.find(part)) >= 0]
    return min(places)[1] if places else None


def _sentences(text: str) -> list[list[str]]:
    """Return the words of each sentence. A sentence of spaces alone has one word, the empty one, as in the package."""
    return [" ".join(sentence.split()).split(" ") for sentence in text.split(".") if sentence]


def _common_words(row: Sequence[str], column: Sequence[str]) -> list[str]:
    """Return one longest common subsequence, last word first: of several the one that the package walks back along."""
    lengths = _lengths(row, column)
    words: list[str] = []
    i, j = len(row), len(column)
    while i and j:
        if row[i - 1] == column[j - 1]:
            words.append(row[i - 1])
            i, j = i - 1, j - 1
        elif lengths[i - 1][j] > lengths[i][j - 1]:
            i -= 1
        else:
            j -= 1
    return words


def _lengths(row: Sequence[str], column: Sequence[str]) -> list[list[int]]:
    """Return the length of the longest common subsequence of every pair of beginnings."""
    table = [[0] * (len(column) + 1)]
    for word in row:
        above, line = table[-1], [0]
        for j, other in enumerate(column, 1):
            line.append(above[j - 1] + 1 if word == other else max(above[j], line[-1]))
        table.append(line)
    return table


def _runs(text: str) -> list[str]:
    """Return the numbers and words of a text, in lower case, commas between thousands left out."""
    return _RUN.findall(_THOUSANDS.sub("", text).lower())
