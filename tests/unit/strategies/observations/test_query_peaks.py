"""The largest query of each channel."""

import torch
from kvcomp_strategies.observations.query_peaks import QueryPeaks

from kvcomp import AttentionBlock


def block(queries: list[list[float]], valid: list[bool]) -> AttentionBlock:
    rows = torch.zeros(1, len(queries), dtype=torch.long)
    probs = torch.zeros(1, 1, len(queries), 1)
    return AttentionBlock(
        probs, rows, rows, torch.tensor([valid]), rows, rows.bool(), rows, rows[None], torch.tensor(queries)[None, None]
    )


def test_magnitudes_count_over_blocks_and_pads_do_not() -> None:
    peaks = QueryPeaks()
    state = peaks.update(None, block([[1.0, -2.0], [9.0, 9.0]], [True, False]))
    state = peaks.update(state, block([[-3.0, 0.5]], [True]))
    assert peaks.result(state).tolist() == [[[3.0, 2.0]]]
