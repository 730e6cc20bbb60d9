"""What is measured of an answer beside whether it is right. Every function takes one sample, or the rows of a batch
one by one.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kvcomp.lab.tasks import Sample


def slot_accuracy(prediction: str, sample: Sample) -> float:
    """Return the share of the answer's slots (all its words where it names none) that the prediction has in their
    places.

    >>> slot_accuracy("lisbon red circle", Sample((), "", "lisbon red cross", slots=(1, 2)))
    0.5
    """
    expected, given = sample.answer.split(), prediction.split()
    slots = sample.slots or tuple(range(len(expected)))
    right = sum(slot < len(given) and given[slot] == expected[slot] for slot in slots)
    return right / len(slots) if slots else 1.0


def answer_nll(logits: Tensor, targets: Tensor) -> list[float | None]:
    """Return for each row the mean negative log-likelihood of its targets, in nats per token; None without any.

    Args:
        logits: `(batch, tokens, vocabulary)`.
        targets: `(batch, tokens)` int64, negative where there is none.
    """
    wanted = targets >= 0
    chosen = logits.float().log_softmax(dim=-1).gather(-1, targets.clamp(min=0)[..., None])[..., 0]
    return _row_means(-chosen, wanted)


def kl_divergence(reference: Tensor, logits: Tensor, wanted: Tensor) -> list[float | None]:
    """Return for each row the mean divergence KL(reference || logits) over the wanted tokens, in nats; None without
    any.

    Args:
        reference: `(batch, tokens, vocabulary)`.
        logits: `(batch, tokens, vocabulary)`.
        wanted: `(batch, tokens)` bool.
    """
    expected, given = (side.float().log_softmax(dim=-1) for side in (reference, logits))
    divergence = (expected.exp() * (expected - given)).sum(dim=-1)
    return _row_means(divergence.clamp(min=0.0), wanted)  # rounding takes it below


def evidence_retention(indices: Tensor, counts: Tensor, evidence: Sequence[int]) -> list[float]:
    """Return for each KV head the share of the evidence that has a slot of its own, nothing merged into it.

    Args:
        indices: `(kv_heads, slots)`, the position of each slot, -1 where empty.
        counts: `(kv_heads, slots)`, how many tokens each slot stands for.
        evidence: positions, at least one.
    """
    wanted = torch.tensor(evidence, dtype=indices.dtype, device=indices.device)
    kept = torch.isin(indices, wanted) & (counts == 1)
    shares: list[float] = (kept.sum(dim=-1).double() / len(evidence)).tolist()
    return shares


def _row_means(values: Tensor, wanted: Tensor) -> list[float | None]:
    sums, numbers = values.masked_fill(~wanted, 0.0).double().sum(dim=1).tolist(), wanted.sum(dim=1).tolist()
    return [total / number if number else None for total, number in zip(sums, numbers, strict=True)]
