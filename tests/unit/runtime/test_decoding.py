"""The queries that a layer remembers."""

from __future__ import annotations

import torch

from kvcomp.runtime.decoding import Queries, QueryLog
from kvcomp.runtime.forward import Forward, Logits

LOGITS = Logits(1.0)


def vectors(*columns: int) -> torch.Tensor:
    """Return `(2, 1, queries, 1)`: the column itself, and a hundred more in the second row."""
    row = torch.tensor(columns, dtype=torch.float32)
    return torch.stack([row, row + 100])[:, None, :, None]


def forward(columns: range, valid: list[list[bool]] | None = None) -> Forward:
    modality = torch.ones(2, len(columns), dtype=torch.int8)
    mask = None if valid is None else torch.tensor(valid)
    return Forward(vectors(*columns), None, torch.tensor(list(columns)), mask, modality, LOGITS)


def test_the_latest_valid_queries_of_each_row_are_kept() -> None:
    padded = [[True, True, True, True, True], [True, True, False, False, True]]
    log = QueryLog().keep([forward(range(5), padded)], 3)
    assert log.latest is not None
    assert log.latest.columns.tolist() == [[2, 3, 4], [0, 1, 4]]
    assert log.latest.vectors[:, 0, :, 0].tolist() == [[2.0, 3.0, 4.0], [100.0, 101.0, 104.0]]


def test_decoded_queries_follow_and_fewer_are_aligned_at_the_end() -> None:
    log = QueryLog().keep([forward(range(2), [[True, True], [False, True]])], 4)
    log = log.add(vectors(2), 3, LOGITS).keep((), 4)
    assert log.latest is not None
    assert log.latest.columns.tolist() == [[0, 1, 2], [-1, 1, 2]]
    assert log.latest.modality.tolist() == [[1, 1, 0], [1, 1, 0]]
    assert log.decoded == ()


def test_what_is_kept_shares_no_memory_with_the_prompt() -> None:
    prompt = forward(range(1000))
    latest = QueryLog().keep([prompt], 8).latest
    assert latest is not None
    assert sum(entry.untyped_storage().nbytes() for entry in latest.tensors()) <= 2 * 8 * (4 + 8 + 1)


def test_nothing_is_kept_where_no_window_looks_back() -> None:
    assert QueryLog().keep([forward(range(5))], 0).tensors() == []


def test_what_came_before_a_column_stays() -> None:
    log = QueryLog(latest=Queries.of(forward(range(4)), 4))
    for column in (4, 5, 6):
        log = log.add(vectors(column), column + 1, LOGITS)
    early = log.before(5)
    assert [int(vector[0, 0, 0, 0]) for vector in early.decoded] == [4]
    assert early.end == 5
    earliest = log.before(2).latest
    assert earliest is not None
    assert earliest.columns[0].tolist() == [0, 1, -1, -1]
    assert log.before(9).decoded == log.decoded
