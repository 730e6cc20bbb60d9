"""`kvcomp inspect`: one prompt under one or two strategies, as a page that shows what became of every token."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from kvcomp.cli.evaluate import tried
from kvcomp.cli.models import find_device, find_model, load_model, load_processor
from kvcomp.cli.prompts import encode_prompt, move
from kvcomp.cli.quiet import quiet_transformers
from kvcomp.cli.run import Device, check_images, parse_overrides, strategy_source
from kvcomp.cli.terminal import Advance, emit_json, emit_table, progress
from kvcomp.cli.testbeds import TESTBED, find_folder, find_tasks
from kvcomp.core.budget import Budget
from kvcomp.core.config import strategy as build_strategy
from kvcomp.core.errors import ConfigError, InputError
from kvcomp.core.strategy import Strategy
from kvcomp.lab.images import open_image
from kvcomp.lab.inspection import Fate, Prompt, follow, make_prompt, prompt_of_sample
from kvcomp.lab.inspection_page import render_inspection
from kvcomp.lab.tasks import Task
from kvcomp.lab.testbed import load_testbed

MOST = 2  # strategies side by side
COLUMNS = ("layer", "kept", "merged", "evicted", "rho")


@dataclass(frozen=True)
class Asked:
    """A prompt with the model and the tokenizer that it is for."""

    model: Any
    tokenizer: Any
    prompt: Prompt


def inspect(
    model: Annotated[str, typer.Option(help="Name of a testbed, or folder or hub id of a model.")] = TESTBED,
    task: Annotated[str | None, typer.Option(help="Task whose sample is asked.")] = None,
    sample: Annotated[int, typer.Option(min=0, help="Number of the task's sample.")] = 0,
    seed: Annotated[int, typer.Option(min=0, help="Of the samples, as in `kvcomp eval`.")] = 0,
    prompt: Annotated[str | None, typer.Option(help="What to ask instead of a task's sample.")] = None,
    image: Annotated[list[Path] | None, typer.Option(help="Image file before the prompt; repeat it.")] = None,
    strategy: Annotated[
        list[str] | None,
        typer.Option(help="Recipe or YAML file, flowmm by default; repeat it to hold two side by side."),
    ] = None,
    budget: Annotated[
        str | None, typer.Option(help="What is kept: 0.2, 512t or 64MiB; by default each strategy's own.")
    ] = None,
    change: Annotated[
        list[str] | None, typer.Option("--set", help="Change a field, as policy.threshold=0.3; repeat it for several.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Length of the answer at most.")] = 16,
    device: Annotated[Device, typer.Option(help="Where the model runs.")] = Device.cpu,
    out: Annotated[Path, typer.Option(help="The page to write.")] = Path("inspect.html"),
    as_json: Annotated[bool, typer.Option("--json", help="Write a summary as one JSON document.")] = False,
) -> None:
    """Show what became of every token of one prompt: kept, merged into which other, or evicted, per layer and head."""
    chosen, strategies = read_request(model, task, prompt, image or [], strategy or ["flowmm"], budget, change or [])
    check_file(out)
    with quiet_transformers():
        if chosen is not None:
            asked = ask_task(model, device, chosen, f"eval-{seed}", sample)
        else:
            asked = ask_prompt(model, device, prompt or "", image or [])
        with progress("inspect", len(strategies)) as advance:
            fates = [follow_one(asked, made, max_new_tokens, advance) for made in strategies]
    out.write_text(render_inspection(asked.prompt, fates), encoding="utf-8")
    if as_json:
        emit_json(summarize(asked.prompt, fates) | {"page": str(out)})
    else:
        emit(fates, out)


def read_request(
    model: str,
    task: str | None,
    prompt: str | None,
    images: Sequence[Path],
    strategies: Sequence[str],
    budget: str | None,
    changes: Sequence[str],
) -> tuple[Task | None, list[Strategy]]:
    """Return the task, None where a prompt is given, and the strategies that are asked for.

    Raises:
        ConfigError: listing everything that is wrong with the options; no model has been loaded.
    """
    faults = []
    if (task is None) == (prompt is None):
        faults.append("--task, --prompt: give one of them, the task's sample or your own words")
    if images and prompt is None:
        faults.append("--image: goes with --prompt; a task's sample has its own images")
    if len(strategies) > MOST:
        faults.append(f"--strategy: at most {MOST} fit side by side, got {len(strategies)}")
    chosen = _find_task(faults, task, model) if task is not None else None
    kept = None if budget is None else tried(faults, "--budget", lambda: Budget.parse(budget))
    overrides = tried(faults, "--set", lambda: parse_overrides(changes)) or {}
    made = [
        tried(faults, "--strategy", partial(build_strategy, strategy_source(name), kept, **overrides))
        for name in strategies
    ]
    if faults:
        raise ConfigError(faults, source="kvcomp inspect")
    return chosen, [found for found in made if found is not None]


def _find_task(faults: list[str], name: str, model: str) -> Task | None:
    tasks, unknown = find_tasks(name, model)
    faults += [f"--task: {fault}" for fault in unknown]
    if len(tasks) > 1:
        faults.append(f"--task: must name one task, got {', '.join(task.name for task in tasks)}")
    return tasks[0] if len(tasks) == 1 else None


def check_file(out: Path) -> None:
    """Raise where the page cannot be written, before minutes of work for it.

    Raises:
        InputError: its folder is not there or not writable, or it is a folder itself.
    """
    if out.is_dir():
        raise InputError(f"--out must be the name of a file, and this is a folder: {out}")
    if not (out.parent.is_dir() and os.access(out.parent, os.W_OK)):
        raise InputError(f"--out must be a file in a folder that is there and can be written to: {out}")


def ask_task(model: str, device: str, task: Task, split: str, number: int) -> Asked:
    """Return a task's sample for a testbed, or for a model in a folder."""
    bed = load_testbed(find_folder(model), find_device(device))
    return Asked(bed.model, bed.codec.tokenizer, prompt_of_sample(bed.model, bed.codec, task, split, number))


