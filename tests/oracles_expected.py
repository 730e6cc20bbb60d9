"""Expected Attention in loops over heads and tokens, float64. Nothing of kvcomp is imported."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def rotation(angles: list[float], head_dim: int, scale: float = 1.0) -> Tensor:
    """The matrix that turns coordinates i and i + pairs by an angle each, and leaves those after the pairs alone."""
    matrix, pairs = torch.eye(head_dim, dtype=torch.float64), len(angles)
    for pair, angle in enumerate(angles):
        cos, sin = scale * math.cos(angle), scale * math.sin(angle)
        matrix[pair, pair] = matrix[pair + pairs, pair + pairs] = cos
        matrix[pair, pair + pairs], matrix[pair + pairs, pair] = -sin, sin
    return matrix


def expected_scores(
    queries: list[Tensor],
    keys: Tensor,
    values: Tensor,
    turn: Tensor,
    scaling: float,
    *,
    sinks: int = 4,
    covariance: bool = True,
    value_norm: bool = True,
    epsilon: float = 0.0,
) -> list[float]:
    """Score of each token behind the first `sinks`, which have 0 attention and are kept anyway.

    `queries` of each head of the group before rotation `(tokens, head_dim)`; `turn` the mean rotation to come.
    """
    tokens = keys.shape[0]
    attention = [0.0] * tokens
    for head in queries:
        # "Compute the mean and covariance matrix of the queries before RoPE", the first ones left out.
        mean, spread = torch.zeros(head.shape[1]).double(), torch.zeros(head.shape[1], head.shape[1]).double()
        counted = [query.double() for query in head[sinks:]]
        for query in counted:
            mean += query / len(counted)
        for query in counted:
            spread += torch.outer(query - mean, query - mean) / len(counted)
        # "Compute the RoPE rotation matrix R on the next positions and average it; apply R to both."
        mean, spread = turn @ mean, turn @ spread @ turn.T
        # "E(A) = exp(K mu / sqrt(d) + 1/2 K C K / d)"
        logits = {}
        for token in range(sinks, tokens):
            key = keys[token].double()
            logits[token] = float(key @ mean) * scaling
            if covariance:
                logits[token] += float(key @ spread @ key) * scaling**2 / 2
        top = max(logits.values(), default=0.0)
        total = sum(math.exp(logit - top) for logit in logits.values())
        for token, logit in logits.items():
            attention[token] += math.exp(logit - top) / total / len(queries)
    # "Rescale the scores using (scores + epsilon) * ||V||_2"
    if not value_norm:
        return attention
    return [(attention[token] + epsilon) * float(values[token].double().norm()) for token in range(tokens)]
