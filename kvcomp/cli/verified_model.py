"""A model of the user's as a family of the envelope."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from kvcomp.cli.models import Source, find_model, load_model, load_processor
from kvcomp.cli.prompts import encode_prompt
from kvcomp.cli.testbeds import testbeds
from kvcomp.core.errors import InputError, suggest
from kvcomp.testing.envelope import Family, NotClaimedError
from kvcomp.testing.envelope.bench import left_padded
from kvcomp.testing.families import FAMILIES

WORDS = "the grey cat sat on a mat and looked at two birds in the old tree by the river until the sun went down"
LENGTHS = (48, 12, 25)  # words of the prompts of seeds 0, 1, 2
PICTURES = (2, 0, 1)
SIDE = 56  # pixels


def families_named(names: Sequence[str]) -> list[Family]:
    """Return the families of these names or of models' folders; `all` are those with a tiny model that the installed
    transformers has.
    """
    every = [family for family in FAMILIES.values() if family.available]
    return [family for name in names for family in (every if name == "all" else [_family(name)])]


def _family(name: str) -> Family:
    """Return a family with a tiny model, or that of a testbed, a model's folder or a hub id.

    Raises:
        InputError: it is neither, or the installed transformers does not have the family.
    """
    if (family := FAMILIES.get(name)) is not None:
        if not family.available:
            raise InputError(f"--model must be a family that the installed transformers has, got {name!r}; upgrade it")
        return family
    if name not in testbeds() and not Path(name).expanduser().is_dir() and "/" not in name:
        raise InputError(
            f"--model must be a family with a tiny model, a testbed or a model's folder, got {name!r}. "
            f"{suggest(name, [*FAMILIES, *testbeds()])}"
        )
    return LoadedFamily(find_model(name))


@dataclass(frozen=True)
class LoadedFamily:
    """A model with weights, in float32 on the CPU; prompts of ordinary words, and plain pictures if it takes any."""

    source: Source

    @property
    def name(self) -> str:
        """Return the last part of its path."""
        return Path(self.source.name).name

    def model(self) -> Any:
        """Return the model, loaded anew."""
        return load_model(self.source, "cpu").float()

    @cached_property
    def processor(self) -> Any:
        """Return its processor or tokenizer."""
        return load_processor(self.source)

    def prompt(self, seed: int, media: bool = True) -> dict[str, Tensor]:
        """Return a prompt of some words, with pictures of one colour."""
        words = (WORDS.split() * 3)[seed : seed + LENGTHS[seed % len(LENGTHS)]]
        number = PICTURES[seed % len(PICTURES)] if media and self.source.multimodal else 0
        pictures = [Image.new("RGB", (SIDE, SIDE), (40 * place, 200, 90)) for place in range(number)]
        encoded = encode_prompt(self.processor, " ".join(words), pictures, self.source.multimodal)
        return {name: value for name, value in encoded.items() if isinstance(value, Tensor)}

    def longer(self, inputs: Mapping[str, Tensor], new: Tensor, media: bool = False) -> dict[str, Tensor]:
        """Return the inputs of the whole conversation; what has a number per token gets zeros for the new ones."""
        if media:
            raise NotClaimedError("tried on tiny models alone: no processor adds a picture to a conversation")
        shape = inputs["input_ids"].shape
        more = {name: _padded(value, new.shape[1]) for name, value in inputs.items() if value.shape == shape}
        ids = torch.cat([inputs["input_ids"], new], dim=1)
        return {**inputs, **more, "input_ids": ids, "attention_mask": torch.ones_like(ids)}

    def left_padded(self, prompts: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
        """Return prompts as one batch."""
        return left_padded(prompts)


def _padded(value: Tensor, tokens: int) -> Tensor:
    return torch.nn.functional.pad(value, (0, tokens))
