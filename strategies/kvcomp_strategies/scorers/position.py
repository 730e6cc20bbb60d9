"""Later is better, and the first tokens are sinks."""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor

from kvcomp.core.interfaces import Scorer
from kvcomp.core.types import LayerView
from kvcomp_strategies.windows import share_of


class Position(Scorer, use="position"):
    """Score by recency and protect the first tokens: StreamingLLM (mit-han-lab/streaming-llm,
    `streaming_llm/kv_cache.py`).

    Deviations: compression happens when a forward ends, not at every decoded token, and keys keep their original
    positions (the official code rotates keys anew by their place in the cache, which M-RoPE has no counterpart for).

    Attributes:
        sinks: how many of the first tokens are protected; none where the budget does not exceed them.
        start: share of the slots that goes to the first tokens, rounded down, where that is more: CaM's lm-eval version
            keeps as many first as latest tokens.
    """

    sinks: int = Field(default=4, ge=0)
    start: float = Field(default=0.0, ge=0.0, le=1.0)

    def score(self, layer: LayerView, slots: Tensor) -> Tensor:
        """Return the place of each token on the token axis."""
        return torch.arange(layer.shape[2], device=layer.keys.device, dtype=torch.float64).expand(layer.shape)

    def protect(self, layer: LayerView, slots: Tensor) -> Tensor:
        """Return the sinks, where the budget is larger than their number, and the start."""
        first = torch.where(slots > self.sinks, self.sinks, 0).maximum(share_of(slots, self.start))
        return layer.valid & (layer.indices < first.to(layer.valid.device).reshape(layer.shape[0], -1, 1))
