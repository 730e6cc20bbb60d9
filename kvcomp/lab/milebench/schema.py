"""The annotation file of a MileBench task, as pydantic models.

Keys that kvcomp does not read (`images_number`, ...) are allowed. Five keys of a task instance and two of the meta data
are kvcomp's own; the exporter writes them so that a sample comes back as it was, and MileBench's scripts do not look at
them: `question`, `parts`, `evidence`, `slots`, `depth`, `metric`, and `max_new_tokens`.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from kvcomp.lab.scoring import SCORERS
from kvcomp.lab.tasks import Span

PLACEHOLDER = re.compile(r"\{(?:image|table)#([0-9]{1,9})\}")
"""Stands for an image or a rendered table in a context; both share one numbering, from 1."""


def _to_number(value: Any) -> Any:
    """Return a text of digits as a number: MileBench's scorer applies `int()`."""
    return int(value) if isinstance(value, str) and re.fullmatch("[0-9]{1,9}", value) else value


def _to_text(value: Any) -> Any:
    """Return a number as text: MileBench's scorer applies `str()`."""
    return str(value) if isinstance(value, int | float) and not isinstance(value, bool) else value


def _to_numbered(value: Any) -> Any:
    """Return a list as a mapping from positions."""
    return dict(enumerate(value)) if isinstance(value, list) else value


Number = Annotated[int, BeforeValidator(_to_number)]
Instructions = Annotated[dict[Number, str], BeforeValidator(_to_numbered)]


class Model(BaseModel):
    """Base of the models: types are strict, unknown keys are left out."""

    model_config = ConfigDict(frozen=True, strict=True, extra="ignore")


class Meta(Model):
    """`meta_data` of a file.

    Attributes:
        dataset: name of the task.
        split: which part of the benchmark.
        num_sample: how many samples the file's author counted.
        task_instruction: paraphrases of the instruction, by number; a list or a mapping in the file.
        question_type: `open-ended`, also where it is empty or missing, or `multi-choice`.
        metric: name of a scorer; None where MileBench's rule for name and question type decides.
        max_new_tokens: length of an answer at most; None for what MileBench's scripts allow.
    """

    dataset: str = ""
    split: str = ""
    num_sample: int | None = None
    task_instruction: Instructions
    question_type: str = ""
    metric: str | None = None
    max_new_tokens: Annotated[int, Field(ge=1)] | None = None

    @model_validator(mode="after")
    def _check_metric(self) -> Meta:
        if self.metric is not None and self.metric not in SCORERS:
            raise ValueError(f"metric must be one of {', '.join(SCORERS)}, got {self.metric!r}")
        return self


class TaskInstance(Model):
    """`task_instance` of a sample.

    Attributes:
        context: text with placeholders; MileBench's question is the end of it.
        images_path: image files; the k-th belongs to placeholder k.
        choice_list: what a multiple-choice question offers; it follows the context.
        combined_1_images: one image file that shows all images of the sample, in a list.
        question: the end of the context, where it is known to be a part of its own.
        parts: the context without the question, part by part; an image is its placeholder.
        evidence: what of the parts the answer rests on.
        slots: the words of the answer that carry its information, by number.
        depth: how deep the evidence stands in the context, from 0 to 1.
    """

    context: str
    images_path: tuple[str, ...]
    choice_list: tuple[str, ...] | None = None
    combined_1_images: tuple[str, ...] | None = None
    question: str | None = None
    parts: tuple[str, ...] | None = None
    evidence: tuple[Span, ...] = ()
    slots: tuple[int, ...] = ()
    depth: Annotated[float, Field(ge=0, le=1)] | None = None

    @model_validator(mode="after")
    def _check_parts(self) -> TaskInstance:
        if (self.parts is None) != (self.question is None):
            raise ValueError("question and parts must come together; one of them is missing")
        if self.parts is not None and join_context(self.parts, self.question or "") != self.context:
            raise ValueError("context must be the parts and the question with spaces between; it differs")
        wrong = [span for span in self.evidence if not _holds(span, len(self.parts or ()))]
        if wrong:
            raise ValueError(f"evidence must lie in one of the {len(self.parts or ())} parts, got {wrong[0]}")
        return self


class Annotation(Model):
    """One sample of a file.

    Attributes:
        sample_id: its number.
        task_instruction_id: which paraphrase of the instruction it is asked with.
        task_instance: the prompt.
        response: the reference answer; a number becomes text. Several answers are joined by `. `.
        image_quantity_level: by the number of images.
    """

    sample_id: Number
    task_instruction_id: Number
    task_instance: TaskInstance
    response: Annotated[str, BeforeValidator(_to_text)]
    image_quantity_level: Literal["Few", "Medium", "Many"]

    @model_validator(mode="after")
    def _check_answer(self) -> Annotation:
        words = len(self.response.split())
        if not words:
            raise ValueError("response must not be empty: nothing could be scored against it")
        if any(not 0 <= slot < words for slot in self.task_instance.slots):
            raise ValueError(f"slots must be numbers of the {words} words of the response, counted from 0")
        return self


def join_context(parts: tuple[str, ...], question: str) -> str:
    """Return the context of a sample whose parts are known.

    >>> join_context(("red", "{image#1}"), "which ?")
    'red {image#1} which ?'
    """
    return " ".join((*parts, question) if question else parts)


def _holds(span: Span, parts: int) -> bool:
    return 0 <= span.part < parts and span.start >= 0 and (span.stop is None or span.start < span.stop)
