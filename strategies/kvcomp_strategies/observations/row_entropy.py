"""How widely a layer's queries spread their attention."""

from __future__ import annotations

from typing import Literal

import torch
from einops import repeat
from torch import Tensor

from kvcomp.core.interfaces import Observation
from kvcomp.core.types import AttentionBlock, compared_modality

Total = tuple[Tensor, Tensor]  # entropies summed over rows (batch, heads), and rows (batch, 1)
LEAST_MASS = 1e-30  # a row that gives less to the other modalities does not look at them


class RowEntropy(Observation, use="row-entropy"):
    """The mean entropy of the attention rows per query head, `(batch, heads)` float32, in nats.

    MEDA's `E_l = -sum_ij a log a / rows` (AIoT-MLSys-Lab/MEDA, `kv_token_merge/modify_llama.py`) before its mean over
    heads. Computed in float32 with `0 log 0 = 0`; the official code clamps at 1e-12 in the dtype of the model.

    Attributes:
        over: `"all"` keys, as the official code does; or `"other-modality"`, the cross-modal entropy that the paper
            describes: each row restricted to keys of another modality and normalised to 1 over them. A row that sees
            none counts as 0.
    """

    over: Literal["all", "other-modality"] = "all"

    def update(self, state: Total | None, block: AttentionBlock) -> Total:
        """Return the sum of the entropies and the number of rows, with the block's rows added."""
        entropies = _entropies(block.leading) if self.over == "all" else _foreign_entropies(block)
        added, rows = entropies.sum(dim=2), block.row_valid.sum(dim=1, keepdim=True)
        return (added, rows) if state is None else (state[0] + added, state[1] + rows)

    def result(self, state: Total) -> Tensor:
        """Return the mean over rows."""
        return state[0] / state[1].clamp(min=1)


def _entropies(probs: Tensor) -> Tensor:
    """Return -sum p log p of each row, `(batch, heads, rows)`."""
    return -torch.xlogy(probs, probs).sum(dim=-1)


def _foreign_entropies(block: AttentionBlock) -> Tensor:
    """Return the entropy of each row over the keys of other modalities, `(batch, heads, rows)`."""
    seen = block.leading.shape[-1]
    foreign = (
        compared_modality(block.modality)[:, :, None, :seen] != compared_modality(block.row_modality)[:, None, :, None]
    )
    foreign = foreign & block.valid[:, :, None, :seen]
    group = block.leading.shape[1] // foreign.shape[1]
    probs = block.leading.masked_fill(~repeat(foreign, "b kv rows t -> b (kv group) rows t", group=group), 0.0)
    mass = probs.sum(dim=-1)
    looked = mass > LEAST_MASS
    return _entropies(probs / mass.masked_fill(~looked, 1.0)[..., None]).masked_fill(~looked, 0.0)
