"""A mean in which a token weighs less the farther its key is from the pivot's."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from kvcomp.core.types import Assignment, LayerView, Pivots
from kvcomp_strategies.matching import gather_tokens
from kvcomp_strategies.merging import Blending, Shares, received_weight

LEAST_BANDWIDTH = 1e-12


class Gaussian(Blending, use="gaussian"):
    """KVMerger's Gaussian kernel (arXiv:2407.08454, Sec. 4): g_i = exp(-|k_p - k_i|^2 / (2 sigma^2)), 1 for the pivot p
    itself; k_p <- sum_i g_i k_i / sum_i g_i over pivot and sources, the same for values.

    Left open, or different there:

    - `sigma` `"distance"`: 2 sigma^2 is the mean of |k_p - k_i|^2 over the set, its pivot included, at least 1e-12.
      `"paper"`: sigma = sum_i g_i / (sqrt(2) |set|), which is circular, so g is first taken with the bandwidth of
      `"distance"`. It is at most 0.71, and the distances of real keys are 10 to 1000, so that every weight but the
      pivot's vanishes: the method then keeps the pivot.
    - `value_scale` `"none"`; with `"size"`, values are multiplied by |set|, to make up for the softmax mass of the
      tokens that are gone, and leave the convex hull of their members.

    No official code was found.
    """

    sigma: Literal["distance", "paper"] = "distance"
    value_scale: Literal["none", "size"] = "none"

    @property
    def convex(self) -> frozenset[str]:
        """Return keys and values; keys alone where values are scaled."""
        return frozenset({"keys"} if self.value_scale == "size" else {"keys", "values"})

    @property
    def alike(self) -> bool:
        """Return whether values are not scaled."""
        return self.value_scale == "none"

    def shares(self, layer: LayerView, pivots: Pivots, assignment: Assignment) -> Shares:
        """Return the kernel of each member, divided by that of all."""
        slots = pivots.indices.shape[2]
        members = received_weight(assignment, slots) + 1.0
        kernel = replace(assignment, weights=self._kernel(layer, pivots, assignment, members))
        share = 1.0 / (received_weight(kernel, slots) + 1.0)
        return Shares(kernel, own=share, shared=share)

    def value_shares(self, shares: Shares, assignment: Assignment) -> Shares:
        """Return the shares of keys, times the size of the set where values are scaled."""
        if self.value_scale == "none":
            return shares
        members = received_weight(assignment, shares.own.shape[2]) + 1.0
        return replace(shares, own=shares.own * members, shared=shares.shared * members)

    def _kernel(self, layer: LayerView, pivots: Pivots, assignment: Assignment, members: Tensor) -> Tensor:
        """Return g of each edge times its weight, `(batch, kv_heads, others, fanout)`."""
        slots = members.shape[2]
        distance = _squared_distances(layer, pivots, assignment)
        spread = replace(assignment, weights=assignment.weights * distance)
        bandwidth = (received_weight(spread, slots) / members).clamp(min=LEAST_BANDWIDTH)
        kernel = assignment.weights * _gaussian(distance, bandwidth, assignment)
        if self.sigma == "distance":
            return kernel
        mean = (received_weight(replace(assignment, weights=kernel), slots) + 1.0) / members
        return assignment.weights * _gaussian(distance, mean**2, assignment)


def _gaussian(distance: Tensor, bandwidth: Tensor, assignment: Assignment) -> Tensor:
    """Return exp(-distance / bandwidth) of each edge, the bandwidth `(batch, kv_heads, slots)` being its target's."""
    targets = assignment.targets.clamp(min=0)
    return (-distance / bandwidth.gather(2, targets.flatten(2)).view(targets.shape)).exp()


def _squared_distances(layer: LayerView, pivots: Pivots, assignment: Assignment) -> Tensor:
    """Return |k_p - k_i|^2 of each edge, `(batch, kv_heads, others, fanout)` float32."""
    source, kept = gather_tokens(layer.keys, assignment.sources).float(), pivots.gather(layer.keys).float()
    squares = [
        (source - gather_tokens(kept, targets)).square().sum(dim=-1) for targets in assignment.targets.unbind(-1)
    ]
    return torch.stack(squares, dim=-1)
