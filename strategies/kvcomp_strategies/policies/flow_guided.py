"""Merge across modalities only where attention crosses them."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from kvcomp.core.interfaces import LayerPolicy, Observation
from kvcomp.core.types import LayerPlan, LayerView, Rule
from kvcomp_strategies.observations.cross_modal_flow import CrossModalFlow

RULES = {"any": Rule.CROSS, "hetero": Rule.HETERO, "intra": Rule.INTRA}


class FlowGuided(LayerPolicy, use="flow-guided"):
    """FlowMM's cross-modal information flow guidance (Eq. 6-7, Sec. 3.3.1).

    rho is the share of a layer's attention that goes to tokens of another modality, averaged over query heads. Where
    rho exceeds the threshold, tokens merge across modalities; elsewhere, and where rho equals it, only within their
    own.

    Left open by the paper, with our defaults (rows of the FlowMM card):

    - `threshold` 0.25 (p): Table 3 peaks at 0.2 for one task and at 0.3 for another.
    - `cross` `"any"` (m): a cross-modal layer may merge into any pivot; `"hetero"` allows pivots of another modality
      only.
    - `absent` `"intra"` (s): what a row does that has only one modality, where rho is undefined.
    - `rows` `"sampled"` (q): rho is exact up to `exact` queries and estimated from `strata` rows above; `"all"` is
      always exact.
    """

    threshold: float = Field(default=0.25, ge=0.0, le=1.0)
    cross: Literal["any", "hetero"] = "any"
    absent: Literal["intra", "any"] = "intra"
    rows: Literal["sampled", "all"] = "sampled"
    exact: int = Field(default=512, ge=1)
    strata: int = Field(default=128, ge=1)

    def observations(self) -> tuple[Observation, ...]:
        """Return the flow observation with this policy's settings."""
        return (self._flow,)

    @property
    def _flow(self) -> CrossModalFlow:
        exact = max(self.exact, self.strata)
        return CrossModalFlow(exact=exact, strata=self.strata, rows_used=self.rows)

    def plan(self, layer: LayerView) -> LayerPlan:
        """Return CROSS (or HETERO) for rows with rho above the threshold, INTRA for the others."""
        rho = layer.observations[self._flow].mean(dim=1)
        rho = rho.masked_fill(_single_modality(layer), float("nan"))
        above, below = self._rules()
        rule = torch.where(rho > self.threshold, int(above), int(below))
        rule = torch.where(rho.isnan(), int(RULES[self.absent]), rule).to(torch.int8)
        return LayerPlan(rule=rule, rho=rho, share=torch.ones_like(rho))

    def _rules(self) -> tuple[Rule, Rule]:
        """Return the rule above the threshold and the rule at or below it."""
        return RULES[self.cross], Rule.INTRA


def _single_modality(layer: LayerView) -> Tensor:
    """Return which rows have valid tokens of one modality only, `(batch,)` bool."""
    found, valid = layer.compared_modality.flatten(1).int(), layer.valid.flatten(1)
    return found.masked_fill(~valid, 127).amin(dim=1) == found.masked_fill(~valid, -1).amax(dim=1)
