"""The most similar pivot, for tokens that are similar enough."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from kvcomp.core.interfaces import Matcher
from kvcomp.core.types import Assignment, LayerView, Pivots, Scores
from kvcomp_strategies.matching import TIE, edges_to, most_similar


class SimilarityThreshold(Matcher, use="similarity-threshold"):
    """D2O (arXiv:2406.13035): every token looks for the pivot with the most similar key; those at least as similar as a
    running mean go there, the others are evicted.

    With m the largest cosine of each token that does not stay, over the pivots that may receive, after rotary
    embedding: tau is the mean of m over heads and tokens of the row at the first compression of a layer, then
    tau <- beta * mean(m) + (1 - beta) * tau. A token is merged where m >= tau. The mean filter of LOOK-M's average and
    weighted merges is the same with `beta: 1`, the mean of this compression alone.

    Sources: AIoT-MLSys-Lab/D2O, `LLM_merge_new/LMEval_kv_token_merge/modeling_llama3_7b_13b_d2o.py`, and
    SUSTechBruce/LOOK-M, `LLaVA-mix_merge_v1/llava/model/kv_token_merge/modify_llama.py`. Deviations: tau belongs to one
    row of one request (the official one is kept from sample to sample); cosines within 1e-6 of tau pass; protected
    pivots receive nothing.

    Attributes:
        beta: weight of the latest mean; the paper's 0.7, 0.5 in the official code.
        filter: `"head"` compares the cosine of each token of each head; `"rank"` the mean over heads of the p-th token
            that does not stay, as both official codes do, though those are different tokens.
    """

    requires = frozenset({"pivots", "scores", "merging"})
    provides = frozenset({"edges"})

    beta: float = Field(default=0.7, gt=0.0, le=1.0)
    filter: Literal["head", "rank"] = "head"

    def match(self, layer: LayerView, pivots: Pivots, scores: Scores, rule: Tensor) -> Assignment:
        """Return one edge per token that is similar enough to an eligible pivot."""
        eligible = pivots.filled() & ~pivots.gather(scores.protected)
        sources, targets, similarity = most_similar(layer, pivots, eligible, rule)
        found = targets >= 0
        tau = self._tau(similarity, found, layer.memory)
        if self.filter == "rank":
            similarity = _mean(similarity, found, dims=(1,))
        passing = targets.masked_fill(similarity < tau[:, None, None] - TIE, -1)
        return replace(edges_to(sources, passing), memory=tau)

    def _tau(self, similarity: Tensor, found: Tensor, earlier: Tensor | None) -> Tensor:
        """Return the threshold of each row after this compression, `(batch,)`, NaN before a token found a pivot."""
        latest = _mean(similarity, found, dims=(1, 2)).flatten()
        latest = latest.masked_fill(~found.flatten(1).any(dim=1), float("nan"))
        if earlier is None:
            return latest
        mixed = self.beta * latest + (1.0 - self.beta) * earlier
        return torch.where(earlier.isnan(), latest, torch.where(latest.isnan(), earlier, mixed))


def _mean(similarity: Tensor, found: Tensor, dims: tuple[int, ...]) -> Tensor:
    """Return the mean over some dimensions of the tokens that found a pivot, 0 where none did."""
    total = similarity.masked_fill(~found, 0.0).sum(dim=dims, keepdim=True)
    return total / found.sum(dim=dims, keepdim=True).clamp(min=1)
