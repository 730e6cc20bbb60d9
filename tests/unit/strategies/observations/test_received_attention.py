"""Column sums."""

import torch
from generators import rows_of
from kvcomp_strategies.observations.received_attention import ReceivedSums

from kvcomp import AttentionBlock

TOKENS = 2


def block(*rows: list[float]) -> AttentionBlock:
    probs = torch.tensor(rows)[None, None]
    nothing, keys = torch.zeros(1, len(rows), dtype=torch.long), torch.zeros(1, 1, TOKENS, dtype=torch.long)
    return AttentionBlock(probs, nothing, nothing, nothing.bool(), keys, keys.bool(), nothing, keys, nothing.float())


def test_columns_are_summed_over_blocks() -> None:
    sums = ReceivedSums()
    state = sums.update(sums.update(None, block([1.0, 0.0], [0.25, 0.75])), block([0.5, 0.5]))
    assert sums.result(state).tolist() == [[[1.75, 1.25]]]


def test_rows_that_see_only_the_first_tokens_add_nothing_to_the_others() -> None:
    sums = ReceivedSums()
    state = sums.update(sums.update(None, block([1.0])), block([0.25, 0.75]))
    assert sums.result(state).tolist() == [[[1.25, 0.75]]]


def test_a_state_is_not_changed_by_the_next_block() -> None:
    sums = ReceivedSums()
    before = sums.update(None, block([1.0, 0.0]))
    sums.update(before, block([1.0, 0.0]))
    assert before.tolist() == [[[1.0, 0.0]]]


def test_all_rows_are_needed_and_sums_are_carried_to_later_turns() -> None:
    assert rows_of(ReceivedSums(), torch.ones(1, 9, dtype=torch.bool)) is None
    assert ReceivedSums.carried
