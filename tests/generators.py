"""Hypothesis strategies: prompts as one attention layer sees them, budgets, recipes and parts of the registry."""

from __future__ import annotations

import torch
from hypothesis import strategies as st

from kvcomp.core.budget import Budget
from kvcomp.core.config import PART_KEYS
from kvcomp.core.interfaces import Observation
from kvcomp.core.registry import Entry, registry
from kvcomp.core.types import Modality
from kvcomp.testing import Sample, make_sample, view_for
from kvcomp.testing.samples import FILLS

__all__ = [
    "BUDGETS",
    "DISTINCT",
    "FLOAT32",
    "RATIOS",
    "RECIPES",
    "SAMPLES",
    "part_entries",
    "rows_of",
    "samples",
    "view_for",
]

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MODALITIES = (
    (Modality.TEXT, Modality.IMAGE),
    (Modality.TEXT,),
    (Modality.IMAGE,),
    tuple(Modality),
)
KINDS = (*PART_KEYS, "observation")

RECIPES = [entry.name for entry in registry.entries("recipe")]


def rows_of(observation: Observation, valid: torch.Tensor) -> torch.Tensor | None:
    """The queries that an observation asks for among text, `valid` `(batch, queries)`."""
    return observation.rows(valid, torch.zeros_like(valid, dtype=torch.int8))


def part_entries() -> list[Entry]:
    return [entry for kind in KINDS for entry in registry.entries(kind)]


@st.composite
def samples(
    draw: st.DrawFn,
    dtypes: tuple[torch.dtype, ...] = DTYPES,
    fills: tuple[str, ...] = FILLS,
    most_tokens: int = 40,
    most_held: int = 12,
    most_rows: int = 3,
) -> Sample:
    """A layer's prompt: rows of different lengths padded on the left, or a second turn with heads that differ."""
    lengths = draw(st.lists(st.integers(1, most_tokens), min_size=1, max_size=most_rows))
    return make_sample(
        seed=draw(st.integers(0, 2**20)),
        lengths=lengths,
        kv_heads=draw(st.integers(1, 3)),
        group=draw(st.integers(1, 3)),
        head_dim=draw(st.sampled_from((4, 8, 16))),
        dtype=draw(st.sampled_from(dtypes)),
        fill=draw(st.sampled_from(fills)),
        modalities=draw(st.sampled_from(MODALITIES)),
        held=draw(st.sampled_from((0, 0, most_held))),
        layer=draw(st.integers(0, 2)),
    )


FLOAT32 = (torch.float32,)
SAMPLES = samples()
DISTINCT = samples(dtypes=FLOAT32, fills=("normal",))  # no two scores are equal, so rounding decides nothing
RATIOS = st.integers(1, 1000).map(lambda thousandths: f"{thousandths / 1000}")
BUDGETS = st.one_of(RATIOS, st.integers(1, 50).map(lambda tokens: f"{tokens}t")).map(Budget.parse)
