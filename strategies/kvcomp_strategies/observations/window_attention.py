"""The last attention rows, kept one by one."""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor

from kvcomp.core.interfaces import Observation
from kvcomp.core.types import AttentionBlock


class WindowRows(Observation, use="window-attention"):
    """Attention of the last valid queries of each row, `(batch, heads, count, tokens)` float32, right-aligned.

    The rows are not summed, so that one observation serves every budget: a scorer takes as many of the last rows as its
    window has. Where a row of the batch has fewer queries, its first rows are zero.

    Attributes:
        count: how many rows are kept.
    """

    count: int = Field(default=32, ge=1)

    @property
    def latest(self) -> int:
        """Return the number of rows."""
        return self.count

    def rows(self, valid: Tensor, modality: Tensor) -> Tensor:
        """Return the last `count` valid queries, `(batch, count)`, -1 at the front where there are fewer."""
        order = valid.to(torch.uint8).argsort(dim=-1, stable=True)[:, -self.count :]
        return order.masked_fill(~valid.gather(1, order), -1)

    def update(self, state: Tensor | None, block: AttentionBlock) -> Tensor:
        """Return the rows so far with those of the block below them."""
        return block.probs if state is None else torch.cat([state, block.probs], dim=2)
