"""Each metric against loops that anyone can follow."""

import math
import random

import pytest
import torch

from kvcomp.lab import Sample
from kvcomp.lab.metrics import answer_nll, evidence_retention, kl_divergence, slot_accuracy


@pytest.fixture
def logits():
    return 3 * torch.randn(3, 4, 6, generator=torch.Generator().manual_seed(0))


def softmax(row):
    powers = [math.exp(value) for value in row]
    return [power / sum(powers) for power in powers]


def test_slots_are_compared_in_their_places():
    sample = Sample((), "", "lisbon red circle turned blue", slots=(1, 2, 4))
    assert slot_accuracy("lisbon red circle turned blue", sample) == 1.0
    assert slot_accuracy("oslo red cross moved  blue", sample) == pytest.approx(2 / 3)
    assert slot_accuracy("red circle turned blue", sample) == 0.0
    assert slot_accuracy("lisbon red", sample) == pytest.approx(1 / 3)
    assert slot_accuracy("", sample) == 0.0


def test_all_words_count_where_no_slots_are_named():
    assert slot_accuracy("4 0 7 2", Sample((), "", "4 0 7 1")) == 0.75
    assert slot_accuracy("4", Sample((), "", "")) == 1.0


def test_likelihood_is_the_mean_over_the_targets_of_a_row(logits):
    targets = torch.tensor([[0, 5, 2, 1], [3, 3, -100, -100], [-100] * 4])
    expected = []
    for row, row_targets in zip(logits.tolist(), targets.tolist(), strict=True):
        pairs = zip(row, row_targets, strict=True)
        costs = [-math.log(softmax(token)[target]) for token, target in pairs if target >= 0]
        expected.append(sum(costs) / len(costs) if costs else None)
    found = answer_nll(logits, targets)
    assert found[2] is expected[2] is None
    assert found[:2] == pytest.approx(expected[:2], rel=1e-6)


def test_divergence_is_taken_from_the_reference(logits):
    reference = logits.roll(1, dims=0)
    wanted = torch.tensor([[True, False, True, True], [False] * 4, [False, True, False, False]])
    expected = []
    for row in range(3):
        costs = []
        for token in range(4):
            if wanted[row, token]:
                p, q = softmax(reference[row, token].tolist()), softmax(logits[row, token].tolist())
                costs.append(sum(a * math.log(a / b) for a, b in zip(p, q, strict=True)))
        expected.append(sum(costs) / len(costs) if costs else None)
    found = kl_divergence(reference, logits, wanted)
    assert found[1] is expected[1] is None
    assert [found[0], found[2]] == pytest.approx([expected[0], expected[2]], rel=1e-5)
    assert kl_divergence(logits, logits, wanted)[0] == 0.0


def test_evidence_counts_where_its_slot_is_its_own():
    draw = random.Random(0)
    indices = torch.tensor([[*sorted(draw.sample(range(20), 7)), -1] for _ in range(3)], dtype=torch.int32)
    counts = torch.tensor([[draw.choice([1.0, 1.0, 1.5, 3.0]) for _ in range(8)] for _ in range(3)])
    evidence = (0, 3, 4, 11, 12, 19)
    expected = []
    for head in range(3):
        own = {index for index, count in zip(indices[head].tolist(), counts[head].tolist(), strict=True) if count == 1}
        expected.append(len(own & set(evidence)) / len(evidence))
    assert evidence_retention(indices, counts, evidence) == pytest.approx(expected)
    assert len(set(expected)) > 1
