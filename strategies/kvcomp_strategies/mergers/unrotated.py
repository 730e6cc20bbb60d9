"""Merge keys as they were before their rotary embedding."""

from __future__ import annotations

from dataclasses import replace

import torch
from pydantic import Field, field_validator
from torch import Tensor

from kvcomp.core.interfaces import Merger
from kvcomp.core.rotary import Rotary
from kvcomp.core.types import Assignment, LayerView, Pivots
from kvcomp_strategies.mergers.pivot_mean import PivotMean
from kvcomp_strategies.merging import MergingMerger, received_weight
from kvcomp_strategies.wrapping import another


class Unrotated(Merger, use="unrotated"):
    """Turn keys back by the cos and sin that the model used, merge them as another merger does, and turn the result to
    the position of its pivot: k_j <- R(p_j) merge(R(p_j)^-1 k_j, R(p_i)^-1 k_i, ...), values as the merger says.

    A mean of keys after rotary embedding (RoFormer, arXiv:2104.09864, Eq. 15) points to no position at all. LOOK-M and
    D2O merge as cached (SUSTechBruce/LOOK-M, `llava/model/kv_token_merge/modify_llama.py`), which was seen to break
    generation under M-RoPE (ChenHong30/mllm-kvcompress, `mllm_kvcompress/methods/merging.py`). Here every axis of
    M-RoPE, partial and scaled rotations are turned back as the model turned them. Computed in float32. A pivot that
    receives nothing keeps its bits; a result outside the range of the keys' type is cut to it.

    Matchers look at keys as cached.

    Attributes:
        merger: how keys, turned back, and values are merged.
    """

    rotary = True

    merger: MergingMerger = Field(default=PivotMean())

    @field_validator("merger")
    @classmethod
    def _is_another(cls, merger: Merger) -> Merger:
        return another(merger, cls)

    @property
    def convex(self) -> frozenset[str]:
        """Return what the merger inside keeps convex, without keys: they are so only before their embedding."""
        return self.merger.convex - {"keys"}

    @property
    def alike(self) -> bool:
        """Return false: keys are turned, values are not."""
        return False

    def merge(self, layer: LayerView, pivots: Pivots, assignment: Assignment) -> tuple[Tensor, Tensor, Tensor]:
        """Return keys merged before their embedding, and values and counts of the merger inside."""
        before, rotary = _turned_back(layer)
        keys, values, counts = self.merger.merge(before, pivots, assignment)
        largest = torch.finfo(layer.keys.dtype).max
        turned = rotary.gather(pivots).rotate(keys).clamp(-largest, largest)
        changed = received_weight(assignment, pivots.indices.shape[2]) > 0
        return torch.where(changed[..., None], turned.to(layer.keys.dtype), pivots.gather(layer.keys)), values, counts

    def merge_values(self, layer: LayerView, pivots: Pivots, assignment: Assignment) -> tuple[Tensor, Tensor]:
        """Return values and counts of the merger inside, whose weights may depend on keys before their embedding."""
        before, _ = _turned_back(layer)
        return self.merger.merge_values(before, pivots, assignment)


def _turned_back(layer: LayerView) -> tuple[LayerView, Rotary]:
    """Return the layer with keys as they were before their embedding, in float32, and how they were turned."""
    assert layer.rotary is not None  # the strategy has checked
    return replace(layer, keys=layer.rotary.unrotate(layer.keys)), layer.rotary
