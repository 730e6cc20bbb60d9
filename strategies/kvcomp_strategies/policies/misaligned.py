"""The opposite of flow guidance, for the ablation."""

from __future__ import annotations

from typing import Literal

from kvcomp.core.types import Rule
from kvcomp_strategies.policies.flow_guided import RULES, FlowGuided


class Misaligned(FlowGuided, use="misaligned"):
    """FlowMM's misaligned merging (Sec. 3.2.2): within modalities where attention crosses them, across where it does
    not.

    The paper reports that it halves the accuracy on ALFRED. It says "inter-modal merging at low-interaction layers",
    which we read as pivots of another modality only: `cross` `"hetero"` is the default here (row m of the FlowMM
    card), `"any"` the option.
    """

    cross: Literal["any", "hetero"] = "hetero"

    def _rules(self) -> tuple[Rule, Rule]:
        return Rule.INTRA, RULES[self.cross]
