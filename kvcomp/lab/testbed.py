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

    def visual(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """Return which tokens stand for images, `(batch, tokens)` bool."""
        modality = adapter_for(self.model.config).modality(inputs)
        return torch.zeros_like(inputs["input_ids"], dtype=torch.bool) if modality is None else modality > 0


def load_testbed(folder: Path, device: torch.device | str = "cpu") -> LoadedTestbed:
    """Return the testbed in a Hugging Face checkpoint folder, in float32.

    Raises:
        InputError: the folder is not there, or holds no such checkpoint, or a malformed `tasks.json`.
    """
    if not folder.is_dir():
        raise InputError(f"a testbed must be a checkpoint folder, and this one does not exist: {folder}")
    records = read_records(folder)
    processors: Any = AutoProcessor
    try:
        model: Any = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
        processor = processors.from_pretrained(folder)
    except (OSError, ValueError, ImportError) as error:
        raise InputError(f"the testbed in {folder} cannot be loaded: {error}") from error
    return LoadedTestbed(folder.name, model.to(device).eval(), Codec(processor), records)
