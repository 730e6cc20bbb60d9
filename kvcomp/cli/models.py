"""Loading a model with what prepares its inputs, from a folder or from the hub; nothing remote is executed."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import (
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
)

from kvcomp.cli.testbeds import testbeds
from kvcomp.core.errors import InputError, nearest
from kvcomp.core.registry import registry

FAILURES = (OSError, ValueError, ImportError, KeyError, SafetensorError)


@dataclass(frozen=True)
class Source:
    """Where a model is, and what its configuration says."""

    name: str
    config: Any

    @property
    def multimodal(self) -> bool:
        """Return whether the model takes images."""
        return type(self.config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING


def find_model(name: str) -> Source:
    """Return the model of a testbed, in a folder, or of a hub id; only its configuration is read.

    Raises:
        InputError: there is no such folder, or no configuration in it.
    """
    own = testbeds()
    if name in own:
        return Source(str(own[name]), AutoConfig.from_pretrained(own[name]))
    if _is_path(name) and not Path(name).expanduser().is_dir():
        raise InputError(f"--model must be a folder or a hub id, and this folder does not exist: {name}")
    registry.entries("adapter")  # plugins are loaded, which may add families to transformers
    place = str(Path(name).expanduser()) if _is_path(name) else name
    try:
        return Source(place, AutoConfig.from_pretrained(place))
    except FAILURES as error:
        if Path(place).is_dir():
            raise InputError(f"--model {name} holds no model configuration: {_first_line(error)}") from error
        near = nearest(name, own)
        hint = "" if near is None else f" Did you mean {near!r}?"
        raise InputError(
            f"--model {name} is neither a testbed, nor a folder here, nor a hub id that can be had.{hint} "
            f"{_first_line(error)}"
        ) from error


def load_model(source: Source, device: str) -> Any:
    """Return the model in evaluation mode, in the dtype of its checkpoint.

    Raises:
        InputError: its weights cannot be loaded, or there is no such device.
    """
    target = find_device(device)
    auto: Any = AutoModelForImageTextToText if source.multimodal else AutoModelForCausalLM
    try:
        return auto.from_pretrained(source.name, dtype="auto").to(target).eval()
    except FAILURES as error:
        raise InputError(f"the model in {source.name} cannot be loaded: {_first_line(error)}") from error


def load_processor(source: Source) -> Any:
    """Return the processor of a multimodal model, the tokenizer of a text model.

    Raises:
        InputError: it cannot be loaded.
    """
    auto: Any = AutoProcessor if source.multimodal else AutoTokenizer
    try:
        return auto.from_pretrained(source.name)
    except FAILURES as error:
        what = "processor" if source.multimodal else "tokenizer"
        raise InputError(f"the {what} in {source.name} cannot be loaded: {_first_line(error)}") from error


def _is_path(name: str) -> bool:
    """Return whether the name can only be a path: a hub id is `name` or `owner/name`."""
    return name.startswith((".", "/", "~")) or name.endswith("/") or name.count("/") > 1 or Path(name).exists()


def find_device(name: str) -> torch.device:
    """Return the device of this name; `auto` is CUDA where there is one.

    Raises:
        InputError: `cuda` is asked for, and there is none.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name == "cuda" and not torch.cuda.is_available():
        raise InputError("--device cuda needs a CUDA device, and torch finds none here; use --device cpu")
    return torch.device(name)


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
