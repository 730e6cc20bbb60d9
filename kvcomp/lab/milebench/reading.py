"""Reading one annotation file with its images: everything is checked at once, before a sample is used.

What the files may hold although it looks odd: numbers and references in either type, instructions as a list or a
mapping, an empty question type, a repeated placeholder, an image that nothing names, image paths from the task's folder
or from the `images` folder in it. Everything else that is wrong is a fault, named with file, sample and key.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import ValidationError

from kvcomp.core.errors import DataError, InputError
from kvcomp.lab.milebench.image_files import ImageFolder
from kvcomp.lab.milebench.names import MULTIPLE_CHOICE, official_metric
from kvcomp.lab.milebench.prompts import PlaceholderPolicy, Truncation
from kvcomp.lab.milebench.schema import PLACEHOLDER, Annotation, Meta, Model
from kvcomp.lab.scoring import normalise_official

M = TypeVar("M", bound=Model)
ImageMode = Literal["separate", "combined"]
COMBINED = "combined_1_images"
"""Key of the file that shows all images of a sample, and the folder that holds it."""


@dataclass(frozen=True)
class Reading:
    """How prompts are built; it belongs into every result file.

    Attributes:
        placeholder_policy: which image a placeholder shows.
        truncation: what is cut; None keeps everything.
        images: whether every image is shown by itself, or all as one.
    """

    placeholder_policy: PlaceholderPolicy = "by_index"
    truncation: Truncation | None = None
    images: ImageMode = "separate"

    @property
    def plain(self) -> bool:
        """Return whether samples that kvcomp exported come back as they were."""
        return self == Reading()

    def describe(self) -> dict[str, Any]:
        """Return the settings that a result file records."""
        cut = self.truncation
        return {
            "placeholder_policy": self.placeholder_policy,
            "images": self.images,
            "max_context_len": cut and cut.max_context_len,
            "tokens_per_image": cut and cut.tokens_per_image,
        }


@dataclass(frozen=True)
class Item:
    """One checked sample.

    Attributes:
        annotation: its annotation.
        images: its image files, in the order of `images_path`.
        combined: the file that shows them all, in combined mode; None where it has to be drawn.
    """

    annotation: Annotation
    images: tuple[Path, ...]
    combined: Path | None = None


@dataclass(frozen=True)
class AnnotationFile:
    """One checked file. Path and checksum are its hash: what they determine holds mappings.

    Attributes:
        path: the file.
        meta: its meta data.
        items: its samples.
        sha256: checksum of the file as it was read.
    """

    path: Path
    meta: Meta = field(hash=False)
    items: tuple[Item, ...] = field(hash=False)
    sha256: str


@dataclass(frozen=True)
class Document:
    """What a JSON file holds, and the file's checksum."""

    content: Any
    sha256: str


def load_json(path: Path) -> Document:
    """Return the document in a JSON file.

    Raises:
        InputError: the file cannot be read, or is no JSON.
    """
    try:
        raw = path.read_bytes()
        return Document(json.loads(raw.decode("utf-8-sig")), hashlib.sha256(raw).hexdigest())
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"must be a JSON file that can be read: {error}") from None


def read_annotations(path: Path, name: str, document: Document, reading: Reading) -> AnnotationFile:
    """Return the samples of a task's file, checked with their images.

    Args:
        path: the file; image paths start beside it.
        name: the task's name, which decides the official metric.
        document: what the file holds.
        reading: how prompts will be built.

    Raises:
        DataError: with every fault of the file and its images.
    """
    faults: list[str] = []
    parts = _top_level(document.content, faults)
    meta = None if parts is None else _parse(Meta, parts[0], "meta_data", faults)
    if parts is None:
        raise DataError(faults, str(path))
    if meta is not None:
        faults += _meta_faults(meta, name, reading)
    find = _ImageFinder(path.parent, reading.images)
    items = []
    for position, record in enumerate(parts[1]):
        label, found = _label(record, position), list[str]()
        annotation = _parse(Annotation, record, "", found)
        if annotation is not None:
            found += _sample_faults(annotation, meta, name, reading)
            items.append(find.item(annotation, found))
        faults += [f"{label}: {fault}" for fault in found]
    faults += _repeated(items)
    if faults or meta is None:
        raise DataError(faults, str(path))
    return AnnotationFile(path, meta, tuple(items), document.sha256)


class _ImageFinder:
    """Finds what an image mode shows of the samples of one file."""

    def __init__(self, folder: Path, mode: ImageMode) -> None:
        self._separate = ImageFolder(folder)
        self._combined = ImageFolder(folder, COMBINED, COMBINED) if mode == "combined" else None

    def item(self, annotation: Annotation, faults: list[str]) -> Item:
        """Return a sample with its files; what is wrong with them is added to the faults."""
        instance = annotation.task_instance
        if self._combined is not None and not (instance.combined_1_images or instance.images_path):
            faults.append("task_instance: combined mode must have an image to show, and this sample has none")
        if self._combined is None or instance.combined_1_images is None:
            return Item(annotation, self._separate.find_all(instance.images_path, faults))
        if len(instance.combined_1_images) != 1:
            faults.append(f"task_instance.{COMBINED}: must name one image, got {len(instance.combined_1_images)}")
            return Item(annotation, ())
        return Item(annotation, (), *self._combined.find_all(instance.combined_1_images, faults))


