"""Text before everything that is not text."""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor

from kvcomp.core.interfaces import Scorer
from kvcomp.core.types import LayerView, Modality
from kvcomp_strategies.scorers.received_attention import ReceivedAttention


class TextFirst(Scorer, use="text-first"):
    """LOOK-M's text prior: of the tokens that another scorer ranks, text is kept before images, video and audio.

    The order is lexicographic: what the other scorer protects, its tiers (a recent window), text, its scores. The
    scores stay as they are, and text receives merges like any pivot.

    Source: SUSTechBruce/LOOK-M, `LLaVA-mix_merge_v1/llava/model/kv_token_merge/modify_llama.py`. Deviations: it adds
    -65516 to the scores of images in float16, where the spacing is 32, so that their order is lost; it takes images to
    be spans of 576 placeholders; and it keeps all text whatever the budget, which the selector `top-k` does with
    `overflow: true`. The paper adds the largest score to every text token, which gives the same order as here.

    Attributes:
        scorer: what ranks the tokens; by default heavy hitters and as many recent tokens that stay open for merging.
    """

    scorer: Scorer = Field(default=ReceivedAttention(window="open"))

    @property
    def protects_by_share(self) -> bool:
        """Return what the scorer inside says."""
        return self.scorer.protects_by_share

    def score(self, layer: LayerView, slots: Tensor) -> Tensor:
        """Return the scores of the scorer inside."""
        return self.scorer.score(layer, slots)

    def protect(self, layer: LayerView, slots: Tensor) -> Tensor | None:
        """Return what the scorer inside protects."""
        return self.scorer.protect(layer, slots)

    def tiers(self, layer: LayerView, slots: Tensor) -> Tensor:
        """Return two tiers for each of the scorer inside, the upper one for text."""
        text = (layer.modality == Modality.TEXT) & layer.valid
        tiers = self.scorer.tiers(layer, slots)
        return text.to(torch.int16) if tiers is None else tiers * 2 + text
