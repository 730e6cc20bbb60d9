"""Layers that look around get more."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from kvcomp.core.interfaces import Observation
from kvcomp.core.types import LayerView, Scores
from kvcomp_strategies.apportioning import PromptAllocator, allot
from kvcomp_strategies.observations.row_entropy import RowEntropy


class EntropyAllocator(PromptAllocator, use="entropy"):
    """MEDA's layer budgets (AIoT-MLSys-Lab/MEDA, `kv_token_merge/v433_modeling_dynamic_llama.py`): each layer's share
    is the softmax over layers of its mean attention entropy.

    Heads of a layer get the same. Deviations: the official code clamps the shares to [0.01, 1] of the prompt and leaves
    it at that, so that their sum misses the budget; here the sum is exact (see `kvcomp_strategies.apportioning`), and
    a layer gets at least what is protected. It adds the first decoded row to the statistics; here they are those of
    the prompt.

    Attributes:
        over: `"all"` keys count, as in the official code; `"other-modality"` is the cross-modal entropy of the paper
            (arXiv:2502.17599), whose function the official code has and does not call.
    """

    over: Literal["all", "other-modality"] = "all"

    def observations(self) -> tuple[Observation, ...]:
        """Return the row entropy."""
        return (RowEntropy(over=self.over),)

    def allocate(self, slots: Tensor, layers: Sequence[LayerView], scores: Sequence[Scores]) -> Tensor:
        """Return the slots of each head, `(layers, batch, kv_heads)`."""
        entropy = torch.stack([layer.observations[RowEntropy(over=self.over)].double().cpu() for layer in layers])
        weights = entropy.mean(dim=-1).softmax(dim=0)  # (layers, batch)
        return allot(weights[..., None], slots, layers, scores)
