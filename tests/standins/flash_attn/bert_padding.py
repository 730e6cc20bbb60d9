"""What transformers takes from the package beside attention: rows with padding to sequences, and back."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def unpad_input(
    hidden_states: Tensor, attention_mask: Tensor, unused_mask: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, int, Tensor]:
    """Return the valid tokens, their places, where sequences begin, the longest, and all lengths."""
    assert unused_mask is None
    lengths = attention_mask.sum(dim=-1, dtype=torch.int32)
    indices = attention_mask.flatten().nonzero()[:, 0]
    begins = F.pad(lengths.cumsum(dim=0, dtype=torch.int32), (1, 0))
    return hidden_states.flatten(0, 1)[indices], indices, begins, int(lengths.max()), lengths


def pad_input(hidden_states: Tensor, indices: Tensor, batch: int, seqlen: int) -> Tensor:
    """Return tokens at their places in rows, zeros elsewhere."""
    rows = hidden_states.new_zeros(batch * seqlen, *hidden_states.shape[1:])
    rows[indices.long()] = hidden_states
    return rows.view(batch, seqlen, *hidden_states.shape[1:])
