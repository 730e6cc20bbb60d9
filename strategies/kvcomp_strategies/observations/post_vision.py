"""What the text after the last image looks at."""

from __future__ import annotations

from pydantic import Field
from torch import Tensor

from kvcomp.core.interfaces import Observation
from kvcomp.core.types import AttentionBlock, Modality


class AfterVision(Observation):
    """Of the attention rows after the last token that is no text. Where no query is an image, or none comes after the
    last one, the last queries stand in for those.

    Attributes:
        window: how many of the last queries that are.
    """

    window: int = Field(default=32, ge=1)

    @property
    def latest(self) -> int:
        """Return how many of the last queries stand in where those of an image are no longer among them."""
        return self.window

    def rows(self, valid: Tensor, modality: Tensor) -> Tensor:
        """Return the queries after the last image."""
        return rows_after_vision(valid, modality, self.window)


class PostVisionSums(AfterVision, use="post-vision"):
    """Column sums of the attention rows after the last token that is no text, `(batch, heads, tokens)` float32.

    VL-Cache's token statistic (arXiv:2410.23317). Where no query is an image, or none comes after the last one, the
    last queries stand in for those after it.

    Attributes:
        window: how many of the last queries that are.
    """

    def update(self, state: Tensor | None, block: AttentionBlock) -> Tensor:
        """Return the sums with the block's rows added."""
        received = block.widened(block.leading.sum(dim=2))
        return received if state is None else state + received


def rows_after_vision(valid: Tensor, modality: Tensor, window: int) -> Tensor:
    """Return the valid queries after the last that is no text, else the last `window`; `(batch, rows)` int64.

    Ascending, with -1 at the front of rows that have fewer.
    """
    seen = valid & (modality != Modality.TEXT)
    after = valid & (seen.flip(-1).cumsum(dim=-1).flip(-1) == 0)
    without = ~(seen.any(dim=-1, keepdim=True) & after.any(dim=-1, keepdim=True))
    latest = valid & (valid.flip(-1).cumsum(dim=-1).flip(-1) <= window)
    chosen = (latest & without) | (after & ~without)
    count = max(int(chosen.sum(dim=-1).max()), 1)  # one sync on an accelerator, since it decides a shape
    order = chosen.byte().argsort(dim=-1, stable=True)[:, -count:]
    return order.masked_fill(~chosen.gather(1, order), -1)
