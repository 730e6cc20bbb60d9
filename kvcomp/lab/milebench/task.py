"""A MileBench task read from disk: its samples, its prompts, its official score."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from kvcomp.core.errors import InputError
from kvcomp.lab.images import open_image
from kvcomp.lab.milebench.names import official_metric
from kvcomp.lab.milebench.prompts import Prompt, build_prompt
from kvcomp.lab.milebench.reading import AnnotationFile, Item, Reading
from kvcomp.lab.milebench.schema import PLACEHOLDER, TaskInstance
from kvcomp.lab.scoring import SCORERS, needle_lenient
from kvcomp.lab.tasks import Part, Sample, Task

TRAIN = "train"


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
    """

    name: str
    file: AnnotationFile = field(repr=False)
    reading: Reading = field(default_factory=Reading)
    metric: str = field(init=False)
    size: int = field(init=False)  # type: ignore[assignment]

    def __post_init__(self) -> None:
        object.__setattr__(self, "metric", self.file.meta.metric or official_metric(self.name))
        object.__setattr__(self, "size", len(self.file.items))

    def sample(self, split: str, index: int) -> Sample:
        """Return the sample at this place of the file.

        A sample that kvcomp exported comes back as it was. Any other has the instruction and the whole context,
        question included, as its context. So has every sample under the policy `official` and under truncation: that
        is what MileBench's scripts show.

        Raises:
            InputError: there is no such sample, or the split is `train`, or an image was damaged since it was checked.
        """
        if split == TRAIN:
            raise InputError(f"{self.name} is a benchmark and has no split 'train'; train on something else")
        if not 0 <= index < self.size:
            raise InputError(f"{self.name} has {self.size} samples, 0 to {self.size - 1}, and no sample {index}")
        item = self.file.items[index]
        try:
            return self._as_exported(item) if self._is_exported(item) else self._as_shown(item)
        except InputError as error:
            raise InputError(f"{self.file.path}: sample {item.annotation.sample_id}: {error}") from None

    def sample_id(self, index: int) -> int:
        """Return the number that MileBench's result files know a sample by."""
        return self.file.items[index].annotation.sample_id

    def score(self, prediction: str, sample: Sample) -> float:
        """Return the official score of a prediction."""
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
        count = len(instance.images_path)
        return build_prompt(instance.context, count, instruction, reading.placeholder_policy, reading.truncation)

    def summary(self) -> dict[str, int]:
        """Return the number of samples, images shown, repeated placeholders, and images that nothing names."""
        counts: Counter[str] = Counter(samples=self.size, images=0, repeated=0, unused=0)
        for item in self.file.items:
            counts.update(_count_images(item.annotation.task_instance))
        return dict(counts)

    def _is_exported(self, item: Item) -> bool:
        plain = self.reading.placeholder_policy == "by_index" and self.reading.truncation is None
        return plain and item.annotation.task_instance.parts is not None

    def _as_exported(self, item: Item) -> Sample:
        annotation = item.annotation
        instance = annotation.task_instance
        context = tuple(_open_part(part, item) for part in instance.parts or ())
        return Sample(
            context,
            instance.question or "",
            annotation.response,
            instance.evidence,
            instance.slots,
            instance.depth,
        )

    def _as_shown(self, item: Item) -> Sample:
        prompt = self.prompt(item)
        images: Sequence[Part] = [open_image(item.images[number]) for number in prompt.images if number is not None]
        between = [part for pair in zip(images, prompt.texts[1:], strict=True) for part in pair]
        context = tuple(part for part in (prompt.texts[0], *between) if part != "")
        return Sample(context, "", item.annotation.response)


def _open_part(part: str, item: Item) -> Part:
    match = PLACEHOLDER.fullmatch(part)
    return open_image(item.images[int(match[1]) - 1]) if match else part


def _count_images(instance: TaskInstance) -> dict[str, int]:
    named = [int(match[1]) for match in PLACEHOLDER.finditer(instance.context)]
    unused = set(range(1, len(instance.images_path) + 1)) - set(named)
    return {"images": len(named), "repeated": len(named) - len(set(named)), "unused": len(unused)}
