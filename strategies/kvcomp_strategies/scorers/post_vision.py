"""The text after the images says what matters."""

from __future__ import annotations

from pydantic import Field
from torch import Tensor

from kvcomp.core.interfaces import Observation, Scorer
from kvcomp.core.types import LayerView
from kvcomp_strategies.observations.post_vision import PostVisionSums
from kvcomp_strategies.windows import group_mean, last_tokens, share_of


class PostVision(Scorer, use="post-vision"):
    """VL-Cache (arXiv:2410.23317; EffiVLM-Bench/EffiVLM-Bench, `kv_cache_compression/kv_cache_utils.py`,
    `VlCacheKVCluster`): attention from the queries after the last image, and a recent window.

    The sum over the query group of the port is a mean here, which gives the same order. Deviations: where a prompt has
    no image, or nothing after it, the port fails; here the last queries vote.

    Attributes:
        recent: share of a head's slots that goes to the latest tokens, rounded down.
        window: how many queries vote where none comes after an image.
    """

    provides = frozenset({"scores", "attention"})

    recent: float = Field(default=0.1, ge=0.0, le=1.0)
    window: int = Field(default=32, ge=1)

    def observations(self) -> tuple[Observation, ...]:
        """Return the column sums of the rows after the last image."""
        return (PostVisionSums(window=self.window),)

    def score(self, layer: LayerView, slots: Tensor) -> Tensor:
        """Return the attention received from them."""
        return group_mean(layer.observations[PostVisionSums(window=self.window)], layer.shape[1])

    def protect(self, layer: LayerView, slots: Tensor) -> Tensor:
        """Return the recent window."""
        return last_tokens(layer, share_of(slots, self.recent))
