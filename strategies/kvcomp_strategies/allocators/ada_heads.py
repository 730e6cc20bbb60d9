"""The heads of a layer share its budget by their scores."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from pydantic import Field
from torch import Tensor

from kvcomp.core.interfaces import BudgetAllocator
from kvcomp.core.types import LayerView, Scores
from kvcomp_strategies.apportioning import allot
from kvcomp_strategies.ranking import counts_among_best


class AdaHeads(BudgetAllocator, use="ada-heads"):
    """Ada-KV's budgets per head (FFY0/AdaKV, `adaptive_snapkv/monkeypatch/snapkv_utils.py`): of the tokens that all
    heads of a layer would keep beyond their windows, a head gets as many as it has among the best of the layer.

    Its quota is `window + (1 - floor) * count + floor * base`, where `base` is the uniform share without the window.
    Deviations: the official code rounds each head by itself, so that the sum misses the budget; here the sum is exact
    (largest remainder). It does nothing where the share exceeds the tokens before the window.

    Attributes:
        floor: the part of the uniform share that a head gets whatever its scores; 0.2 in the official `pred.py`, 0.5 in
            its `config_compress`.
        normalize: weigh a head's scores by the share of them that its own best `base` tokens have, as an option of the
            official code does.
    """

    floor: float = Field(default=0.2, ge=0.0, le=1.0)
    normalize: bool = False

    def allocate(self, slots: Tensor, layers: Sequence[LayerView], scores: Sequence[Scores]) -> Tensor:
        """Return the slots of each head, `(layers, batch, kv_heads)`, layer by layer."""
        given = [
            allot(self._quotas(slots, layer, score)[None], slots, [layer], [score])
            for layer, score in zip(layers, scores, strict=True)
        ]
        return torch.cat(given)

    def _quotas(self, slots: Tensor, layer: LayerView, scores: Scores) -> Tensor:
        """Return what each head of a layer should get, `(batch, kv_heads)` float64 on the CPU."""
        free = layer.valid & ~scores.protected
        protected = scores.protected.sum(dim=-1).cpu()
        base = (slots[:, None] - protected).clamp(min=0)
        values = self._normalized(scores.values, free, base) if self.normalize else scores.values
        keys = [key.float().transpose(1, 2) for key in (scores.priority(layer.valid), values)]
        pooled = (slots * layer.shape[1] - protected.sum(dim=1)).clamp(min=0)
        counts = counts_among_best(keys, free.transpose(1, 2), pooled)
        return protected + (1.0 - self.floor) * counts.double() + self.floor * base.double()

    @staticmethod
    def _normalized(values: Tensor, free: Tensor, base: Tensor) -> Tensor:
        """Return the scores of each head times the share that its best `base` `(batch, kv_heads)` tokens have."""
        mass = values.masked_fill(~free, 0.0).sort(dim=-1, descending=True).values.cumsum(dim=-1)
        place = base.to(values.device)[..., None].clamp(1, values.shape[-1]) - 1
        share = mass.gather(-1, place) / mass[..., -1:].clamp(min=torch.finfo(mass.dtype).tiny)
        return values * share
