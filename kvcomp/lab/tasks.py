"""What an experiment asks of a model: a task gives samples, a sample gives a prompt and its answer."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

from PIL import Image

Part = str | Image.Image


@dataclass(frozen=True)
class Sample:
    """One question about one context.

    Attributes:
        context: text and images in the order in which the model reads them.
        question: asked after the context.
        answer: the whole reference answer, its fixed lead included (`answer : red`). The lead is there because the
            first token after a prefill is still computed from the full cache and would measure nothing.
    """

    context: tuple[Part, ...]
    question: str
    answer: str

    def messages(self) -> list[dict[str, Any]]:
        """Return the prompt as one user message, in the form that `processor.apply_chat_template` takes."""
        content: list[dict[str, Any]] = [
            {"type": "text", "text": part} if isinstance(part, str) else {"type": "image", "image": part}
            for part in (*self.context, self.question)
        ]
        return [{"role": "user", "content": content}]


class Task(ABC):
    """A named source of samples with a rule that scores a prediction.

    `sample(split, index)` is deterministic, and different splits never share a random seed.
    """

    name: ClassVar[str]

    @abstractmethod
    def sample(self, split: str, index: int) -> Sample:
        """Return the sample with this index in a split (`train`, `test`, ...)."""

    def exact_match(self, prediction: str, sample: Sample) -> bool:
        """Return whether the prediction is the whole reference answer, white space aside."""
        return prediction.split() == sample.answer.split()
