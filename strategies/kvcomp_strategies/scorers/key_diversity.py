"""Keys unlike the others matter most."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from kvcomp.core.interfaces import Scorer
from kvcomp.core.types import LayerView


class KeyDiversity(Scorer, use="key-diversity"):
    """KeyDiff (arXiv:2504.15364; NVIDIA/kvpress, `kvpress/presses/keydiff_press.py`): the negative cosine between a key
    and the mean direction of all keys of its head.

    No attention is needed, and no query is favoured. A zero key has no direction and a cosine of 0. Deviations: the
    paper evicts block by block while the prompt is read; here once, when a forward ends.
    """

    def score(self, layer: LayerView, slots: Tensor) -> Tensor:
        """Return minus the cosine of each key with the mean direction."""
        directions = F.normalize(layer.keys.float(), dim=-1).masked_fill(~layer.valid[..., None], 0.0)
        mean = F.normalize(directions.sum(dim=2, keepdim=True), dim=-1)
        return -(directions * mean).sum(dim=-1)
