"""A testbed: a model, what turns samples into its inputs and its output into text, and what it has learned."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForImageTextToText, AutoProcessor

from kvcomp.core.errors import InputError
from kvcomp.lab.codec import Codec
from kvcomp.lab.records import TaskRecord, read_records
from kvcomp.lab.tasks import Sample
from kvcomp.runtime.adapter import adapter_for

FAILURES = (OSError, ValueError, ImportError)


@dataclass(frozen=True)
class LoadedTestbed:
    """A model that answers samples.

    Attributes:
        name: as registered, or the name of its folder.
        model: a Hugging Face model in evaluation mode.
        codec: its processor.
        records: how it answers with the full cache, by the names of the tasks; empty where nobody has measured it.
    """

    name: str
    model: Any
    codec: Codec
    records: Mapping[str, TaskRecord] = field(default_factory=dict)

    def encode(self, samples: Sequence[Sample]) -> dict[str, Tensor]:
        """Return the inputs of `model.generate` for a batch of samples, padded on the left, on the model's device."""
        encoded = self.codec.encode(samples)
        return {name: value.to(self.model.device) for name, value in encoded.items()}

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """Return the tokens that end an answer; empty where only its length does."""
        given = self.model.generation_config.eos_token_id
        return () if given is None else tuple(given) if isinstance(given, list | tuple) else (given,)

    def visual(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """Return which tokens stand for images, `(batch, tokens)` bool."""
        modality = adapter_for(self.model.config).modality(inputs)
        return torch.zeros_like(inputs["input_ids"], dtype=torch.bool) if modality is None else modality > 0


def load_testbed(
    folder: Path,
    device: torch.device | str = "cpu",
    *,
    dtype: str = "float32",
    codec: Codec | None = None,
    device_map: str | None = None,
) -> LoadedTestbed:
    """Return the testbed in a Hugging Face checkpoint folder.

    Args:
        folder: holds the checkpoint.
        device: where the model goes.
        dtype: of its weights; `auto` is that of the checkpoint.
        codec: its processor, where it was loaded before; see `load_codec`.
        device_map: lets `accelerate` place the layers on several devices instead (`auto`).

    Raises:
        InputError: the folder is not there, or holds no such checkpoint, or a malformed `tasks.json`.
    """
    _check_folder(folder)
    records = read_records(folder)
    codec = codec or load_codec(folder)
    try:
        model: Any = AutoModelForImageTextToText.from_pretrained(folder, dtype=dtype, device_map=device_map)
    except FAILURES as error:
        raise InputError(f"the testbed in {folder} cannot be loaded: {error}") from error
    placed = model if device_map else model.to(device)
    return LoadedTestbed(folder.name, placed.eval(), codec, records)


def load_codec(folder: Path, *, min_pixels: int | None = None, max_pixels: int | None = None) -> Codec:
    """Return the processor in a Hugging Face checkpoint folder.

    Args:
        folder: holds the checkpoint.
        min_pixels: an image with fewer is enlarged; None for what the checkpoint says. Only where its image processor
            knows such a limit, as Qwen's do.
        max_pixels: an image with more is made smaller; likewise.

    Raises:
        InputError: the folder is not there, or holds no processor, or one whose images have no such limit.
    """
    _check_folder(folder)
    codec = _load_codec(folder)
    limits = {"shortest_edge": min_pixels, "longest_edge": max_pixels}  # what transformers calls them
    given = {name: value for name, value in limits.items() if value is not None}
    if not given:
        return codec
    if not codec.counts_pixels:
        raise InputError(
            f"--min-pixels and --max-pixels need an image processor that counts pixels, and that in {folder} "
            f"({codec.describe_images()['image_processor']}) does not"
        )
    return _load_codec(folder, size=codec.describe_images()["size"] | given)


def _load_codec(folder: Path, **settings: Any) -> Codec:
    processors: Any = AutoProcessor
    try:
        return Codec(processors.from_pretrained(folder, **settings))
    except FAILURES as error:
        raise InputError(f"the testbed in {folder} cannot be loaded: {error}") from error


def _check_folder(folder: Path) -> None:
    if not folder.is_dir():
        raise InputError(f"a testbed must be a checkpoint folder, and this one does not exist: {folder}")
