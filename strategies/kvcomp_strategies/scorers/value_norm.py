"""Attention, weighed by what is attended to."""

from __future__ import annotations

from collections.abc import Sequence

from pydantic import Field
from torch import Tensor

from kvcomp.core.interfaces import Scorer
from kvcomp.core.types import LayerView, Scores
from kvcomp_strategies.scorers.reconstruction import Reconstruction
from kvcomp_strategies.value_norms import AttentionScorer, Norm, mean_over_layer, projected_norms


class ValueNorm(Scorer, use="value-norm"):
    """Multiply the attention that another scorer measures by a power of the norm of W_O v: a token that is looked at
    matters as much as what it then adds to the layer's output.

    Eviction of token i changes the output of a head by about a_i W_O v_i, so that a_i times the norm bounds the loss
    (CriticalKV, arXiv:2502.03805, whose two stages are the scorer `critical`). A power below 1 lies between attention
    alone and that bound. Which is best depends on the model: see the page of `kvcomp-global` for two that disagree.
    Squared attention times the squared norm gives the order of power 1.

    Attributes:
        scorer: measures attention; any scorer that provides `attention`, numbers that are not negative.
        power: of the norm.
        norm: `"l2"`, or `"l1"` as in CriticalKV.
        relative: divide the norms by their mean over the tokens of all heads of the layer, so that a layer whose
            values are large does not draw the budget of the others to itself.
    """

    scorer: AttentionScorer = Field(default=Reconstruction())
    power: float = Field(default=0.5, gt=0.0, le=2.0)
    norm: Norm = "l2"
    relative: bool = False

    def score(self, layer: LayerView, slots: Tensor) -> Tensor:
        """Return attention times the power of the norm."""
        norms = projected_norms(layer, self.norm, self.use)
        if self.relative:
            norms = norms / mean_over_layer(norms, layer.valid)
        return self.scorer.score(layer, slots) * norms.pow(self.power)

    @property
    def protects_by_share(self) -> bool:
        """Return what the scorer inside says."""
        return self.scorer.protects_by_share

    def protect(self, layer: LayerView, slots: Tensor) -> Tensor | None:
        """Return what the scorer inside protects."""
        return self.scorer.protect(layer, slots)

    def tiers(self, layer: LayerView, slots: Tensor) -> Tensor | None:
        """Return the tiers of the scorer inside."""
        return self.scorer.tiers(layer, slots)

    def rounds(self, tokens: Tensor, slots: Tensor) -> Sequence[Tensor]:
        """Return the rounds of the scorer inside."""
        return self.scorer.rounds(tokens, slots)

    def together(self, layers: Sequence[LayerView], scores: Sequence[Scores]) -> Sequence[Scores]:
        """Return the scores of all layers as the scorer inside sees them together."""
        return self.scorer.together(layers, scores)
