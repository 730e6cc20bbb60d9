"""Samples taken apart into rows and heads, as the naive references want them."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import oracles
from torch import Tensor

from kvcomp.testing import Run, Sample

NEAR = 1e-5  # float32 against float64: a choice between two numbers that are nearer may go either way
SAME = 1e-8  # numbers nearer than this are equal, and a rule says what happens


@dataclass
class Row:
    """One row without its padding: `attention` per query head, the rest per KV head."""

    attention: list[Tensor]
    keys: Tensor
    values: Tensor
    modality: list[int]
    group: int

    def of(self, head: int) -> list[Tensor]:
        return self.attention[head * self.group : (head + 1) * self.group]


def row_of(sample: Sample, row: int) -> Row:
    valid = sample.valid[row, 0]
    keys, values, queries = (t[row][:, valid] for t in (sample.keys, sample.values, sample.queries))
    group = queries.shape[0] // keys.shape[0]
    attention = [oracles.softmax_attention(queries[h], keys[h // group]) for h in range(queries.shape[0])]
    return Row(attention, keys, values, sample.modality[row, 0, valid].tolist(), group)


def kept_by(seen: Run, row: int, head: int) -> list[int]:
    return [index for index in seen.compressed.indices[row, head].tolist() if index >= 0]


def heads(sample: Sample) -> list[tuple[int, int]]:
    return [(row, head) for row in range(sample.keys.shape[0]) for head in range(sample.keys.shape[1])]


def clear(scores: list[float]) -> bool:
    """Whether no two scores are too near to be told apart in float32."""
    ordered = sorted(scores)
    return all(after - before > NEAR * max(1.0, after) for before, after in itertools.pairwise(ordered))


def told_apart(numbers: list[float]) -> bool:
    """Whether any two numbers are either equal or clearly different."""
    return all(after - before < SAME or after - before > NEAR for before, after in itertools.pairwise(sorted(numbers)))
