"""What an experiment asks of a model: a task gives samples, a sample gives a prompt and its answer."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

from PIL import Image

from kvcomp.lab.scoring import exact_match

Part = str | Image.Image


@dataclass(frozen=True)
class Span:
    """A stretch of a sample's context: words of a text, or visual tokens of an image in reading order. The whole of an
    image comes with the marks that the prompt has around it.

    Attributes:
        part: which part of the context.
        start: the first word or visual token.
        stop: the one after the last; None for the end of the part.
    """

    part: int
    start: int = 0
    stop: int | None = None


@dataclass(frozen=True)
class Sample:
    """One question about one context.

    Attributes:
        context: text and images in the order in which the model reads them.
        question: asked after the context; empty where the context ends with it and the two cannot be told apart.
        answer: the whole reference answer. It carries its information after its first token, which is still computed
            from the full cache and would measure nothing.
        evidence: what of the context the answer rests on; empty where it is not known.
        slots: the words of the answer that carry its information, by number; empty where all do.
        depth: how deep the evidence stands in the context, from 0 to 1; None where the task has no such grid.
        choices: what a multiple-choice question offers, and its context lists; the answer is one of them.
    """

    context: tuple[Part, ...]
    question: str
    answer: str
    evidence: tuple[Span, ...] = ()
    slots: tuple[int, ...] = ()
    depth: float | None = None
    choices: tuple[str, ...] = ()

    def messages(self) -> list[dict[str, Any]]:
        """Return the prompt as one user message, in the form that `processor.apply_chat_template` takes."""
        content: list[dict[str, Any]] = [
            {"type": "text", "text": part} if isinstance(part, str) else {"type": "image", "image": part}
            for part in (*self.context, *([self.question] if self.question else []))
        ]
        return [{"role": "user", "content": content}]


class Task(ABC):
    """A named source of samples with a rule that scores a prediction.

    `sample(split, index)` is deterministic, and different splits never share a random seed.
    """

    name: str
    metric: str = "exact match"  # what `score` measures
    size: int | None = None  # how many samples there are; None where there is always one more
    max_new_tokens: int = 16  # length of an answer at most

    @property
    def id(self) -> str:
        """Return the name without the prefix that tells whose task it is: `recall` of `mini/recall`."""
        return self.name.rpartition("/")[2]

    @property
    def hard(self) -> bool:
        """Return whether this is the harder variant of another task, asked only by name: its own ends with `_hard`."""
        return self.name.endswith("_hard")

    @abstractmethod
    def sample(self, split: str, index: int) -> Sample:
        """Return the sample with this index in a split (`train`, `test`, ...)."""

    def name_sample(self, split: str, index: int) -> str:
        """Return what a message calls a sample."""
        return f"sample {index} of {self.name}, split {split}"

    def describe(self) -> dict[str, Any]:
        """Return what a result file records of the task: all that decides its samples and its score."""
        return {"name": self.name, "metric": self.metric, "max_new_tokens": self.max_new_tokens}

    def exact_match(self, prediction: str, sample: Sample) -> bool:
        """Return whether the prediction is the whole reference answer, white space aside."""
        return bool(exact_match(prediction, sample.answer))

    def score(self, prediction: str, sample: Sample) -> float:
        """Return the score of a prediction, between 0 and 1, by the task's own metric."""
        return float(self.exact_match(prediction, sample))

    def scores(self, prediction: str, sample: Sample) -> dict[str, float]:
        """Return every score that the task offers, by the name of its metric; its own comes first."""
        return {self.metric: self.score(prediction, sample)}
