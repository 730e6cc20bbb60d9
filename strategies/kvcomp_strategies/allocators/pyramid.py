"""Early layers get more, later ones less."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from kvcomp.core.interfaces import BudgetAllocator
from kvcomp.core.types import LayerView, Scores
from kvcomp_strategies.apportioning import allot, held_tokens, protected_tokens


class Pyramid(BudgetAllocator, use="pyramid"):
    """PyramidKV's layer budgets (Zefan-Cai/KVCache-Factory, `pyramidkv/pyramidkv_utils.py`, `PyramidKVCluster`): an
    arithmetic series from the first layer to the last.

    With `c` the slots beyond the protected window, the last layer gets `low = c // beta` of them and the first
    `high = 2 c - low`; where the prompt is shorter than that, `high` is what it has and `low = 2 c - high`. Heads of a
    layer get the same.

    Deviations: the official step is a whole number, which leaves part of the budget unused; here the quotas are exact
    and rounded by largest remainder. A layer gets at least 1 slot and what is protected.

    Attributes:
        beta: the last layer gets this fraction of the mean, `1 / beta`.
        short: what a prompt gets that has less than twice the slots beyond the window: `"clip"` the series as above, or
            `"uniform"` the same for every layer, as the official code does.
    """

    scope = "model"

    beta: int = Field(default=20, ge=1)
    short: Literal["clip", "uniform"] = "clip"

    def allocate(self, slots: Tensor, layers: Sequence[LayerView], scores: Sequence[Scores]) -> Tensor:
        """Return the slots of each head, `(layers, batch, kv_heads)`."""
        held, window = (count.amax(dim=(0, 2)) for count in (held_tokens(layers), protected_tokens(scores)))
        scored = (slots - window).clamp(min=0)
        low, high = self._ends(scored, held - window)
        steps = torch.linspace(0, 1, len(layers), dtype=torch.float64)[:, None]
        weights = window + high + (low - high) * steps  # (layers, batch)
        if self.short == "uniform":
            weights = torch.where(held < 2 * scored, 1.0, weights)
        return allot(weights[..., None], slots, layers, scores)

    def _ends(self, scored: Tensor, most: Tensor) -> tuple[Tensor, Tensor]:
        """Return what the last and the first layer get beyond the window, `(batch,)` each."""
        low = scored // self.beta
        high = (2 * scored - low).minimum(most)
        return 2 * scored - high, high
