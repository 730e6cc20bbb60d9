"""Batches of samples as a model is asked them: padded on the left, their contexts ending together."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from functools import cached_property
from itertools import groupby

import torch
from torch import Tensor

from kvcomp.core.errors import InputError
from kvcomp.lab.evidence import locate
from kvcomp.lab.tasks import Sample, Span
from kvcomp.lab.testbed import LoadedTestbed

IGNORED = -100  # a target that is no token


class QueryMode(StrEnum):
    """When the cache is compressed.

    `question_seen`: once context and question have been read. `question_later`: once the context has been read; the
    question and the answer follow uncompressed.
    """

    question_seen = "question_seen"
    question_later = "question_later"


@dataclass(frozen=True, eq=False)
class Batch:
    """Samples that are answered together.

    Attributes:
        bed: who is asked.
        name: what a message calls the sample with a number.
        numbers: of the samples in their source.
        samples: what is asked.
        inputs: of `model.generate`, padded on the left.
        question_tokens: columns from the end of the context on, the same in every row; 0 where nobody asked for them.
    """

    bed: LoadedTestbed
    name: Callable[[int], str]
    numbers: tuple[int, ...]
    samples: tuple[Sample, ...]
    inputs: dict[str, Tensor]
    question_tokens: int = 0

    @cached_property
    def evidence(self) -> tuple[tuple[int, ...], ...]:
        """Return the positions of each sample's evidence in its prompt, padding not counted.

        Raises:
            InputError: naming a sample whose evidence cannot be located.
        """
        return tuple(self._locate(row, sample, "evidence") for row, sample in enumerate(self.samples))

    @cached_property
    def images(self) -> tuple[tuple[int, ...], ...]:
        """Return the positions of each sample's images in its prompt, the marks around them included, padding not
        counted.

        Raises:
            InputError: naming a sample whose images cannot be located.
        """
        return tuple(self._locate(row, _about_images(sample), "images") for row, sample in enumerate(self.samples))

    def _locate(self, row: int, sample: Sample, what: str) -> tuple[int, ...]:
        filled = self.inputs["attention_mask"][row].bool()
        ids, visual = self.inputs["input_ids"][row][filled], self.visual[row][filled]
        try:
            return locate(self.bed.codec, sample, ids.tolist(), visual.tolist())
        except InputError as error:
            raise InputError(f"{what} of {self.name(self.numbers[row])}: {error}") from None

    @cached_property
    def visual(self) -> Tensor:
        """Return which tokens of the prompts stand for images, `(batch, tokens)` bool."""
        return self.bed.visual(self.inputs)

    @cached_property
    def targets(self) -> Tensor:
        """Return the tokens of the reference answers, `(batch, tokens)` int64, filled up with `IGNORED`."""
        rows = [torch.tensor(self.bed.codec.encode_answer(sample)) for sample in self.samples]
        padded = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=IGNORED)
        return padded.to(self.inputs["input_ids"].device)

    @cached_property
    def answered(self) -> dict[str, Tensor]:
        """Return the inputs with the reference answers behind the prompts; what fills them up counts as text."""
        return continued(self.inputs, self.targets.clamp(min=0))

    @cached_property
    def full_logits(self) -> Tensor:
        """Return the logits that predict the tokens of the reference answers from the full cache,
        `(batch, tokens, vocabulary)`.
        """
        with torch.inference_mode():
            output = self.bed.model(
                **self.answered,
                **self.text_positions(self.answered["attention_mask"]),
                use_cache=False,
                logits_to_keep=self.targets.shape[1] + 1,
            )
        logits: Tensor = output.logits[:, :-1]
        return logits

    @property
    def context(self) -> dict[str, Tensor]:
        """Return the inputs without the columns of the question."""
        prompt = self.inputs["input_ids"]
        return {
            name: value[:, : prompt.shape[1] - self.question_tokens] if value.shape == prompt.shape else value
            for name, value in self.inputs.items()
        }

    def text_positions(self, mask: Tensor) -> dict[str, Tensor]:
        """Return the positions of the tokens under a padding mask `(batch, tokens)` as the argument of a forward;
        nothing where the model has a rule of its own.
        """
        if hasattr(getattr(self.bed.model, "base_model", None), "get_rope_index"):
            return {}
        return {"position_ids": (mask.cumsum(dim=1) - 1).clamp(min=0)}


def _about_images(sample: Sample) -> Sample:
    spans = (Span(number) for number, part in enumerate(sample.context) if not isinstance(part, str))
    return replace(sample, evidence=tuple(spans))


def continued(inputs: Mapping[str, Tensor], new: Tensor) -> dict[str, Tensor]:
    """Return inputs of a model with text tokens `(batch, tokens)` behind the prompts."""
    prompt = inputs["input_ids"]
    added = {"input_ids": new, "attention_mask": torch.ones_like(new)}
    return {
        name: torch.cat([value, added.get(name, torch.zeros_like(new)).to(value.dtype)], dim=1)
        if value.shape == prompt.shape
        else value
        for name, value in inputs.items()
    }


def make_batches(
    bed: LoadedTestbed,
    name: Callable[[int], str],
    samples: Sequence[Sample],
    size: int,
    mode: QueryMode,
    numbers: Sequence[int] | None = None,
) -> Iterator[Batch]:
    """Yield the samples in batches of similar length, at most `size` in each.

    Args:
        bed: who is asked.
        name: what a message calls the sample with a number.
        samples: what is asked.
        size: of a batch.
        mode: when the cache is compressed.
        numbers: of the samples in their source, by default from 0.

    With `question_later` the samples of a batch have questions of one length, so that their contexts end in the same
    column.

    Raises:
        InputError: naming a sample that has no question of its own, with `question_later`, or that the model's
            processor does not take.
    """
    known = range(len(samples)) if numbers is None else numbers
    lengths = [len(bed.codec.outline(sample).ids) for sample in samples]
    asked = [_count_question(bed, name(number), sample, mode) for number, sample in zip(known, samples, strict=True)]
    order = sorted(range(len(samples)), key=lambda place: (asked[place], lengths[place]))
    for question_tokens, group in groupby(order, key=asked.__getitem__):
        places = tuple(group)
        for start in range(0, len(places), size):
            chosen = places[start : start + size]
            rows = tuple(samples[place] for place in chosen)
            chosen_numbers = tuple(known[place] for place in chosen)
            yield Batch(bed, name, chosen_numbers, rows, _encode(bed, name, chosen_numbers, rows), question_tokens)


def _encode(
    bed: LoadedTestbed, name: Callable[[int], str], numbers: Sequence[int], rows: Sequence[Sample]
) -> dict[str, Tensor]:
    """Return the inputs of a batch; an error names the sample that it is about."""
    try:
        return bed.encode(rows)
    except InputError:
        for number, row in zip(numbers, rows, strict=True):
            _encode_one(bed, name(number), row)
        raise


def _encode_one(bed: LoadedTestbed, name: str, sample: Sample) -> None:
    try:
        bed.encode([sample])
    except InputError as error:
        raise InputError(f"{name}: {error}") from error


def _count_question(bed: LoadedTestbed, name: str, sample: Sample, mode: QueryMode) -> int:
    if mode is QueryMode.question_seen:
        return 0
    if not sample.question:
        raise InputError(f"question_later needs a question apart from the context, and {name} has none")
    return bed.codec.count_question(sample)
