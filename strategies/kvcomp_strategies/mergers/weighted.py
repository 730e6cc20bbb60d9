"""A mean in which more similar tokens weigh more."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

from kvcomp.core.types import Assignment, LayerView, Pivots
from kvcomp_strategies.matching import edge_cosines
from kvcomp_strategies.merging import Blending, Shares, received_weight


class Weighted(Blending, use="weighted"):
    """Weights from u_ij, the cosine of the keys of source and pivot; keys and values with the same weights.

    - `"exp"`, the D2O paper (arXiv:2406.13035): k_j <- (e k_j + sum_i exp(u_ij) k_i) / (e + sum_i exp(u_ij)).
    - `"cosine_mean"`, the code of D2O and LOOK-M's weighted merge: k_j <- (k_j + sum_i u_ij k_i) / (n_j + 1). The
      weights do not sum to 1: a merged slot shrinks where u < 1, and leaves the convex hull of its members.

    Sources: AIoT-MLSys-Lab/D2O, `LLM_merge_new/LMEval_kv_token_merge/modeling_llama3_7b_13b_d2o.py`, and
    SUSTechBruce/LOOK-M, `LLaVA-mix_merge_v1/llava/model/kv_token_merge/modify_llama.py`. A source that is shared among
    pivots brings its part.
    """

    weighting: Literal["exp", "cosine_mean"] = "exp"

    @property
    def convex(self) -> frozenset[str]:
        """Return nothing for the raw cosines, whose weights do not sum to 1."""
        return frozenset({"keys", "values"}) if self.weighting == "exp" else frozenset()

    def shares(self, layer: LayerView, pivots: Pivots, assignment: Assignment) -> Shares:
        """Return the weights by similarity, divided by their sum or by the number of members."""
        similarity, slots = edge_cosines(layer, pivots, assignment), pivots.indices.shape[2]
        factor = (similarity - 1.0).exp() if self.weighting == "exp" else similarity
        weighted = replace(assignment, weights=assignment.weights * factor)
        divisor = weighted if self.weighting == "exp" else assignment
        share = 1.0 / (received_weight(divisor, slots) + 1.0)
        return Shares(weighted, own=share, shared=share)
