"""`kvcomp run`: one prompt, one model, one strategy."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml
from rich.console import Console
from torch import Tensor
from transformers.generation.streamers import BaseStreamer

from kvcomp.cli.models import Source, find_model, load_model, load_processor
from kvcomp.cli.prompts import count_tokens, encode_prompt, move
from kvcomp.cli.quiet import quiet_transformers
from kvcomp.cli.terminal import Advance, emit_json, progress
from kvcomp.core.config import strategy as build_strategy
from kvcomp.core.errors import ConfigError, InputError
from kvcomp.lab.images import open_image
from kvcomp.runtime.cache import CompressedCache
from kvcomp.runtime.cache_argument import CACHE
from kvcomp.runtime.report import Report
from kvcomp.runtime.session import compress

RESERVED = {"budget": "use --budget", "source": "use --strategy"}


class Device(StrEnum):
    """Where the model runs."""

    auto = "auto"
    cpu = "cpu"
    cuda = "cuda"


class Ticks(BaseStreamer):  # type: ignore[misc]
    """Tells a progress bar of every new token."""

    def __init__(self, advance: Advance) -> None:
        self.advance = advance
        self.prompt = True

    def put(self, value: Tensor) -> None:
        """Advance, unless it is the prompt."""
        if not self.prompt:
            self.advance("")
        self.prompt = False

    def end(self) -> None:
        """Do nothing."""


def run(
    model: Annotated[str, typer.Option(help="Name of a testbed, or folder or hub id of a Hugging Face model.")],
    prompt: Annotated[str, typer.Option(help="What to ask; the images come before it.")],
    image: Annotated[list[Path] | None, typer.Option(help="Image file; repeat it for several.")] = None,
    strategy: Annotated[str, typer.Option(help="Recipe name, or a YAML file.")] = "flowmm",
    budget: Annotated[
        str | None, typer.Option(help="What is kept: 0.2, 512t or 64MiB; by default the recipe's own.")
    ] = None,
    change: Annotated[
        list[str] | None, typer.Option("--set", help="Change a field, as policy.threshold=0.3; repeat it for several.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Length of the answer at most.")] = 128,
    device: Annotated[Device, typer.Option(help="Where the model runs.")] = Device.auto,
    as_json: Annotated[bool, typer.Option("--json", help="Write answer and report as one JSON document.")] = False,
) -> None:
    """Answer a prompt with a compressed cache, and report what the cache held. Decoding is greedy."""
    overrides = parse_overrides(change or [])
    method = strategy_source(strategy)
    build_strategy(method, budget, **overrides)  # its faults first: loading a model takes long
    pictures = [open_image(path) for path in image or []]
    with quiet_transformers():
        source = find_model(model)
        check_images(source, pictures)
        with progress(f"loading {model}"):
            loaded, processor = load_model(source, device), load_processor(source)
        inputs = move(encode_prompt(processor, prompt, pictures, source.multimodal), loaded)
        with progress("answering", max_new_tokens) as advance, compress(loaded, method, budget, **overrides) as cache:
            new = generate(loaded, inputs, cache, max_new_tokens, advance)
    answer = processor.decode(new, skip_special_tokens=True).strip()
    emit(answer, cache.report(), count_tokens(inputs), as_json)


def generate(model: Any, inputs: Mapping[str, Any], cache: CompressedCache, most: int, advance: Advance) -> Tensor:
    """Return the ids of the greedy answer, `(tokens,)`."""
    output = model.generate(**inputs, **{CACHE: cache}, max_new_tokens=most, do_sample=False, streamer=Ticks(advance))
    new: Tensor = output[0, count_tokens(inputs) :]
    return new


def strategy_source(name: str) -> str | Path:
    """Return a path where the name can only be one, else the name."""
    return Path(name) if os.sep in name or name.endswith((".yaml", ".yml")) else name


def parse_overrides(changes: Sequence[str]) -> dict[str, Any]:
    """Return the overrides that `--set PATH=VALUE` spells; values are YAML.

    Raises:
        ConfigError: listing every one that cannot be read.

    >>> parse_overrides(["policy.threshold=0.3", "merger=mean"])
    {'policy.threshold': 0.3, 'merger': 'mean'}
    """
    found, faults = {}, []
    for change in changes:
        path, equals, value = change.partition("=")
        if not (equals and path):
            faults.append(f"{change}: must be PATH=VALUE, as policy.threshold=0.3")
        elif path in RESERVED:
            faults.append(f"{path}: {RESERVED[path]}")
        else:
            try:
                found[path] = yaml.safe_load(value)
            except yaml.YAMLError:
                faults.append(f"{path}: the value must be YAML, got {value!r}")
    if faults:
        raise ConfigError(faults, source="--set")
    return found


def check_images(source: Source, images: Sequence[object]) -> None:
    """Raise where a text model is given images.

    Raises:
        InputError: it is.
    """
    if images and not source.multimodal:
        raise InputError(
            f"{source.name} is a text-only model ({source.config.model_type}) and takes no images; leave out --image"
        )


def emit(answer: str, report: Report, prompt_tokens: int, as_json: bool) -> None:
    """Write the answer and the report."""
    if as_json:
        emit_json({"answer": answer, "prompt_tokens": prompt_tokens, "report": report.to_dict()})
        return
    typer.echo(answer)
    typer.echo("")
    console = Console()
    if console.is_terminal:
        console.print(report)
    else:
        typer.echo(str(report))
