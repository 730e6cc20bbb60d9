"""Keep the first tokens and the latest, whatever they score."""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor

from kvcomp.core.interfaces import PivotSelector
from kvcomp.core.types import LayerView, Pivots, Scores
from kvcomp_strategies.selectors.top_k import TopK


class SinksAndRecent(PivotSelector, use="sinks-and-recent"):
    """Keep the protected tokens, then the first `sinks`, then the latest: StreamingLLM (mit-han-lab/streaming-llm,
    `streaming_llm/kv_cache.py`) as a selector.

    It needs no scorer. With the scorer `position` and the selector `top-k`, the recipe `streaming-llm` keeps the same
    tokens; here the importance that another scorer gives is left to the matcher and the merger, as for a gate.

    Deviations: those of the scorer `position`.

    Attributes:
        sinks: how many of the first tokens are kept; none where a head keeps no more than that.
    """

    by_score = False

    sinks: int = Field(default=4, ge=0)

    def select(self, layer: LayerView, scores: Scores, slots: Tensor) -> Pivots:
        """Return the pivots, `slots` `(batch, kv_heads)` of them per head."""
        first = torch.where(slots > self.sinks, self.sinks, 0).to(layer.indices.device)
        tiers = (layer.valid & (layer.indices < first[..., None])).to(torch.int16)
        places = torch.arange(layer.shape[2], device=layer.keys.device, dtype=torch.float32).expand(layer.shape)
        return TopK().select(layer, Scores(places, scores.protected, tiers), slots)
