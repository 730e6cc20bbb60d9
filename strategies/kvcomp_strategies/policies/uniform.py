"""Every layer may merge across modalities."""

from __future__ import annotations

import torch

from kvcomp.core.interfaces import LayerPolicy
from kvcomp.core.types import LayerPlan, LayerView, Rule


class UniformPolicy(LayerPolicy, use="uniform"):
    """Let every layer merge any token into any pivot, whatever its modality. With FlowMM's other parts: FlowMM
    without flow guidance.
    """

    def plan(self, layer: LayerView) -> LayerPlan:
        """Return the rule CROSS for every row; rho is not measured."""
        batch, device = layer.shape[0], layer.keys.device
        return LayerPlan(
            rule=torch.full((batch,), int(Rule.CROSS), dtype=torch.int8, device=device),
            rho=torch.full((batch,), float("nan"), device=device),
            share=torch.ones(batch, device=device),
        )
