"""Windows of recent tokens, sums over rows, pooling."""

import torch
from kvcomp_strategies.windows import group_mean, last_tokens, pool_average, pool_largest, share_of, sum_last_rows

from kvcomp.testing import make_sample


def test_last_tokens_counts_valid_tokens() -> None:
    view = make_sample(0, (2, 5), kv_heads=2).view()
    assert last_tokens(view, torch.tensor([3, 2]))[:, 0].long().tolist() == [[0, 0, 0, 1, 1], [0, 0, 0, 1, 1]]
    assert last_tokens(view, torch.tensor([[0, 1], [1, 5]])).sum(dim=-1).tolist() == [[0, 1], [1, 5]]


def test_last_tokens_reaches_over_empty_slots() -> None:
    sample = make_sample(1, (1,), held=6)
    window = last_tokens(sample.view(), torch.tensor([2]))
    for head in range(2):
        places = sample.valid[0, head].nonzero().flatten().tolist()
        assert window[0, head].nonzero().flatten().tolist() == places[-2:]


def test_group_mean_takes_neighbouring_query_heads() -> None:
    assert group_mean(torch.tensor([[[1.0], [3.0], [10.0], [20.0]]]), kv_heads=2).tolist() == [[[2.0], [15.0]]]


def test_sum_last_rows_counts_from_the_end_row_by_row() -> None:
    rows = torch.tensor([1.0, 10.0, 100.0])[None, None, :, None].expand(2, 1, 3, 1)
    assert sum_last_rows(rows, torch.tensor([1, 2])).flatten().tolist() == [100.0, 110.0]
    assert sum_last_rows(rows, torch.tensor([9, 3])).flatten().tolist() == [111.0, 111.0]


def test_pooling_counts_only_eligible_neighbours() -> None:
    scores = torch.tensor([[[6.0, 3.0, 0.0, 9.0, 100.0]]])
    eligible = torch.tensor([[[True, True, True, True, False]]])
    pooled = pool_average(scores.masked_fill(~eligible, 0.0), eligible, 3)[0, 0, :4]
    torch.testing.assert_close(pooled, torch.tensor([4.5, 3.0, 4.0, 4.5]))


def test_a_kernel_of_one_changes_nothing() -> None:
    scores = torch.tensor([[[6.0, 3.0]]])
    assert torch.equal(pool_average(scores, scores > 0, 1), scores)


def test_a_kernel_wider_than_the_prompt() -> None:
    scores = torch.tensor([[[6.0, 3.0]]])
    torch.testing.assert_close(pool_average(scores, scores > 0, 9), torch.tensor([[[4.5, 4.5]]]))


def test_the_largest_of_eligible_neighbours() -> None:
    scores = torch.tensor([[[6.0, -3.0, -5.0, -9.0, 100.0]]])
    eligible = torch.tensor([[[True, True, True, True, False]]])
    assert pool_largest(scores, eligible, 3).tolist() == [[[6.0, 6.0, -3.0, -5.0, 0.0]]]
    assert pool_largest(scores, eligible, 9).tolist() == [[[6.0, 6.0, 6.0, 6.0, 0.0]]]


def test_a_share_is_the_floor_of_the_decimal() -> None:
    assert share_of(torch.tensor([10, 29, 30]), 0.1).tolist() == [1, 2, 3]
    assert share_of(torch.tensor([10, 100]), 0.7).tolist() == [7, 70]
