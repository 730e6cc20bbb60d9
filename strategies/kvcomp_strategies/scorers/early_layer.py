"""An early layer says which images the later layers need."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from pydantic import Field
from torch import Tensor

from kvcomp.core.interfaces import Observation, Scorer
from kvcomp.core.types import LayerView, Modality, Scores
from kvcomp_strategies.observations.window_attention import WindowRows


class EarlyLayer(Scorer, use="early-layer"):
    """FastV (arXiv:2403.06764; pkunlp-icler/FastV, `models/llama/modeling_llama_fastv_kvcache.py`) on a cache: from
    layer `layer` on, image and video tokens are ranked by the attention of the last query in the layer before it,
    averaged over all query heads. All earlier layers and all other tokens are protected.

    Deviations: FastV drops the tokens from the hidden states of the later layers, which then neither compute nor store
    them; here the later layers have computed with all of them and only their caches are pruned, so the answer to the
    prompt itself is not changed. Its layers keep exactly the same tokens; here a remainder of the budget gives some
    of them one more. With `layer: 0` it picks at random; that is not offered.

    Attributes:
        layer: the first layer that is pruned; 2 in the official runs.
    """

    requires = frozenset({"all-layers"})

    layer: int = Field(default=2, ge=1)

    @property
    def protects_by_share(self) -> bool:
        """Return that what is protected does not depend on slots."""
        return True

    def observations(self) -> tuple[Observation, ...]:
        """Return the last row."""
        return (WindowRows(count=1),)

    def score(self, layer: LayerView, slots: Tensor) -> Tensor:
        """Return the attention of the last row of this layer."""
        row = layer.observations[WindowRows(count=1)][:, :, -1]
        return row.mean(dim=1, keepdim=True).expand(layer.shape)

    def protect(self, layer: LayerView, slots: Tensor) -> Tensor:
        """Return everything in the layers that are not pruned, what is neither image nor video in the others."""
        if layer.layer < self.layer:
            return layer.valid
        return layer.valid & (layer.modality != Modality.IMAGE) & (layer.modality != Modality.VIDEO)

    def together(self, layers: Sequence[LayerView], scores: Sequence[Scores]) -> Sequence[Scores]:
        """Return the scores with those of the layer before the first that is pruned in all that are."""
        sources = [pair for pair in zip(layers, scores, strict=True) if pair[0].layer == self.layer - 1]
        if not sources:
            return scores
        (source, known) = sources[0]
        return [
            score if layer.layer < self.layer else replace(score, values=_by_index(source, known.values, layer))
            for layer, score in zip(layers, scores, strict=True)
        ]


def _by_index(source: LayerView, values: Tensor, layer: LayerView) -> Tensor:
    """Return what the tokens of one layer score in another, which may hold others, `(batch, kv_heads, tokens)`; 0 where
    it does not hold them.
    """
    places = 1 + max(int(source.indices.max()), int(layer.indices.max()))  # one sync: it decides a shape
    known, wanted = (held.indices.long().masked_fill(~held.valid, places) for held in (source, layer))
    table = values.new_zeros(*values.shape[:2], places + 1).scatter(2, known, values.contiguous())
    return table.index_fill(2, torch.tensor([places], device=table.device), 0.0).to(wanted.device).gather(2, wanted)
