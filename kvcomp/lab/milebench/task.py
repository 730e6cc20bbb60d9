"""A MileBench task read from disk: its samples, its prompts, its official score."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from kvcomp.core.errors import InputError
from kvcomp.lab.images import open_image
from kvcomp.lab.milebench.grid import draw_grid
from kvcomp.lab.milebench.names import official_metric
from kvcomp.lab.milebench.prompts import Prompt, add_choices, build_combined, build_prompt
from kvcomp.lab.milebench.reading import AnnotationFile, Item, Reading
from kvcomp.lab.milebench.schema import PLACEHOLDER, TaskInstance
from kvcomp.lab.scoring import SCORERS, multi_choice_official, needle_lenient
from kvcomp.lab.tasks import Part, Sample, Task

TRAIN = "train"
MAX_NEW_TOKENS = 512
"""What MileBench's scripts allow an answer."""

Piece = str | int
"""What a prompt is made of: a text, or the place of an image in `MileBenchTask.image_files`."""


@dataclass(frozen=True)
class MileBenchTask(Task):
    """The samples of one annotation file, scored by MileBench's own rule.

    There is one set of samples, for testing: every split is that set, and the split `train` is refused. Images are read
    when a sample is asked for.

    Attributes:
        name: MileBench's name of it; of exported samples the name of the task that they came from.
        file: the checked annotations.
        reading: how prompts are built.
        metric: name of the official scorer.
        size: how many samples there are.
        max_new_tokens: length of an answer at most: 512 as in MileBench's scripts, of exported samples the task's own.
    """

    name: str
    file: AnnotationFile = field(repr=False)
    reading: Reading = field(default_factory=Reading)
    metric: str = field(init=False)
    size: int = field(init=False)  # type: ignore[assignment]
    max_new_tokens: int = field(init=False)

    def __post_init__(self) -> None:
        meta = self.file.meta
        object.__setattr__(self, "metric", meta.metric or official_metric(self.name, meta.question_type))
        object.__setattr__(self, "size", len(self.file.items))
        object.__setattr__(self, "max_new_tokens", meta.max_new_tokens or MAX_NEW_TOKENS)

    def sample(self, split: str, index: int) -> Sample:
        """Return the sample at this place of the file.

        A sample that kvcomp exported comes back as it was. Any other has the instruction and the whole context,
        question included, as its context. So has every sample under the policy `official`, under truncation and in
        combined mode: that is what MileBench's scripts show.

        Raises:
            InputError: there is no such sample, or the split is `train`, or an image was damaged since it was checked.
        """
        if split == TRAIN:
            raise InputError(f"{self.name} is a benchmark and has no split 'train'; train on something else")
        if not 0 <= index < self.size:
            raise InputError(f"{self.name} has {self.size} samples, 0 to {self.size - 1}, and no sample {index}")
        item = self.file.items[index]
        try:
            context = tuple(
                piece if isinstance(piece, str) else self._open(item, piece) for piece in self.pieces(index)
            )
        except InputError as error:
            raise InputError(f"{self.name_sample(split, index)}: {error}") from None
        return self._as_exported(item, context) if self._is_exported(item) else self._as_shown(item, context)

    def pieces(self, index: int) -> tuple[Piece, ...]:
        """Return the context of a sample; an image is its place in `image_files`."""
        item = self.file.items[index]
        if self._is_exported(item):
            return tuple(_to_piece(part) for part in item.annotation.task_instance.parts or ())
        prompt = self.prompt(item)
        images = [number for number in prompt.images if number is not None]
        between = [piece for pair in zip(images, prompt.texts[1:], strict=True) for piece in pair]
        return tuple(piece for piece in (prompt.texts[0], *between) if piece != "")

    def image_files(self, index: int) -> tuple[str, ...]:
        """Return the images of a sample as its file names them."""
        instance = self.file.items[index].annotation.task_instance
        if self.reading.images == "separate":
            return instance.images_path
        return instance.combined_1_images or (f"drawn of {len(instance.images_path)} images",)

    def sample_id(self, index: int) -> int:
        """Return the number that MileBench's result files know a sample by."""
        return self.file.items[index].annotation.sample_id

    def name_sample(self, split: str, index: int) -> str:
        """Return the file and the number that the sample has there."""
        return f"{self.file.path}: sample {self.sample_id(index)}"

    def describe(self) -> dict[str, Any]:
        """Return what a result file records of the task: also its file's checksum, and how prompts are built."""
        return super().describe() | {"sha256": self.file.sha256, **self.reading.describe()}

    def score(self, prediction: str, sample: Sample) -> float:
        """Return the official score of a prediction."""
        if self.metric == "multi_choice_official":
            return multi_choice_official(prediction, sample.answer, sample.choices)
        return SCORERS[self.metric](prediction, sample.answer)

    def scores(self, prediction: str, sample: Sample) -> dict[str, float]:
        """Return the official score; for a needle the lenient one too."""
        more = {"needle_lenient": needle_lenient(prediction, sample.answer)} if self.metric == "needle_official" else {}
        return super().scores(prediction, sample) | more

    def prompt(self, item: Item) -> Prompt:
        """Return texts and image numbers of a sample as MileBench shows them, under policy and truncation."""
        annotation = item.annotation
        instruction = self.file.meta.task_instruction[annotation.task_instruction_id]
        instance, reading = annotation.task_instance, self.reading
        context, count = instance.context, len(instance.images_path)
        if instance.choice_list is not None:
            context = add_choices(context, instance.choice_list, self.name)
        if reading.images == "combined":
            return build_combined(context, count, instruction, reading.truncation)
        return build_prompt(context, count, instruction, reading.placeholder_policy, reading.truncation)

    def summary(self) -> dict[str, int]:
        """Return the number of samples, images shown, repeated placeholders, and images that nothing names."""
        counts: Counter[str] = Counter(samples=self.size, images=0, repeated=0, unused=0)
        for item in self.file.items:
            counts.update(_count_images(item.annotation.task_instance))
        return dict(counts)

    def _is_exported(self, item: Item) -> bool:
        return self.reading.plain and item.annotation.task_instance.parts is not None

    def _open(self, item: Item, piece: Piece) -> Part:
        if isinstance(piece, str):
            return piece
        if self.reading.images == "separate":
            return open_image(item.images[piece])
        if item.combined is not None:
            return open_image(item.combined)
        return draw_grid([open_image(path) for path in item.images])

    def _as_exported(self, item: Item, context: tuple[Part, ...]) -> Sample:
        annotation, instance = item.annotation, item.annotation.task_instance
        return Sample(
            context,
            instance.question or "",
            annotation.response,
            instance.evidence,
            instance.slots,
            instance.depth,
        )

    def _as_shown(self, item: Item, context: tuple[Part, ...]) -> Sample:
        choices = item.annotation.task_instance.choice_list or ()
        return Sample(context, "", item.annotation.response, choices=choices)


def _to_piece(part: str) -> Piece:
    match = PLACEHOLDER.fullmatch(part)
    return int(match[1]) - 1 if match else part


def _count_images(instance: TaskInstance) -> dict[str, int]:
    named = [int(match[1]) for match in PLACEHOLDER.finditer(instance.context)]
    unused = set(range(1, len(instance.images_path) + 1)) - set(named)
    return {"images": len(named), "repeated": len(named) - len(set(named)), "unused": len(unused)}
