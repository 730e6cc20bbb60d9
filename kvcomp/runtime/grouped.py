"""Attention with the query heads of a KV head as query rows, so that no key or value is repeated."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from kvcomp.runtime.forward import Logits


def attend_grouped(
    base: str,
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    mask: Tensor | None,
    logits: Logits,
    dropout: float = 0.0,
) -> tuple[Tensor, Tensor | None]:
    """Return the attention output `(batch, queries, heads, head_dim)`, and where it computes them the weights
    `(batch, heads, queries, slots)`.

    Args:
        base: `sdpa`, which knows neither softcap nor sinks, as transformers' own; any other computes the softmax in
            steps, in float32.
        query: `(batch, heads, queries, head_dim)`, after rotary embedding.
        keys: `(batch, kv_heads, slots, head_dim)`.
        values: likewise.
        mask: `(batch or 1, heads, queries, slots)`, or `(batch or 1, kv_heads or 1, 1, slots)` for one query; bool or
            additive; None where every query sees every slot.
        logits: how logits are made.
        dropout: probability that a weight is dropped.
    """
    batch, heads, queries, _ = query.shape
    kv_heads = keys.shape[1]
    rows = query.reshape(batch, kv_heads, heads // kv_heads * queries, -1)
    if mask is not None and mask.shape[1] == heads:
        mask = mask.reshape(mask.shape[0], kv_heads, rows.shape[2], -1)
    weights = None
    if base == "sdpa":
        output = F.scaled_dot_product_attention(rows, keys, values, mask, dropout, scale=logits.scaling)
    else:
        weights = F.dropout(probabilities(rows, keys, mask, sink_rows(query, kv_heads, logits), logits), dropout)
        weights = weights.to(query.dtype)
        output = weights @ values
        weights = weights.view(batch, heads, queries, -1)
    return output.reshape(batch, heads, queries, -1).transpose(1, 2).contiguous(), weights


def probabilities(query: Tensor, keys: Tensor, mask: Tensor | None, sinks: Tensor | None, logits: Logits) -> Tensor:
    """Return the softmax over slots, `(..., rows, slots)` float32; what sinks take is gone.

    Args:
        query: `(..., rows, head_dim)`.
        keys: `(..., slots, head_dim)`.
        mask: `(..., rows, slots)`, bool or additive, or None.
        sinks: `(..., rows, 1)`, or None.
        logits: how logits are made.
    """
    scores = (query @ keys.transpose(-1, -2)) * logits.scaling
    if logits.softcap is not None:
        scores = logits.softcap * torch.tanh(scores / logits.softcap)
    if mask is not None:
        lowest = torch.finfo(scores.dtype).min
        scores = scores.masked_fill(~mask, lowest) if mask.dtype == torch.bool else scores + mask
    if sinks is None:
        return scores.softmax(dim=-1, dtype=torch.float32)
    return torch.cat([scores, sinks], dim=-1).softmax(dim=-1, dtype=torch.float32)[..., :-1]


def sink_rows(query: Tensor, kv_heads: int, logits: Logits) -> Tensor | None:
    """Return the sink of every query row, `(batch, kv_heads, group * queries, 1)`; None where the model has none."""
    if logits.sinks is None:
        return None
    batch, _, queries, _ = query.shape
    rows = logits.sinks.to(query.dtype)[None, :, None].expand(batch, -1, queries)
    return rows.reshape(batch, kv_heads, -1, 1)