def _top_level(document: Any, faults: list[str]) -> tuple[Any, list[Any]] | None:
    """Return meta data and records of a file, or None with the faults added."""
    if not isinstance(document, dict):
        faults.append(f"must be an object with the keys meta_data and data, got {_short(document)}")
        return None
    faults += [f"{key}: is missing" for key in ("meta_data", "data") if key not in document]
    records = document.get("data", [])
    if not isinstance(records, list):
        faults.append(f"data: must be a list of samples, got {_short(records)}")
    elif not records and "data" in document:
        faults.append("data: must hold at least one sample")
    return None if faults else (document["meta_data"], records)


def _parse(model: type[M], record: Any, at: str, faults: list[str]) -> M | None:
    """Return a record as a model, or None with the faults added. JSON again, so that a list may be a tuple."""
    try:
        return model.model_validate_json(json.dumps(record))
    except ValidationError as error:
        faults += [_describe(at, dict(detail)) for detail in error.errors(include_url=False)]
        return None


def _describe(at: str, detail: dict[str, Any]) -> str:
    """Return one error of pydantic as `key: what must hold, what was given`."""
    path = at
    for key in detail["loc"]:
        path += f"[{key}]" if isinstance(key, int) else f".{key}" if path else str(key)
    if detail["type"] == "missing":
        return f"{path}: is missing"
    message = detail["msg"].removeprefix("Value error, ").replace("Input should be", "must be")
    given = "" if detail["type"] == "value_error" else f", got {_short(detail['input'])}"
    return f"{path}: {message}{given}" if path else f"{message}{given}"


def _meta_faults(meta: Meta, name: str, reading: Reading) -> Iterator[str]:
    by_type = meta.metric is None and official_metric(name) == "rouge_l_official"  # the name decides nothing
    if by_type and meta.question_type not in ("open-ended", MULTIPLE_CHOICE, ""):
        yield f"meta_data.question_type: must be 'open-ended', '{MULTIPLE_CHOICE}' or empty, got {meta.question_type!r}"
    if reading.truncation is None:
        return
    for number, instruction in meta.task_instruction.items():
        if reading.truncation.budget(instruction) <= 0:
            length = reading.truncation.max_context_len
            yield f"meta_data.task_instruction[{number}]: leaves nothing of max_context_len={length}; use a larger one"


def _sample_faults(annotation: Annotation, meta: Meta | None, name: str, reading: Reading) -> Iterator[str]:
    instance = annotation.task_instance
    if meta is not None and annotation.task_instruction_id not in meta.task_instruction:
        known = ", ".join(map(str, meta.task_instruction)) or "none"
        yield f"task_instruction_id: must be one of {known}, got {annotation.task_instruction_id}"
    if meta is not None and meta.metric is None:
        yield from _answer_faults(annotation, official_metric(name, meta.question_type))
    if reading.placeholder_policy == "by_index" and reading.images == "separate":
        yield from _placeholder_faults(instance.context, len(instance.images_path))


def _answer_faults(annotation: Annotation, metric: str) -> Iterator[str]:
    answer, choices = normalise_official(annotation.response), annotation.task_instance.choice_list or ()
    if not answer.strip(" ."):  # normalisation leaves periods beyond the first 32
        yield f"response: must hold more than punctuation, got {annotation.response!r}"
    elif metric == "multi_choice_official" and not choices:
        yield "task_instance.choice_list: must hold the choices of a multiple-choice question, got none"
    elif metric == "multi_choice_official" and answer not in map(normalise_official, choices):
        yield f"response: must be one of the {len(choices)} choices of choice_list, got {_short(annotation.response)}"


def _placeholder_faults(context: str, images: int) -> Iterator[str]:
    for match in {match[0]: match for match in PLACEHOLDER.finditer(context)}.values():
        if not 1 <= int(match[1]) <= images:
            yield (
                f"task_instance.context: {match[0]} must name one of the {images} images of images_path, counted from "
                "1; the placeholder policy 'official' reads it as MileBench does"
            )


def _repeated(items: list[Item]) -> list[str]:
    counts = Counter(item.annotation.sample_id for item in items)
    often = {number: count for number, count in counts.items() if count > 1}
    return [f"sample {number}: sample_id: must be unique, got {count} of it" for number, count in often.items()]


def _label(record: Any, position: int) -> str:
    """Return what a sample is called in a fault: its id, or where it stands in the file."""
    number = record.get("sample_id") if isinstance(record, dict) else None
    return f"sample {number}" if isinstance(number, int | str) else f"data[{position}]"


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
