"""A fair lottery: the control that every method must beat."""

from __future__ import annotations

from pydantic import Field
from torch import Tensor

from kvcomp.core.interfaces import Scorer
from kvcomp.core.types import LayerView

WORD = 0xFFFFFFFF


class Random(Scorer, use="random"):
    """Score by a hash of seed, layer, head and logical position: independent per head, the same for a row in any batch.

    Attributes:
        seed: another seed gives another choice.
    """

    seed: int = Field(default=0, ge=0, lt=2**31)

    def score(self, layer: LayerView, slots: Tensor) -> Tensor:
        """Return uniform numbers in [0, 1), `(batch, kv_heads, tokens)` float64: no ties in practice."""
        heads = layer.indices.new_tensor(range(layer.shape[1])).long()[None, :, None]
        stream = _mix(heads + (self.seed * 1_000_003 + layer.layer) * 4096)
        return _mix(_mix(layer.indices.long() ^ stream) ^ stream).double() / (WORD + 1)


def _mix(state: Tensor) -> Tensor:
    """Return a 32-bit integer hash (two rounds of multiply and xor-shift), in int64 so that no product overflows."""
    state = state & WORD
    for _ in range(2):
        state = ((state >> 16) ^ state) * 0x45D9F3B & WORD
    return (state >> 16) ^ state
