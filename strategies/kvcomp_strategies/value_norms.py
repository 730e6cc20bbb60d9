"""How large what a token adds to the layer's output can be: norms of W_O v."""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from einops import rearrange
from pydantic import AfterValidator
from torch import Tensor

from kvcomp.core.errors import UnsupportedUseError
from kvcomp.core.interfaces import Scorer
from kvcomp.core.types import LayerView


def _measures_attention(scorer: Scorer) -> Scorer:
    if "attention" not in scorer.gives():
        raise ValueError(f"must be a scorer that measures attention, and {scorer.use!r} does not")
    return scorer


AttentionScorer = Annotated[Scorer, AfterValidator(_measures_attention)]
"""A scorer whose scores are attention: never negative, 0 for what is not looked at. It provides `attention`."""

Norm = Literal["l1", "l2"]
CHUNK_ELEMENTS = 2**22  # entries of W_O v alive at a time, 16 MiB in float32


def projected_norms(layer: LayerView, norm: Norm, part: str) -> Tensor:
    """Return the norm of W_O v of each token, averaged over the query heads of its KV head, `(batch, kv_heads,
    tokens)` float32.

    Each query head has its own columns of W_O, so that values which a group shares reach the output in different ways.
    The L2 norm needs no product with W_O: it is sqrt(v^T G v) with G = W_O^T W_O of the head, `(head_dim, head_dim)`.

    Args:
        layer: what the layer holds.
        norm: `"l1"` or `"l2"`.
        part: who asks, for the message.

    Raises:
        UnsupportedUseError: the model's adapter does not give the output projection.
    """
    heads = _weights(layer, part)
    measure = _l1 if norm == "l1" else _l2
    per_head = [
        torch.stack([measure(values, weight) for weight in group]).mean(dim=0)
        for values, group in zip(layer.values.float().unbind(dim=1), heads, strict=True)
    ]
    return torch.stack(per_head, dim=1)


def mean_over_layer(norms: Tensor, valid: Tensor) -> Tensor:
    """Return the mean of the norms `(batch, kv_heads, tokens)` over the valid tokens of all heads of each row,
    `(batch, 1, 1)`; just above 0 where all are 0.
    """
    total = norms.masked_fill(~valid, 0.0).sum(dim=(1, 2), keepdim=True)
    return (total / valid.sum(dim=(1, 2), keepdim=True).clamp(min=1)).clamp(min=torch.finfo(norms.dtype).tiny)


def _weights(layer: LayerView, part: str) -> Tensor:
    """Return W_O of each query head, `(kv_heads, group, hidden, head_dim)` float32."""
    if layer.output is None or layer.output.shape[2] != layer.values.shape[3]:
        given = "none" if layer.output is None else f"columns of {layer.output.shape[2]} per head"
        raise UnsupportedUseError(
            f"{part!r} needs the output projection of attention, with columns of {layer.values.shape[3]} per head; the "
            f"model's adapter gave {given}. Write an adapter whose output_projection() returns its weight, or use "
            "another scorer"
        )
    weights = layer.output.to(device=layer.values.device, dtype=torch.float32)
    return rearrange(weights, "(kv group) hidden d -> kv group hidden d", kv=layer.shape[1])


def _l2(values: Tensor, weight: Tensor) -> Tensor:
    """Return `(batch, tokens)` for values `(batch, tokens, head_dim)` and a weight `(hidden, head_dim)`."""
    return ((values @ (weight.T @ weight)) * values).sum(dim=-1).clamp(min=0.0).sqrt()


def _l1(values: Tensor, weight: Tensor) -> Tensor:
    """Return `(batch, tokens)`, in chunks of tokens."""
    size = max(1, CHUNK_ELEMENTS // (values.shape[0] * weight.shape[0]))
    return torch.cat([(chunk @ weight.T).abs().sum(dim=-1) for chunk in torch.split(values, size, dim=1)], dim=1)
