"""What matters by attention first, then what would be missed in the output."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from pydantic import Field, field_validator
from torch import Tensor

from kvcomp.core.interfaces import Scorer
from kvcomp.core.types import LayerView, Scores
from kvcomp_strategies.ranking import best_first
from kvcomp_strategies.scorers.window_attention import WindowAttention
from kvcomp_strategies.value_norms import AttentionScorer, Norm, projected_norms
from kvcomp_strategies.windows import share_of
from kvcomp_strategies.wrapping import another


class Critical(Scorer, use="critical"):
    """CriticalKV (arXiv:2502.03805, Algorithm 1; NVIDIA/kvpress, `kvpress/presses/criticalkv_press.py`): a share of the
    slots goes to the best by attention alone, the rest to the best by (attention + epsilon) times the L1 norm of W_O v.

    With `first` 0 the score is attention times the norm throughout. What the scorer inside protects counts as first.

    Deviations: kvpress takes its first stage from a share of a ratio of all tokens; here it is `floor(first * slots)`
    of what the head was allotted, or of the uniform share if the scorer inside has a window that goes by that.

    Attributes:
        scorer: measures attention; any scorer that provides `attention`, numbers that are not negative.
        first: share of the slots that attention alone decides.
        epsilon: added to the attention, so that a token that is not looked at still counts by its norm.
        norm: `"l1"`, or `"l2"`, which needs less time.
    """

    scorer: AttentionScorer = Field(default=WindowAttention())
    first: float = Field(default=0.5, ge=0.0, le=1.0)
    epsilon: float = Field(default=1e-4, ge=0.0)
    norm: Norm = "l1"

    @field_validator("scorer")
    @classmethod
    def _is_another(cls, scorer: Scorer) -> Scorer:
        return another(scorer, cls)

    def score(self, layer: LayerView, slots: Tensor) -> Tensor:
        """Return the score of the second stage."""
        return (self.scorer.score(layer, slots) + self.epsilon) * projected_norms(layer, self.norm, self.use)

    @property
    def protects_by_share(self) -> bool:
        """Return what the scorer inside says."""
        return self.scorer.protects_by_share

    def protect(self, layer: LayerView, slots: Tensor) -> Tensor | None:
        """Return what the scorer inside protects."""
        return self.scorer.protect(layer, slots)

    def tiers(self, layer: LayerView, slots: Tensor) -> Tensor:
        """Return 1 for the tokens of the first stage, 0 for all others."""
        share = slots if slots.dim() == 1 else slots.amax(dim=-1)
        attention = self.scorer.score(layer, share).float().nan_to_num()
        protected = self.scorer.protect(layer, slots)
        protected = torch.zeros_like(layer.valid) if protected is None else protected & layer.valid
        order = best_first(Scores(attention, protected, self.scorer.tiers(layer, slots)), layer.valid)
        count = share_of(slots, self.first).to(order.device).reshape(layer.shape[0], -1, 1)
        places = torch.arange(layer.shape[2], device=order.device).expand(layer.shape)
        return torch.zeros(layer.shape, dtype=torch.int16, device=order.device).scatter(
            -1, order, (places < count).to(torch.int16)
        )

    def rounds(self, tokens: Tensor, slots: Tensor) -> Sequence[Tensor]:
        """Return the rounds of the scorer inside."""
        return self.scorer.rounds(tokens, slots)

    def together(self, layers: Sequence[LayerView], scores: Sequence[Scores]) -> Sequence[Scores]:
        """Return the scores of all layers as the scorer inside sees them together."""
        return self.scorer.together(layers, scores)
