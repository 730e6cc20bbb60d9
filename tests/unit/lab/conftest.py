"""A task that a random model can be asked, that model, and a small document of results."""

from __future__ import annotations

import pytest
from PIL import Image

from kvcomp.lab import LoadedTestbed, Sample, Task
from kvcomp.lab.codec import Codec
from kvcomp.lab.tasks import Span
from kvcomp.minimile.model import build_model
from kvcomp.minimile.processor import build_processor

NAMES = ("lisbon", "oslo", "rome", "lima")


class Echo(Task):
    """Asks for a number. Samples with an odd index have one image more, so that batches are padded, and every third
    question is one word longer.
    """

    def __init__(self, name: str = "fake/echo") -> None:
        self.name = name

    def sample(self, split: str, index: int) -> Sample:
        images = 3 + index % 2
        parts = [
            (name, Image.new("RGB", (56, 56), (40 * index % 256, 60 * place, 90))) for place, name in enumerate(NAMES)
        ]
        context = tuple(part for pair in parts[:images] for part in pair)
        return Sample(
            context,
            "number of lisbon ?" if index % 3 else "number of lisbon lisbon ?",
            f"lisbon {index} .",
            evidence=(Span(2), Span(3, 1, 3)),
            slots=(1,),
        )


@pytest.fixture(scope="session")
def bed() -> LoadedTestbed:
    return LoadedTestbed("tiny", build_model(0).eval(), Codec(build_processor()))


@pytest.fixture
def echo() -> type[Echo]:
    return Echo


def _row(recipe: str, budget: float, task: str, share: float, rho: list[float | None]) -> dict[str, object]:
    return {
        "recipe": recipe,
        "budget": budget,
        "task": task,
        "exact_match": share,
        "ci": [max(0.0, share - 0.1), min(1.0, share + 0.1)],
        "kv_bytes": 1000.0 * budget,
        "decode_ratio": 1.0,
        "rho": rho,
    }


@pytest.fixture
def document() -> dict[str, object]:
    """Two tasks; `full` once, `good` and `bad` at two budgets; `good` measures rho."""
    rows = [
        *(_row("full", 1.0, task, 1.0, [None, None]) for task in ("a", "b")),
        *(_row("bad", budget, task, budget / 2, [None, None]) for budget in (1.0, 0.2) for task in ("a", "b")),
        *(_row("good", budget, task, 0.9, [0.2, 0.4]) for budget in (1.0, 0.2) for task in ("a", "b")),
    ]
    return {
        "rows": rows,
        "agreement": [
            {"recipe": "full", "budget": 1.0, "same": 8, "samples": 8},
            {"recipe": "bad", "budget": 1.0, "same": 5, "samples": 8},
            {"recipe": "bad", "budget": 0.2, "same": 1, "samples": 8},
            {"recipe": "good", "budget": 1.0, "same": 8, "samples": 8},
        ],
        "skipped": [],
        "fields": {"rho": "flow"},
        "recipes": {
            "full": {"policy": {"use": "uniform"}},
            "bad": {"policy": {"use": "uniform"}},
            "good": {"policy": {"use": "flow-guided", "threshold": 0.25}},
        },
        "testbed": "bench",
        "tasks": ["a", "b"],
        "split": "demo",
        "question": "question_seen",
        "samples": 4,
        "timed_samples": 1,
        "max_new_tokens": 16,
        "seed": 0,
        "seconds": 12.0,
        "hardware_threads": 2,
        "machine": "Linux x86_64",
        "versions": {"kvcomp": "0.1.0"},
    }
