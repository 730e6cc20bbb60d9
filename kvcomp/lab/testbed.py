"""A testbed: a model with what turns samples into its inputs and its output into text."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForImageTextToText, AutoProcessor

from kvcomp.core.errors import InputError
from kvcomp.lab.tasks import Sample


@dataclass(frozen=True)
class LoadedTestbed:
    """A model that answers samples.

    Attributes:
        name: as registered.
        model: a Hugging Face model in evaluation mode.
        encode: returns the inputs of `model.generate` for a batch of samples, padded on the left.
        decode: returns the text of each row of new token ids, special tokens left out.
    """

    name: str
    model: Any
    encode: Callable[[Sequence[Sample]], Mapping[str, Tensor]]
    decode: Callable[[Tensor], list[str]]


def load_testbed(folder: Path) -> LoadedTestbed:
    """Return the testbed in a Hugging Face checkpoint folder, in float32.

    Raises:
        InputError: the folder is not there, or holds no such checkpoint.
    """
    if not folder.is_dir():
        raise InputError(f"a testbed must be a checkpoint folder, and this one does not exist: {folder}")
    processors: Any = AutoProcessor
    try:
        model: Any = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
        processor = processors.from_pretrained(folder)
    except (OSError, ValueError, ImportError) as error:
        raise InputError(f"the testbed in {folder} cannot be loaded: {error}") from error

    def encode(samples: Sequence[Sample]) -> Mapping[str, Tensor]:
        batch: Mapping[str, Tensor] = processor.apply_chat_template(
            [sample.messages() for sample in samples],
            tokenize=True,
            add_generation_prompt=True,
            return_dict=True,
            return_tensors="pt",
            processor_kwargs={"padding": True, "padding_side": "left"},
        )
        return batch

    def decode(ids: Tensor) -> list[str]:
        texts: list[str] = processor.batch_decode(ids, skip_special_tokens=True)
        return texts

    return LoadedTestbed(folder.name, model.eval(), encode, decode)
