"""Merge values, and leave keys as they are."""

from __future__ import annotations

from pydantic import Field, field_validator
from torch import Tensor

from kvcomp.core.interfaces import Merger
from kvcomp.core.types import Assignment, LayerView, Pivots
from kvcomp_strategies.mergers.pivot_mean import PivotMean
from kvcomp_strategies.merging import MergingMerger
from kvcomp_strategies.wrapping import another


class ValuesOnly(Merger, use="values-only"):
    """Merge values as another merger does; each slot keeps the key of its pivot, bit for bit.

    A key after rotary embedding is bound to its position, so that a mean of keys points to no position at all; under
    M-RoPE it was seen to break generation (ChenHong30/mllm-kvcompress, `mllm_kvcompress/methods/merging.py`). CaM
    (zyxxmu/cam, `cam_hf/utils_hh/modify_llama_cam.py`) merges values only.

    Attributes:
        merger: how values are merged.
    """

    merger: MergingMerger = Field(default=PivotMean())

    @field_validator("merger")
    @classmethod
    def _is_another(cls, merger: Merger) -> Merger:
        return another(merger, cls)

    @property
    def convex(self) -> frozenset[str]:
        """Return what the merger inside keeps convex, and keys, which nothing is mixed into."""
        return self.merger.convex | {"keys"}

    @property
    def alike(self) -> bool:
        """Return false: values change, keys do not."""
        return False

    def merge(self, layer: LayerView, pivots: Pivots, assignment: Assignment) -> tuple[Tensor, Tensor, Tensor]:
        """Return the pivots' own keys, and values and counts of the merger inside."""
        return pivots.gather(layer.keys), *self.merge_values(layer, pivots, assignment)

    def merge_values(self, layer: LayerView, pivots: Pivots, assignment: Assignment) -> tuple[Tensor, Tensor]:
        """Return values and counts of the merger inside, which merges no keys for them if it can do without."""
        return self.merger.merge_values(layer, pivots, assignment)
