"""Entropies of attention rows, by hand."""

import math

import torch
from kvcomp_strategies.observations.row_entropy import RowEntropy

from kvcomp import Modality
from kvcomp.core.types import AttentionBlock


def entropy(probs: list[list[float]], keys: list[int], rows: list[int], over: str = "all") -> float:
    attention, modality = torch.tensor(probs)[None, None], torch.tensor(keys, dtype=torch.int8)[None, None]
    valid = attention.sum(dim=-1)[:, 0] > 0
    block = AttentionBlock(
        leading=attention,
        rows=torch.arange(len(rows))[None],
        row_modality=torch.tensor(rows, dtype=torch.int8)[None],
        row_valid=valid,
        modality=modality,
        valid=torch.ones_like(modality, dtype=torch.bool),
        columns=torch.arange(len(rows))[None],
        key_columns=torch.arange(len(keys))[None, None],
        queries=torch.zeros(*attention.shape[:3], 4),
    )
    observation = RowEntropy(over=over)  # type: ignore[arg-type]
    return float(observation.result(observation.update(None, block)))


TEXT, IMAGE = int(Modality.TEXT), int(Modality.IMAGE)


def test_the_mean_over_valid_rows() -> None:
    rows = [[0.25, 0.25, 0.25, 0.25], [1.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0]]  # the last row is padding
    assert math.isclose(entropy(rows, [TEXT] * 4, [TEXT] * 3), math.log(4) / 2, rel_tol=1e-6)


def test_across_modalities_each_row_is_normalised_over_the_keys_of_others() -> None:
    text, image = [0.8, 0.1, 0.1, 0.0], [0.5, 0.0, 0.5, 0.0]
    found = entropy([text, image], [TEXT, IMAGE, IMAGE, TEXT], [TEXT, IMAGE], "other-modality")
    assert math.isclose(found, math.log(2) / 2, rel_tol=1e-6)  # the image row sees one text key: 0


def test_one_modality_has_no_cross_modal_entropy() -> None:
    assert entropy([[0.5, 0.5]], [TEXT, TEXT], [TEXT], "other-modality") == 0.0
