"""What became of every token: a watcher that a request is given, and that is told of every compression."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from kvcomp.core.types import LayerView, MergePlan

EVICTED = -1


class Watcher(Protocol):
    """Is told of every compression that trims a layer, before the layer is changed.

    Give one to `compress(..., watcher=...)` or `session.cache(..., watcher=...)`. It must not change what it is shown.
    What it keeps of it stays in memory.
    """

    def compressed(self, layer: LayerView, plan: MergePlan) -> None:
        """Take note of what a layer held and of what is done with it."""


class Trace:
    """Remembers where every token of a request lives, through any number of compressions.

    For one request whose rows stay as they are: a trace does not follow beams, cropping or `restore`.

    Attributes:
        homes: by number of the compressed layer, `(batch, kv_heads, tokens)` int64 on the CPU: the position of the
            token in whose slot each token lives, its own where it is kept as it is, `EVICTED` where it is gone or is
            padding. Of several slots that a token was merged into it is the one with the largest weight. Layers that
            were never trimmed are not there.

    >>> trace = Trace()
    >>> trace.homes
    {}
    """

    def __init__(self) -> None:
        self.homes: dict[int, Tensor] = {}

    def compressed(self, layer: LayerView, plan: MergePlan) -> None:
        """Take note of what a layer held and of what is done with it."""
        now = _homes(layer, plan)
        before = self.homes.get(layer.layer)
        self.homes[layer.layer] = now if before is None else _follow(before, now)

    def of(self, layer: int, tokens: int) -> Tensor | None:
        """Return the homes of the first tokens in a compressed layer, `(batch, kv_heads, tokens)`; None where the layer
        was never trimmed and everything is at home.
        """
        homes = self.homes.get(layer)
        return None if homes is None else _lengthened(homes, tokens)[..., :tokens]


def _homes(layer: LayerView, plan: MergePlan) -> Tensor:
    """Return where the tokens of a view go, `(batch, kv_heads, tokens)`, by position in the row."""
    indices = layer.indices.long().cpu()
    tokens = int(indices.max()) + 1
    homes = torch.full((*indices.shape[:2], tokens + 1), EVICTED)  # the last column takes what is no token
    if plan.pivots is None or plan.assignment is None:
        own = indices.masked_fill(indices < 0, tokens)
        return homes.scatter_(2, own, own)[..., :tokens]
    kept = indices.gather(2, plan.pivots.indices.cpu()).masked_fill(~plan.pivots.filled().cpu(), tokens)
    homes.scatter_(2, kept, kept)
    sources, targets = plan.assignment.sources.cpu(), plan.assignment.targets.cpu()
    if sources.shape[2]:
        heaviest = plan.assignment.weights.cpu().masked_fill(targets < 0, -1.0).argmax(dim=-1, keepdim=True)
        slots = targets.gather(3, heaviest)[..., 0]
        moved = indices.gather(2, sources.clamp(min=0)).masked_fill((sources < 0) | (slots < 0), tokens)
        homes.scatter_(2, moved, kept.gather(2, slots.clamp(min=0)))
    return homes[..., :tokens]


def _follow(before: Tensor, now: Tensor) -> Tensor:
    """Return the homes after two compressions: whoever lived with a token goes where that went."""
    before = _lengthened(before, now.shape[2])
    return torch.where(before == EVICTED, EVICTED, now.gather(2, before.clamp(min=0)))


def _lengthened(homes: Tensor, tokens: int) -> Tensor:
    """Return the homes with those of later tokens, which are at home."""
    later = torch.arange(homes.shape[2], max(tokens, homes.shape[2])).expand(*homes.shape[:2], -1)
    return torch.cat([homes, later], dim=2)
