"""The attention that each token receives from all queries."""

from __future__ import annotations

from torch import Tensor

from kvcomp.core.interfaces import Observation
from kvcomp.core.types import AttentionBlock


class ReceivedSums(Observation, use="received-attention"):
    """Column sums of the attention matrix over all queries, `(batch, heads, tokens)` float32, not normalised.

    Follows H2O (FMInference/H2O, `h2o_hf/utils_hh/modify_llama.py`): the raw sum, so that early tokens, which more
    queries can see, collect more. Summed in float32 whatever the model's dtype. Carried: surviving slots keep their
    sums in later turns.
    """

    carried = True

    def update(self, state: Tensor | None, block: AttentionBlock) -> Tensor:
        """Return the sums with the block's rows added."""
        received = block.widened(block.leading.sum(dim=2))
        return received if state is None else state + received
