"""The last queries vote for the tokens before them."""

from __future__ import annotations

from typing import Literal

from pydantic import Field
from torch import Tensor

from kvcomp.core.interfaces import Observation, Scorer
from kvcomp.core.types import LayerView
from kvcomp_strategies.observations.window_attention import WindowRows
from kvcomp_strategies.windows import (
    Kernel,
    group_mean,
    last_tokens,
    pool_average,
    pool_largest,
    sum_last_rows,
)


class WindowAttention(Scorer, use="window-attention"):
    """SnapKV (FasterDecoding/SnapKV, `snapkv/monkeypatch/snapkv_utils.py`): attention from the last window, pooled.

    The window is min(`window`, slots // 2) tokens: its queries vote, and its tokens are kept. Votes are summed over
    the window's rows, averaged over the query group, then pooled over neighbours before the window. With one slot the
    last query votes alone and the best token stays.

    Deviations: the official code keeps one cache per query head; pads its pooling with zeros (`count_include_pad`),
    which lowers the scores at the edges; returns slots in score order. Its window is a fixed number, and short
    prompts are left alone.

    Attributes:
        window: at most this many of the last queries vote.
        kernel: width of the pooling, odd; 1 for none.
        pooling: `"average"`, or `"max"` as in the configurations that the official code ran LongBench with.
    """

    provides = frozenset({"scores", "attention"})

    window: int = Field(default=32, ge=1)
    kernel: Kernel = 5
    pooling: Literal["average", "max"] = "average"

    def observations(self) -> tuple[Observation, ...]:
        """Return the last rows."""
        return (WindowRows(count=self.window),)

    def score(self, layer: LayerView, slots: Tensor) -> Tensor:
        """Return the pooled votes; tokens of the window score 0 and are protected."""
        kept = self._kept(slots)
        votes = sum_last_rows(layer.observations[WindowRows(count=self.window)], kept.clamp(min=1))
        before = layer.valid & ~last_tokens(layer, kept)
        pool = pool_average if self.pooling == "average" else pool_largest
        return pool(group_mean(votes, layer.shape[1]), before, self.kernel)

    def protect(self, layer: LayerView, slots: Tensor) -> Tensor:
        """Return the window."""
        return last_tokens(layer, self._kept(slots))

    @property
    def protects_by_share(self) -> bool:
        """Return that the window keeps its size, that of its votes, in heads that are allotted more or less."""
        return True

    def _kept(self, slots: Tensor) -> Tensor:
        return (slots // 2).clamp(max=self.window)
