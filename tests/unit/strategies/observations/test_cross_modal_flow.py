"""The share of attention that crosses modalities, by hand; sampled rows are tested in tests/property/test_flow.py."""

import pytest
import torch
from generators import rows_of
from kvcomp_strategies.observations.cross_modal_flow import CrossModalFlow

from kvcomp import AttentionBlock


def block(
    probs: list[list[float]], rows: list[int], keys: list[int], valid: list[bool] | None = None
) -> AttentionBlock:
    """One row of a batch, one head; `rows` and `keys` are modalities, `valid` says which rows count."""
    count = len(rows)
    return AttentionBlock(
        leading=torch.tensor(probs)[None, None],
        rows=torch.arange(count)[None],
        row_modality=torch.tensor([rows], dtype=torch.int8),
        row_valid=torch.tensor([valid or [True] * count]),
        modality=torch.tensor([[keys]], dtype=torch.int8),
        valid=torch.ones(1, 1, len(keys), dtype=torch.bool),
        columns=torch.arange(count)[None],
        key_columns=torch.arange(len(keys))[None, None],
        queries=torch.zeros(1, 1, count, 4),
    )


def flow(*blocks: AttentionBlock) -> float:
    observation, state = CrossModalFlow(), None
    for seen in blocks:
        state = observation.update(state, seen)
    assert state is not None
    return observation.result(state).item()


def test_by_hand() -> None:
    """Text, image, text: 0 of row 0, 0.4 of row 1, 0.3 of row 2, over three rows."""
    probs = [[1.0, 0.0, 0.0], [0.4, 0.6, 0.0], [0.5, 0.3, 0.2]]
    assert flow(block(probs, [0, 1, 0], [0, 1, 0])) == pytest.approx(0.7 / 3)


def test_any_other_modality_is_foreign() -> None:
    """Text, image, audio: each of the other two counts."""
    assert flow(block([[0.2, 0.3, 0.5]], [3], [0, 1, 3])) == pytest.approx(0.5)
    assert flow(block([[0.2, 0.3, 0.5]], [0], [0, 1, 3])) == pytest.approx(0.8)


def test_images_and_videos_are_not_foreign_to_each_other() -> None:
    """Text, image, video: the paper's Eq. 7 knows text and visual tokens."""
    assert flow(block([[0.2, 0.3, 0.5]], [2], [0, 1, 2])) == pytest.approx(0.2)
    assert flow(block([[0.2, 0.3, 0.5]], [1], [0, 1, 2])) == pytest.approx(0.2)


def test_rows_of_pads_do_not_count() -> None:
    probs = [[0.0, 0.0], [0.25, 0.75]]
    assert flow(block(probs, [0, 1], [0, 1], valid=[False, True])) == pytest.approx(0.25)


def test_blocks_add_up() -> None:
    one, other = block([[0.4, 0.6]], [1], [0, 1]), block([[0.8, 0.2]], [1], [0, 1])
    assert flow(one, other) == pytest.approx(0.6)


def test_one_modality_has_no_flow() -> None:
    assert flow(block([[0.4, 0.6]], [1], [1, 1])) == 0.0


def test_padded_rows_that_are_short_enough_are_exact() -> None:
    """Rows of 8 and 3 queries, exact up to 4: two strata of the first, all of the second."""
    valid = torch.tensor([[True] * 8, [False] * 5 + [True] * 3])
    rows = rows_of(CrossModalFlow(exact=4, strata=2), valid)
    assert rows is not None
    first, second = rows.tolist()
    assert 0 <= first[0] < 4 <= first[1] < 8
    assert first[2:] == [-1, -1]
    assert second == [5, 6, 7, -1]


def test_sampled_rows_are_seeded_and_have_no_stride() -> None:
    """A fixed stride would alias with the period of the image layout."""
    valid = torch.ones(1, 4096, dtype=torch.bool)
    one, again, other = (rows_of(CrossModalFlow(seed=seed), valid) for seed in (0, 0, 1))
    assert one is not None
    assert other is not None
    assert torch.equal(one, again)
    assert not torch.equal(one, other)
    assert (one % 32).unique().numel() > 20
