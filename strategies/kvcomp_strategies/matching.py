"""From every token that does not stay to the most similar pivot that may receive it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from kvcomp.core.types import Assignment, LayerView, Modality, Pivots, Rule

CHUNK_ELEMENTS = 2**20  # similarities alive at a time, 4 MiB in float32
BLOCK = 64  # pivots that are looked at together
TIE = 1e-6  # float32 cosines closer than this are equal, and the earlier pivot wins
FORBIDDEN = -4.0  # added to the cosine of a forbidden pair: below every allowed one
LOWEST_ALLOWED = -2.0


def other_tokens(layer: LayerView, pivots: Pivots) -> Tensor:
    """Return the valid tokens that are no pivots, `(batch, kv_heads, others)` int64 ascending, -1 as padding."""
    kept = torch.zeros_like(layer.valid)
    kept.scatter_(2, pivots.indices, pivots.filled())
    if pivots.mask is not None:  # index 0 of an empty slot must not hide a kept token 0
        kept.scatter_(2, pivots.indices[..., :1], True)
    rest = layer.valid & ~kept
    width = layer.shape[2] - pivots.indices.shape[2] if pivots.mask is None else int(rest.sum(dim=-1).max())
    order = (~rest).to(torch.uint8).argsort(dim=-1, stable=True)[..., :width]
    return order.masked_fill(~rest.gather(2, order), -1)


def no_edges(layer: LayerView, pivots: Pivots) -> Assignment:
    """Return an assignment in which every other token is a source without a target."""
    sources = other_tokens(layer, pivots)
    targets = torch.full_like(sources, -1)[..., None]
    return Assignment(sources, targets, torch.zeros(targets.shape, device=targets.device))


def nearest_pivots(layer: LayerView, pivots: Pivots, eligible: Tensor, rule: Tensor, floor: float = -1.0) -> Assignment:
    """Return for each other token an edge to its most similar eligible pivot (FlowMM Eq. 9-10), none where there is
    none or its cosine is below the floor. See `most_similar`.
    """
    sources, targets, similarity = most_similar(layer, pivots, eligible, rule)
    return edges_to(sources, targets.masked_fill(similarity < floor - TIE, -1))


def edges_to(sources: Tensor, targets: Tensor) -> Assignment:
    """Return one edge of weight 1 per source that has a target, both `(batch, kv_heads, others)`, -1 for none."""
    return Assignment(sources, targets[..., None], (targets >= 0).float()[..., None])


def most_similar(layer: LayerView, pivots: Pivots, eligible: Tensor, rule: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the other tokens, the eligible pivot whose key has the largest cosine with theirs, and that cosine.

    Args:
        layer: what the layer holds; similarities are of keys as stored, after rotary embedding.
        pivots: what stays.
        eligible: `(batch, kv_heads, slots)` bool, the pivots that may receive tokens.
        rule: `(batch,)` a `Rule` per row.

    Returns:
        `(batch, kv_heads, others)` each: positions (-1 as padding), slot numbers (-1 where no pivot may receive the
        token) and float32 cosines (of no meaning there).
    """
    sources = other_tokens(layer, pivots)
    tokens, receivers = comparable(layer, pivots, eligible, rule)
    receivers = receivers.transpose(-1, -2).contiguous()
    chunks = torch.split(sources, max(1, CHUNK_ELEMENTS // eligible.numel()), dim=2)
    found = [_nearest(chunk, tokens, receivers) for chunk in chunks]
    targets, similarity = (torch.cat(pieces, dim=2) for pieces in zip(*found, strict=True))
    return sources, targets.masked_fill(sources < 0, -1), similarity


def comparable(layer: LayerView, pivots: Pivots, eligible: Tensor, rule: Tensor) -> tuple[Tensor, Tensor]:
    """Return vectors of tokens and of pivots whose product is their cosine, or -2 or less where the pivot may not
    receive the token: `(batch, kv_heads, tokens, features)` and `(batch, kv_heads, slots, features)` float32, as many
    slots as fill whole blocks.

    The rule of modalities and the eligibility are written into the matrix product: every key gets one more coordinate
    per modality (one-hot for a token, a penalty or 0 for a pivot), which adds exactly 0 to an allowed cosine and -4
    or less to a forbidden one.
    """
    keys = F.normalize(layer.keys.float(), dim=-1, eps=1e-12)
    one_hot = F.one_hot(layer.compared_modality.long(), len(Modality)).float()
    room = (0, -eligible.shape[2] % BLOCK)  # whole blocks, the last one filled up with pivots that are not eligible
    penalties = _penalties(F.pad(pivots.gather(layer.compared_modality), room), F.pad(eligible, room), rule)
    receivers = torch.cat([F.pad(pivots.gather(keys), (0, 0, *room)), penalties], dim=-1)
    return torch.cat([keys, one_hot], dim=-1), receivers


def scored_quantile(importance: Tensor, scored: Tensor, quantile: float) -> Tensor:
    """Return a quantile of the importance of the scored pivots of each head, `(batch, kv_heads, 1)`, with linear
    interpolation; NaN, which nothing is at most, where no pivot is scored.

    Args:
        importance: of the pivots, `(batch, kv_heads, slots)` float32.
        scored: likewise, bool.
        quantile: from 0 to 1.
    """
    return importance.masked_fill(~scored, float("nan")).nanquantile(quantile, dim=-1, keepdim=True)


def allowed_modalities(same: Tensor, rule: Tensor) -> Tensor:
    """Return whether the rule lets a token go to a pivot, given whether they are of the same modality."""
    return torch.where(rule == Rule.INTRA, same, torch.where(rule == Rule.HETERO, ~same, rule == Rule.CROSS))


def _penalties(modality: Tensor, eligible: Tensor, rule: Tensor) -> Tensor:
    """Return what each pivot adds to the cosine of a token of each modality, `(batch, kv_heads, slots, modalities)`."""
    allowed = allowed_modalities(F.one_hot(modality.long(), len(Modality)).bool(), rule.view(-1, 1, 1, 1))
    return (allowed & eligible[..., None]).float().sub_(1.0).mul_(-FORBIDDEN)


def _nearest(sources: Tensor, tokens: Tensor, receivers: Tensor) -> tuple[Tensor, Tensor]:
    """Return the slot number of each source's nearest receiver, -1 for none, and its cosine, `(batch, kv_heads,
    sources)`.

    Args:
        sources: `(batch, kv_heads, sources)`, -1 as padding.
        tokens: `(batch, kv_heads, tokens, features)`.
        receivers: `(batch, kv_heads, features, slots)`.
    """
    index = sources.clamp(min=0)[..., None].expand(-1, -1, -1, tokens.shape[-1])
    similarity = tokens.gather(2, index) @ receivers
    blocks = rearrange(similarity, "b kv sources (blocks pivots) -> b kv sources blocks pivots", pivots=BLOCK)
    tops = blocks.amax(dim=-1)  # maxima are fast and the place of a maximum is slow, so it is looked for in two steps
    best = tops.amax(dim=-1, keepdim=True)
    block = (tops >= best - TIE).view(torch.uint8).argmax(dim=-1, keepdim=True)
    inside = blocks.gather(3, block[..., None].expand(*block.shape, BLOCK)).squeeze(3)
    first = block * BLOCK + (inside >= best - TIE).view(torch.uint8).argmax(dim=-1, keepdim=True)
    return first.masked_fill(best <= LOWEST_ALLOWED, -1).squeeze(-1), best.squeeze(-1)


def edge_cosines(layer: LayerView, pivots: Pivots, assignment: Assignment) -> Tensor:
    """Return the cosine of the keys at the two ends of each edge, `(batch, kv_heads, others, fanout)` float32, 0 where
    there is no edge or a key is zero.
    """
    keys = F.normalize(layer.keys.float(), dim=-1, eps=1e-12)
    source, kept = gather_tokens(keys, assignment.sources), pivots.gather(keys)
    products = [
        (source * gather_tokens(kept, targets)).sum(dim=-1).clamp(-1.0, 1.0)
        for targets in assignment.targets.unbind(-1)
    ]
    return torch.stack(products, dim=-1).masked_fill(assignment.targets < 0, 0.0)


def gather_tokens(vectors: Tensor, places: Tensor) -> Tensor:
    """Return vectors `(batch, kv_heads, tokens, head_dim)` at places `(batch, kv_heads, n)`, the first for -1."""
    return vectors.gather(2, places.clamp(min=0)[..., None].expand(-1, -1, -1, vectors.shape[-1]))