def ask_prompt(model: str, device: str, prompt: str, images: Sequence[Path]) -> Asked:
    """Return a prompt of one's own, the images before it."""
    pictures = [open_image(path) for path in images]
    source = find_model(model)
    check_images(source, pictures)
    with progress(f"loading {model}"):
        loaded, processor = load_model(source, device), load_processor(source)
    inputs = move(encode_prompt(processor, prompt, pictures, source.multimodal), loaded)
    tokenizer = getattr(processor, "tokenizer", processor)
    return Asked(loaded, tokenizer, make_prompt("a prompt", loaded, tokenizer, inputs, pictures))


def follow_one(asked: Asked, strategy: Strategy, most: int, advance: Advance) -> Fate:
    """Return what a strategy makes of the prompt."""
    advance(strategy.name)
    return follow(asked.model, asked.tokenizer, asked.prompt, strategy, most)


def summarize(prompt: Prompt, fates: Sequence[Fate]) -> dict[str, Any]:
    """Return the numbers of the page as plain data."""
    return {
        "prompt": prompt.title,
        "tokens": len(prompt.tokens),
        "images": len(prompt.pictures),
        "evidence": list(prompt.evidence),
        "reference": prompt.reference,
        "strategies": [_summary(fate) for fate in fates],
    }


def _summary(fate: Fate) -> dict[str, Any]:
    layers = [
        {"layer": layer.number, "rho": layer.rho}
        | dict(zip(("kept", "merged", "evicted"), layer.mean_counts(), strict=True))
        for layer in fate.layers
    ]
    return {
        "name": fate.strategy,
        "budget": fate.budget,
        "answer": fate.answer,
        "right": fate.right,
        "share_of_bytes": fate.share,
        "threshold": fate.threshold,
        "layers": layers,
    }


def emit(fates: Sequence[Fate], out: Path) -> None:
    """Write a line per strategy and layer, the answers, and where the page is."""
    body = [
        [fate.strategy, str(layer.number), *(f"{count:.1f}" for count in layer.mean_counts()), _rho(layer.rho)]
        for fate in fates
        for layer in fate.layers
    ]
    emit_table(("strategy", *COLUMNS), body, COLUMNS)
    typer.echo("")
    for fate in fates:
        verdict = {True: " (right)", False: " (wrong)", None: ""}[fate.right]
        typer.echo(f"{fate.strategy} at budget {fate.budget}, {fate.share:.1%} of the bytes: {fate.answer}{verdict}")
    typer.echo(f"See {out}")


def _rho(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"
