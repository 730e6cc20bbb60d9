"""A task that a random model can be asked, that model, and a small document of results."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
import torch.nn.functional as F
from models import image_inputs, tiny_qwen_vl
from torch import Tensor

from kvcomp.lab import LoadedTestbed, Sample, Task
from kvcomp.lab.threads import torch_threads


class Echo(Task):
    """Asks for a number. Samples with an odd index have one image more, so that batches are padded."""

    def __init__(self, name: str = "fake/echo") -> None:
        self.name = name

    def sample(self, split: str, index: int) -> Sample:
        return Sample((f"{split} {index}",), "which ?", str(index))


def encode(samples: Sequence[Sample]) -> dict[str, Tensor]:
    rows = [image_inputs(images=3 + int(sample.answer) % 2, seed=int(sample.answer)) for sample in samples]
    longest = max(row["input_ids"].shape[1] for row in rows)
    batch = {
        name: torch.cat([F.pad(row[name], (longest - row[name].shape[1], 0)) for row in rows])
        for name in ("input_ids", "attention_mask", "mm_token_type_ids")
    }
    return batch | {name: torch.cat([row[name] for row in rows]) for name in ("pixel_values", "image_grid_thw")}


def decode(ids: Tensor) -> list[str]:
    return [" ".join(map(str, row)) for row in ids.tolist()]


@pytest.fixture(autouse=True)
def _one_thread():
    with torch_threads(1):
        yield


@pytest.fixture(scope="session")
def bed() -> LoadedTestbed:
    return LoadedTestbed("tiny", tiny_qwen_vl(), encode, decode)


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
