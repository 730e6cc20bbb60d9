"""From an annotation to the prompt of a sample: which image goes where, and what is cut where it is too long.

Two policies say which image a placeholder shows:

- `by_index` (default): placeholder k shows the k-th image. A repeated placeholder shows its image again, and an image
  that no placeholder names is not shown. A number without an image is a fault of the file.
- `official`: what MileBench's scripts show (FreedomIntelligence/MileBench, `utils.py` and the model workers). Images
  fill the placeholders from the last to the first whatever their numbers, so a repeat shifts every image before it;
  placeholders that are left without an image vanish. Between two placeholders in a row, and after them, stands a new
  line; of three in a row the pairs do not overlap.

In combined mode one image shows all, in front of everything, and placeholders become their names.

Deviations from the official scripts: a number without an image stays in the text there and here under `official`; a
placeholder for which no image is left makes the scripts fail, here it vanishes.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from kvcomp.lab.milebench.schema import PLACEHOLDER

PlaceholderPolicy = Literal["by_index", "official"]

IMAGE = "<ImageHere>"
"""The scripts' own mark for an image. A context that holds it as text shows an image there, under `official` only."""


UNLETTERED = "GPR1200"
"""The task whose choices have no letters in the prompt: it has more of them than the alphabet."""


@dataclass(frozen=True)
class Truncation:
    """A context window, and how texts fill it. MileBench counts neither chat template nor answer.

    Attributes:
        max_context_len: tokens of the window.
        tokens_per_image: tokens that each image takes.
        encode: returns the tokens of a text, without special ones.
        decode: returns the text of tokens. What is kept went through both, as in the scripts.
    """

    max_context_len: int
    tokens_per_image: int
    encode: Callable[[str], Sequence[int]]
    decode: Callable[[Sequence[int]], str]

    def budget(self, instruction: str) -> int:
        """Return how many tokens an instruction leaves to the context."""
        return self.max_context_len - len(self.encode(instruction))


@dataclass(frozen=True)
class Prompt:
    """Texts with images between them: `texts[0]`, image number `images[0]`, `texts[1]`, ...

    Attributes:
        texts: one more than images; may be empty.
        images: positions in `images_path`; None for a placeholder without an image.
    """

    texts: tuple[str, ...]
    images: tuple[int | None, ...]


def build_prompt(
    context: str, num_images: int, instruction: str, policy: PlaceholderPolicy, truncation: Truncation | None
) -> Prompt:
    r"""Return the prompt of a context: the instruction, a new line, then what is kept of text and images.

    >>> build_prompt("a {image#2} b", 2, "Look.", "by_index", None)
    Prompt(texts=('Look.\na ', ' b'), images=(1,))
    """
    prompt = place_by_index(context) if policy == "by_index" else place_from_the_end(context, num_images)
    if truncation is not None:
        prompt = truncate(prompt, truncation.budget(instruction), truncation)
    prompt = drop_empty(prompt)
    if policy == "official":
        prompt = part_adjacent(prompt)
    return replace(prompt, texts=(f"{instruction}\n{prompt.texts[0]}", *prompt.texts[1:]))


def build_combined(context: str, num_images: int, instruction: str, truncation: Truncation | None) -> Prompt:
    r"""Return the prompt of a context whose images are shown as one, which is image 0 here. Nobody counts its tokens.

    >>> build_combined("a {image#2} b", 2, "Look.", None)
    Prompt(texts=('', '\nLook.\na <Image 2>  b'), images=(0,))
    """

    def name(match: re.Match[str]) -> str:
        return f"<Image {int(match[1])}> " if 1 <= int(match[1]) <= num_images else match[0]

    prompt = Prompt((PLACEHOLDER.sub(name, context),), ())
    if truncation is not None:
        prompt = truncate(prompt, truncation.budget(instruction), truncation)
    return Prompt(("", f"\n{instruction}\n{prompt.texts[0]}"), (0,))


def add_choices(context: str, choices: Sequence[str], task: str) -> str:
    r"""Return a context with the choices of a task behind it.

    >>> add_choices("Which?", ("red", "blue"), "TQA")
    'Which?\nChoice list: \nA. red\nB. blue\nYour answer is: '
    """
    letters = ["" if task == UNLETTERED else f"{chr(ord('A') + number)}. " for number in range(len(choices))]
    lines = "\n".join(map(str.__add__, letters, choices))
    return f"{context}\nChoice list: \n{lines}\nYour answer is: "


def place_by_index(context: str) -> Prompt:
    """Return a context in which placeholder k shows image k."""
    pieces = PLACEHOLDER.split(context)
    return Prompt(tuple(pieces[::2]), tuple(int(number) - 1 for number in pieces[1::2]))


def place_from_the_end(context: str, num_images: int) -> Prompt:
    """Return a context in which the last placeholder shows the last image, the one before it the last but one, ..."""

    def mark(match: re.Match[str]) -> str:
        return IMAGE if 1 <= int(match[1]) <= num_images else match[0]

    texts = PLACEHOLDER.sub(mark, context).split(IMAGE)
    first = num_images - (len(texts) - 1)
    return Prompt(tuple(texts), tuple(number if number >= 0 else None for number in range(first, num_images)))


def truncate(prompt: Prompt, budget: int, truncation: Truncation) -> Prompt:
    """Return the end of a prompt that fits into a budget of tokens, cut as MileBench cuts.

    From the last text to the first: a text that does not fit is dropped whole, unless it is the very last one, of which
    the end is kept; a text that fits is kept, then the image before it if that fits too. The first thing that does not
    fit ends the walk.
    """
    texts: list[str] = []
    images: list[int | None] = []
    for position in reversed(range(len(prompt.texts))):
        tokens = truncation.encode(prompt.texts[position])
        if len(tokens) > budget:
            last = position == len(prompt.texts) - 1
            texts.append(truncation.decode(tokens[len(tokens) - budget :]) if last else "")
            break
        texts.append(truncation.decode(tokens))
        budget -= len(tokens)
        if position == 0:
            break
        image = prompt.images[position - 1]
        cost = 0 if image is None else truncation.tokens_per_image
        if cost > budget:
            break
        budget -= cost
        images.append(image)
    return Prompt(tuple(reversed(texts)), tuple(reversed(images)))


def drop_empty(prompt: Prompt) -> Prompt:
    """Return a prompt without the placeholders that show nothing."""
    texts, images = [prompt.texts[0]], []
    for image, text in zip(prompt.images, prompt.texts[1:], strict=True):
        if image is None:
            texts[-1] += text
        else:
            images.append(image)
            texts.append(text)
    return Prompt(tuple(texts), tuple(images))


def part_adjacent(prompt: Prompt) -> Prompt:
    """Return a prompt with a new line between two images in a row, and after them."""
    marked = IMAGE.join(prompt.texts).replace(IMAGE + IMAGE, f"{IMAGE}\n{IMAGE}\n")
    return replace(prompt, texts=tuple(marked.split(IMAGE)))
