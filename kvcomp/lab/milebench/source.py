"""Tasks in a folder as an experiment names them: which ones, and how their prompts are built."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from kvcomp.core.errors import ConfigError
from kvcomp.lab.codec import Codec
from kvcomp.lab.milebench.folder import Opened, open_folder
from kvcomp.lab.milebench.prompts import PlaceholderPolicy, Truncation
from kvcomp.lab.milebench.reading import ImageMode, Reading

PREFIX = "milebench:"
"""Begins the name of a folder where tasks are named: `milebench:FOLDER`, or `milebench:FOLDER#IEdit,STD`."""

Positive = Annotated[int, Field(ge=1)]


def _to_path(value: Any) -> Any:
    return Path(value).expanduser() if isinstance(value, str) else value


def _to_tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


class TaskFolder(BaseModel):
    """A folder of tasks in MileBench's format, and what a prompt is made of.

    The context policy belongs to every number that comes out: without a limit nothing is cut, whatever the model was
    trained for. With one, MileBench's rule holds: instruction and end stay, the middle goes, text by text and image by
    image.

    Attributes:
        folder: holds the tasks' folders, or a folder `MileBench` that does.
        tasks: names by any alias; None for all of the seven that are there and all that kvcomp exported.
        placeholders: which image a placeholder shows.
        images: whether every image is shown by itself, or all as one (MileBench's combined mode).
        max_context_len: tokens of the prompt at most, chat template and answer not counted; None cuts nothing.
        tokens_per_image: tokens that an image counts for there.
    """

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid")

    folder: Annotated[Path, BeforeValidator(_to_path)]
    tasks: Annotated[tuple[str, ...] | None, BeforeValidator(_to_tuple)] = None
    placeholders: PlaceholderPolicy = "by_index"
    images: ImageMode = "separate"
    max_context_len: Positive | None = None
    tokens_per_image: Positive | None = None

    @model_validator(mode="after")
    def _check_limits(self) -> TaskFolder:
        if (self.max_context_len is None) != (self.tokens_per_image is None):
            raise ValueError("max_context_len and tokens_per_image must be given together; one of them is missing")
        return self

    @classmethod
    def parse(cls, text: str, **settings: Any) -> TaskFolder:
        """Return the folder that `milebench:FOLDER` or `milebench:FOLDER#TASK,TASK` names, with further settings.

        Raises:
            ConfigError: listing every setting that is wrong.

        >>> TaskFolder.parse("milebench:data#IEdit,STD").tasks
        ('IEdit', 'STD')
        """
        folder, _, names = text.removeprefix(PREFIX).partition("#")
        tasks = tuple(filter(None, map(str.strip, names.split(",")))) or None
        return cls.of({"folder": folder, "tasks": tasks} | settings)

    @classmethod
    def of(cls, settings: dict[str, Any]) -> TaskFolder:
        """Return the folder that plain data describe.

        Raises:
            ConfigError: listing every setting that is wrong.
        """
        try:
            return cls.model_validate(settings)
        except ValidationError as error:
            faults = [
                f"{'.'.join(map(str, fault['loc'])) or 'folder of tasks'}: {fault['msg'].removeprefix('Value error, ')}"
                for fault in error.errors(include_url=False)
            ]
            raise ConfigError(faults, source="folder of tasks") from None

    @property
    def cuts(self) -> bool:
        """Return whether prompts are cut, which takes the model's tokenizer."""
        return self.max_context_len is not None

    def open(self, codec: Codec | None = None, advance: Callable[[str], None] = lambda name: None) -> Opened:
        """Return the tasks, every file and every image checked.

        Args:
            codec: of the model, where prompts are cut.
            advance: told the name of each task before it is read.

        Raises:
            InputError: there is no such folder, or nothing in it that can be read.
            DataError: with every fault of every task, each with file, sample and key.
        """
        reading = Reading(self.placeholders, self._truncation(codec), self.images)
        return open_folder(self.folder, self.tasks, reading=reading, advance=advance)

    def _truncation(self, codec: Codec | None) -> Truncation | None:
        if self.max_context_len is None or self.tokens_per_image is None:
            return None
        assert codec is not None
        return Truncation(self.max_context_len, self.tokens_per_image, codec.encode_text, codec.decode_text)


def is_task_folder(name: str) -> bool:
    """Return whether a task's name names a folder of tasks."""
    return name.startswith(PREFIX)
