"""A small model in a folder, tasks that it can be asked, and files of ablations."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml
from PIL import Image

import kvcomp
from kvcomp.core.registry import registry
from kvcomp.lab import Sample, Task
from kvcomp.lab.tasks import Span

NAMES = ("lisbon", "oslo", "rome", "lima")


class Echo(Task):
    """Asks for a number. Prompts and questions have two lengths each, so that batches are padded."""

    metric = "exact match"
    max_new_tokens = 5

    def __init__(self, name: str = "fake/echo") -> None:
        self.name = name

    def sample(self, split: str, index: int) -> Sample:
        shade = (40 * index + 7 * len(split)) % 256
        pairs = [(name, Image.new("RGB", (56, 56), (shade, 60 * place, 90))) for place, name in enumerate(NAMES)]
        context = tuple(part for pair in pairs[: 3 + index % 2] for part in pair)
        question = "number of lisbon ?" if index % 3 else "number of lisbon lisbon ?"
        return Sample(context, question, f"lisbon {index} .", evidence=(Span(2), Span(3, 1, 3)), slots=(1,))


class FakeTasks:
    """The plugin that brings them."""

    @kvcomp.hookimpl
    def kvcomp_tasks(self) -> list[Task]:
        return [Echo(), Echo("fake/other")]


def register_fake_tasks() -> None:
    registry.register(FakeTasks(), "fake-tasks")


def unregister_fake_tasks() -> None:
    registry.unregister("fake-tasks")


def write_file(path: Path, **settings: Any) -> Path:
    """Write a file of an ablation."""
    document = {"tasks": ["echo"], "samples": 5, "strategies": ["full", "flowmm"], "grid": {"budget": [0.3, 0.6]}}
    path.write_text(yaml.safe_dump(document | settings), encoding="utf-8")
    return path
