"""Layers whose attention is dense get more."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from pydantic import Field
from torch import Tensor

from kvcomp.core.interfaces import Observation
from kvcomp.core.types import LayerView, Scores
from kvcomp_strategies.apportioning import PromptAllocator, allot
from kvcomp_strategies.observations.sparsity import Sparsity


class SparsityAllocator(PromptAllocator, use="sparsity"):
    """VL-Cache's layer budgets (arXiv:2410.23317; EffiVLM-Bench/EffiVLM-Bench,
    `kv_cache_compression/kv_cache_utils.py`, `VlCacheKVCluster`): in proportion to the density of the attention of the
    queries after the last image.

    Density is 1 - sparsity, averaged over query heads. Heads of a layer get the same. Deviations: the port clips the
    shares to [0.01, 1] of the prompt and leaves it at that; here the sum is exact (see
    `kvcomp_strategies.apportioning`), and a layer gets at least 1 slot and what is protected.

    Attributes:
        threshold: an entry counts that is at least this part of the largest of its row.
        window: see the observation `sparsity`.
    """

    threshold: float = Field(default=0.01, gt=0.0, lt=1.0)
    window: int = Field(default=32, ge=1)

    def observations(self) -> tuple[Observation, ...]:
        """Return the sparsity of the rows after the last image."""
        return (self._sparsity,)

    @property
    def _sparsity(self) -> Sparsity:
        return Sparsity(threshold=self.threshold, window=self.window)

    def allocate(self, slots: Tensor, layers: Sequence[LayerView], scores: Sequence[Scores]) -> Tensor:
        """Return the slots of each head, `(layers, batch, kv_heads)`."""
        sparsity = torch.stack([layer.observations[self._sparsity].double().cpu() for layer in layers])
        return allot(1.0 - sparsity.mean(dim=-1, keepdim=True), slots, layers, scores)
