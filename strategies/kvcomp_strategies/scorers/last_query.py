"""The latest query alone says what matters."""

from __future__ import annotations

from typing import Literal

from pydantic import Field
from torch import Tensor

from kvcomp.core.interfaces import Observation, Scorer
from kvcomp.core.types import LayerView
from kvcomp_strategies.observations.window_attention import WindowRows
from kvcomp_strategies.windows import group_mean, last_tokens


class LastQuery(Scorer, use="last-query"):
    """TOVA (arXiv:2401.06104; schwartz-lab-NLP/TOVA, `src/tova_cache.py`): the attention of the latest query, averaged
    over all query heads, so that all KV heads keep the same tokens.

    Nothing is protected, neither the first tokens nor the latest.

    Attributes:
        heads: `"all"` averages over all query heads; `"group"` over those of a KV head, which then choose for
            themselves.
        recent: how many of the latest tokens are protected; 1 in NVIDIA/kvpress, `kvpress/presses/tova_press.py`.
    """

    provides = frozenset({"scores", "attention"})

    heads: Literal["all", "group"] = "all"
    recent: int = Field(default=0, ge=0)

    def observations(self) -> tuple[Observation, ...]:
        """Return the last row."""
        return (WindowRows(count=1),)

    def score(self, layer: LayerView, slots: Tensor) -> Tensor:
        """Return the attention of the last row."""
        row = layer.observations[WindowRows(count=1)][:, :, -1]
        return group_mean(row, 1 if self.heads == "all" else layer.shape[1]).expand(layer.shape)

    def protect(self, layer: LayerView, slots: Tensor) -> Tensor | None:
        """Return the latest tokens."""
        return last_tokens(layer, slots.new_full((layer.shape[0],), self.recent)) if self.recent else None
