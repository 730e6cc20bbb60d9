"""How many of its keys a layer's late queries hardly look at."""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor

from kvcomp.core.types import AttentionBlock
from kvcomp_strategies.observations.post_vision import AfterVision

Counts = tuple[Tensor, Tensor]  # entries that count, and entries, each (batch, heads) int64


class Sparsity(AfterVision, use="sparsity"):
    """VL-Cache's sparsity per query head, `(batch, heads)` float32: of the entries of the attention rows after the last
    image, the share that is below a part of the largest of their row.

    EffiVLM-Bench/EffiVLM-Bench, `kv_cache_compression/kv_cache_utils.py`. Entries are those that a query can
    see, be their probability 0 in float32. Where there is no image, or nothing after it, see `post-vision`.

    Attributes:
        threshold: the part of the largest entry.
        window: how many of the last queries stand in for those after the last image.
    """

    threshold: float = Field(default=0.01, gt=0.0, lt=1.0)

    def update(self, state: Counts | None, block: AttentionBlock) -> Counts:
        """Return the counts with the block's rows added."""
        visible = block.visible
        large = visible & (block.leading >= self.threshold * block.leading.amax(dim=-1, keepdim=True))
        counts = large.sum(dim=(2, 3)), visible.sum(dim=(2, 3))
        return counts if state is None else (state[0] + counts[0], state[1] + counts[1])

    def result(self, state: Counts) -> Tensor:
        """Return the share of entries that are small; 0 where there are no rows."""
        large, visible = state
        return torch.where(visible > 0, 1.0 - large / visible.clamp(min=1), 0.0)
