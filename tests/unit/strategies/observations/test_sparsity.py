"""Sparsity of attention rows, by hand."""

import pytest
import torch
from kvcomp_strategies.observations.sparsity import Sparsity

from kvcomp.core.attention import AttentionInputs, observe
from kvcomp.core.types import Modality

TOKENS = 40


def inputs(sharpness: float, mask: torch.Tensor | None = None) -> AttentionInputs:
    """Queries that look at the first token alone, the more so the sharper."""
    keys = torch.zeros(1, 1, TOKENS, 4)
    keys[:, :, 0, 0] = 1.0
    queries = torch.zeros(1, 2, TOKENS, 4)
    queries[..., 0] = sharpness
    columns, valid = torch.arange(TOKENS), torch.ones(1, TOKENS, dtype=torch.bool)
    modality = torch.full((1, TOKENS), Modality.TEXT, dtype=torch.int8)
    return AttentionInputs(
        queries=queries,
        keys=keys,
        query_columns=columns,
        key_columns=columns[None, None],
        query_modality=modality,
        query_valid=valid,
        modality=modality[:, None],
        valid=valid[:, None],
        mask=mask,
        scaling=1.0,
    )


def sparsity(seen: AttentionInputs) -> list[float]:
    observed: list[list[float]] = observe(seen, [Sparsity(window=10)])[Sparsity(window=10)].tolist()
    return observed[0]


# The last ten queries see 31 to 40 keys, of which one counts.
EXPECTED = 1 - 10 / sum(range(31, 41))


@pytest.mark.parametrize("sharpness", [10.0, 90.0, 200.0, 1000.0])
def test_keys_whose_probability_float32_does_not_hold_are_small_and_not_hidden(sharpness: float) -> None:
    assert sparsity(inputs(sharpness)) == pytest.approx([EXPECTED] * 2)


def test_with_a_mask_what_a_query_may_not_see_does_not_count() -> None:
    causal = torch.ones(TOKENS, TOKENS).tril().bool()[None, None]
    assert sparsity(inputs(200.0, causal)) == pytest.approx([EXPECTED] * 2)
    assert sparsity(inputs(0.0, torch.ones_like(causal))) == [0.0, 0.0]  # every query sees every key alike
