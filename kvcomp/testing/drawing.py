"""Which samples a promise is tried on, and smaller ones of the same kind where it breaks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace

import torch

from kvcomp.core.types import Modality
from kvcomp.testing.samples import Sample, make_sample

MOST_TRIES = 40  # smaller samples that are tried before the smallest so far is reported


@dataclass(frozen=True)
class Drawing:
    """The arguments of `make_sample`; it prints as the call that makes the sample again."""

    seed: int
    lengths: tuple[int, ...]
    kv_heads: int = 2
    group: int = 2
    dtype: torch.dtype = torch.float32
    fill: str = "normal"
    modalities: tuple[Modality, ...] = (Modality.TEXT, Modality.IMAGE)
    held: int = 0

    def make(self) -> Sample:
        """Return the sample."""
        settings = {field.name: getattr(self, field.name) for field in fields(self)}
        return make_sample(settings.pop("seed"), settings.pop("lengths"), **settings)

    def __str__(self) -> str:
        named = [field for field in fields(self)[2:] if getattr(self, field.name) != field.default]
        said = [f"{field.name}={_spelled(getattr(self, field.name))}" for field in named]
        return f"make_sample({', '.join([str(self.seed), str(self.lengths), *said])})"

    def smaller(self) -> Iterator[Drawing]:
        """Yield samples with less of one thing, the largest steps first."""
        if len(self.lengths) > 1:
            for row in range(len(self.lengths)):
                yield replace(self, lengths=(*self.lengths[:row], *self.lengths[row + 1 :]))
        if self.kv_heads > 1:
            yield replace(self, kv_heads=1)
        if self.group > 1:
            yield replace(self, group=1)
        if self.held:
            yield replace(self, held=0)
        for row, length in enumerate(self.lengths):
            for shorter in dict.fromkeys((length // 2, length - 1)):
                if shorter:
                    yield replace(self, lengths=(*self.lengths[:row], shorter, *self.lengths[row + 1 :]))


def drawings(seed: int) -> list[Drawing]:
    """Return those of one seed: padding, one token, long and one-modal prompts, second turns, wild values."""
    return [
        Drawing(seed, (9, 24, 17)),
        Drawing(seed, (1,), group=1),
        Drawing(seed, (150,), kv_heads=1, group=3),
        Drawing(seed, (21, 8), modalities=(Modality.TEXT,)),
        Drawing(seed, (20, 13), modalities=tuple(Modality), held=12),
        Drawing(seed, (30,), fill="mixed"),
        Drawing(seed, (30, 11), fill="extreme", dtype=torch.float16),
        Drawing(seed, (30, 11), fill="extreme", dtype=torch.bfloat16),
        Drawing(seed, (18, 12), fill="zero", dtype=torch.float16),
        Drawing(seed, (18, 12), fill="equal", dtype=torch.bfloat16),
    ]


def smallest(drawing: Drawing, breaks: Callable[[Drawing], bool]) -> Drawing:
    """Return the smallest sample found that breaks a promise as this one does: one step after another, greedily.

    >>> print(smallest(Drawing(3, (9, 24), kv_heads=4), lambda each: max(each.lengths) > 5))
    make_sample(3, (6,), kv_heads=1, group=1)
    """
    tries = 0
    while True:
        for smaller in drawing.smaller():
            tries += 1
            if tries > MOST_TRIES:
                return drawing
            if breaks(smaller):
                drawing = smaller
                break
        else:
            return drawing


def _spelled(value: object) -> str:
    if isinstance(value, tuple):
        return f"({', '.join(f'Modality.{each.name}' for each in value)},)"
    return repr(value)
