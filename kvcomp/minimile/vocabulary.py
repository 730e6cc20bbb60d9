"""The words that MiniMile knows: about 230, one token each, digits one by one."""

from __future__ import annotations

PAD, UNKNOWN, IM_START, IM_END = "<|endoftext|>", "<|unk|>", "<|im_start|>", "<|im_end|>"
VISION_START, VISION_END, IMAGE, VIDEO = (
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
SPECIALS = (PAD, UNKNOWN, IM_START, IM_END, VISION_START, VISION_END, IMAGE, VIDEO)


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


DIGITS = _words("0 1 2 3 4 5 6 7 8 9")
COLOURS = _words("red green blue yellow purple orange cyan pink")
SHAPES = _words("circle square triangle cross")
NAMES = _words(
    "lisbon oslo paris rome cairo delhi tokyo lima quito dakar hanoi seoul berlin vienna prague athens "
    "dublin madrid warsaw zagreb havana bogota tunis accra nairobi manila ankara kyiv riga geneva "
    "boston dallas denver perth bergen milan turin porto lyon bonn"
)
NOUNS = _words(
    "farmer river house garden teacher bird mountain letter doctor market window sailor forest bridge "
    "baker island train horse village singer tower lake road child cat dog boat king queen painter"
)
VERBS = _words(
    "sees likes finds paints follows remembers visits draws knows hears leaves builds helps watches "
    "brings keeps carries misses wants opens"
)
ADJECTIVES = _words(
    "old young quiet bright tall small happy tired brave gentle cold warm heavy strange early late "
    "clever proud simple hidden broken golden empty busy"
)
FRAME = _words("user assistant question answer the of in ? . ,")
ASKED = _words("number code colour shape name after before change difference edit plan cell")
ACTIONS = _words("turned gone added moved background bigger smaller mirror flip paint remove left right up down")
SPARE = _words(
    ": # image picture magic secret goal step source target table history context order first last next text what "
    "which is was a star diamond big top bottom centre row column yes no none many how one two stop"
)
"""Words that no task uses yet: room for the next ones without a new tokenizer."""

WORDS = SPECIALS + DIGITS + COLOURS + SHAPES + NAMES + NOUNS + VERBS + ADJECTIVES + FRAME + ASKED + ACTIONS + SPARE
TOKEN_IDS: dict[str, int] = {word: index for index, word in enumerate(WORDS)}


def encode(text: str) -> list[int]:
    """Return the token ids of words that are separated by white space, specials included.

    >>> encode("number of lisbon ?") == [TOKEN_IDS[word] for word in ("number", "of", "lisbon", "?")]
    True
    """
    return [TOKEN_IDS[word] for word in text.split()]
