"""Several layers at once: what allocators that look at the whole model are given."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import oracles
from generators import MODALITIES
from hypothesis import strategies as st
from torch import Tensor

from kvcomp import LayerView, Modality, Strategy
from kvcomp.testing import Sample, make_sample, view_for

LAYERS = 3


@dataclass
class Model:
    """What every layer of a model holds: the same tokens, other vectors; or heads that differ, as after a turn."""

    samples: list[Sample]

    def views(self, strategy: Strategy) -> list[LayerView]:
        return [view_for(strategy, sample) for sample in self.samples]

    def attention(self, row: int) -> list[list[Tensor]]:
        """`[layer][query head]` of one row, `(queries, tokens)`, without what the head does not hold."""
        return [sample_attention(sample, row) for sample in self.samples]

    def held(self, row: int) -> list[list[int]]:
        return [sample.valid[row].sum(dim=-1).tolist() for sample in self.samples]


def sample_attention(sample: Sample, row: int) -> list[Tensor]:
    group = sample.queries.shape[1] // sample.keys.shape[1]
    new = int(sample.valid[row, 0, -sample.queries.shape[2] :].sum())
    heads = []
    for head in range(sample.queries.shape[1]):
        held = sample.valid[row, head // group]
        queries = sample.queries[row, head, -new:]
        heads.append(oracles.softmax_attention(queries, sample.keys[row, head // group, held]))
    return heads


@st.composite
def models(
    draw: st.DrawFn,
    most_held: int = 12,
    most_tokens: int = 24,
    fill: str = "normal",
    modalities: tuple[tuple[Modality, ...], ...] = MODALITIES,
) -> Model:
    lengths = draw(st.lists(st.integers(1, most_tokens), min_size=1, max_size=2))
    shape: dict[str, Any] = {
        "fill": fill,
        "kv_heads": draw(st.integers(1, 3)),
        "group": draw(st.integers(1, 2)),
        "held": draw(st.sampled_from((0, most_held))),
        "modalities": draw(st.sampled_from(modalities)),
    }
    seed = draw(st.integers(0, 2**20))
    tokens = make_sample(seed, lengths, **shape)
    samples = [make_sample(seed + 1000 * number, lengths, layer=number, **shape) for number in range(LAYERS)]
    return Model([replace(sample, modality=tokens.modality) for sample in samples])
