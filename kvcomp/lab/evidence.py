"""Where the evidence of a sample stands among the tokens of its prompt."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from itertools import groupby

from kvcomp.core.errors import InputError
from kvcomp.lab.codec import Codec, Outline
from kvcomp.lab.tasks import Sample, Span


def locate(codec: Codec, sample: Sample, ids: Sequence[int], visual: Sequence[bool]) -> tuple[int, ...]:
    """Return the positions of the evidence, ascending.

    Text is found by tokenizing the prompt, images as runs of visual tokens; both are checked against the tokens that
    the model is given. Images that touch one another are taken to be of one size. A whole image comes with the marks
    that the template puts right before and right after it, since a model may gather there what the image shows.

    Args:
        codec: writes the prompt.
        sample: whose evidence is looked for.
        ids: the tokens of its prompt, padding left out.
        visual: which of them stand for images.

    Raises:
        InputError: the prompt is not what its outline says.
    """
    if not sample.evidence:
        return ()
    outline = codec.outline(sample)
    if not outline.offsets:
        raise InputError("the testbed's tokenizer must be a fast one, which knows the characters of each token")
    positions = _positions(outline.ids, ids, visual)
    images = [number for number, found in enumerate(positions) if visual[found.start]]
    places = _places(sample, outline, images, codec.count_frame(sample))
    found = {place for span in sample.evidence for place in _span(span, sample, places, outline, positions)}
    whole = [places[span.part] for span in sample.evidence if _is_whole_image(span, sample)]
    found |= {place for image in whole for place in _marks(image, codec, outline, visual, positions)}
    return tuple(sorted(found))


def _positions(short: Sequence[int], ids: Sequence[int], visual: Sequence[bool]) -> list[range]:
    """Return the positions in the prompt that each token of the outline became."""
    placeholders = {token for token, seen in zip(ids, visual, strict=True) if seen}
    found: list[range] = []
    place = 0
    for shown, group in groupby(short, key=placeholders.__contains__):
        tokens = list(group)
        stop = _run_end(visual, place) if shown else place + len(tokens)
        each, rest = divmod(stop - place, len(tokens))
        if rest or each == 0 or (not shown and list(ids[place:stop]) != tokens):
            raise InputError(
                "the prompt's tokens must be its text with each image written out, and the stretch that begins at "
                f"token {place} is not"
            )
        found += [range(start, start + each) for start in range(place, stop, each)]
        place = stop
    if place != len(ids):
        raise InputError(f"the prompt's tokens must end with its text, and {len(ids) - place} more follow")
    return found


def _run_end(visual: Sequence[bool], start: int) -> int:
    return next((place for place in range(start, len(visual)) if not visual[place]), len(visual))


def _places(sample: Sample, outline: Outline, images: Sequence[int], frame: int) -> list[tuple[int, int]]:
    """Return the characters of the outline that each part of the context takes, an image those of its placeholder."""
    places: list[tuple[int, int]] = []
    pending = iter(images)
    for number, part in enumerate(sample.context):
        if isinstance(part, str):
            start = outline.text.find(part.strip(), frame)
            place = (start, start + len(part.strip()))
        else:
            place = next((outline.offsets[token] for token in pending), (-1, -1))
        if place[0] < frame:
            raise InputError(f"the prompt must hold the parts of the context in order, and part {number} is missing")
        places.append(place)
        frame = place[1]
    return places


def _span(
    span: Span, sample: Sample, places: Sequence[tuple[int, int]], outline: Outline, positions: Sequence[range]
) -> Iterator[int]:
    """Yield the positions of one stretch of the context."""
    place, part = places[span.part], sample.context[span.part]
    if not isinstance(part, str):
        yield from positions[outline.offsets.index(place)][span.start : span.stop]
        return
    for word in list(re.finditer(r"\S+", part.strip()))[span.start : span.stop]:
        begin, end = place[0] + word.start(), place[0] + word.end()
        for number, (start, stop) in enumerate(outline.offsets):
            if start < end and stop > begin:
                yield from positions[number]


def _is_whole_image(span: Span, sample: Sample) -> bool:
    return not isinstance(sample.context[span.part], str) and (span.start, span.stop) == (0, None)


def _marks(
    place: tuple[int, int], codec: Codec, outline: Outline, visual: Sequence[bool], positions: Sequence[range]
) -> Iterator[int]:
    """Yield the positions of the marks around an image whose placeholder takes these characters of the outline."""
    image = outline.offsets.index(place)
    for token in (image - 1, image + 1):
        if 0 <= token < len(outline.ids) and outline.ids[token] in codec.marks and not visual[positions[token].start]:
            yield from positions[token]
