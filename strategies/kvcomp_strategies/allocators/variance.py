"""Layers whose attention is spread evenly get more."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from einops import repeat
from pydantic import Field
from torch import Tensor

from kvcomp.core.interfaces import Observation
from kvcomp.core.types import LayerView, Scores
from kvcomp_strategies.apportioning import PromptAllocator, allot, even_share, held_tokens, needed_beside
from kvcomp_strategies.observations.received_attention import ReceivedSums

EPS = 1e-6  # of the official code


class VarianceAllocator(PromptAllocator, use="variance"):
    """D2O's layer budgets (AIoT-MLSys-Lab/D2O, `LMEval_kv_token_merge/modeling_llama3_new.py`): `softmax(-x)` over
    layers.

    `x` is the variance over tokens of the attention that they receive, min-max scaled over the query heads of the layer
    and averaged over them. The scaling discards the size of the variance: `x` says how it differs among heads. Heads
    of a layer get the same.

    Deviations: the official code clamps the shares to [0.01, 1] of the prompt without scaling the others; here the sum
    is exact (see `kvcomp_strategies.apportioning`), and a layer gets at least what is protected. It adds the first
    decoded row to the statistics; here they are those of the prompt.

    Attributes:
        skip_layers: layers that keep everything, negative ones counted from the end. The official code skips
            `[0, 1, -1]` on top of its budget; here they are inside it, and a budget that they exceed is refused.
    """

    skip_layers: tuple[int, ...] = Field(default=(), strict=False)

    def observations(self) -> tuple[Observation, ...]:
        """Return the column sums."""
        return (ReceivedSums(),)

    def allocate(self, slots: Tensor, layers: Sequence[LayerView], scores: Sequence[Scores]) -> Tensor:
        """Return the slots of each head, `(layers, batch, kv_heads)`.

        Raises:
            BudgetError: the skipped layers leave less than 1 slot per head to the others.
        """
        spread = torch.stack([_spread(layer).cpu() for layer in layers])  # (layers, batch)
        return allot((-spread).softmax(dim=0)[..., None], slots, layers, scores, self._whole(layers))

    def reallocate(
        self, slots: Tensor, layers: Sequence[LayerView], scores: Sequence[Scores], granted: Tensor
    ) -> Tensor:
        """Return the slots of each head, `(layers, batch, kv_heads)`, in proportion to what it was given; the skipped
        layers keep everything.
        """
        return allot(granted, slots, layers, scores, self._whole(layers))

    def least(self, layers: Sequence[LayerView], scores: Sequence[Scores]) -> Tensor:
        """Return the share that holds the skipped layers and 1 slot per head of the others, `(batch,)`."""
        return even_share(needed_beside(held_tokens(layers), self._whole(layers)))

    def _whole(self, layers: Sequence[LayerView]) -> list[int]:
        skipped = {number if number >= 0 else layers[0].layers + number for number in self.skip_layers}
        return [place for place, layer in enumerate(layers) if layer.layer in skipped]


def _spread(layer: LayerView) -> Tensor:
    """Return the mean over heads of the min-max scaled variance of received attention, `(batch,)` float64."""
    received = layer.observations[ReceivedSums()].double()
    group = received.shape[1] // layer.shape[1]
    valid = repeat(layer.valid, "b kv t -> b (kv group) t", group=group)
    tokens = valid.sum(dim=-1)
    mean = received.masked_fill(~valid, 0.0).sum(dim=-1) / tokens.clamp(min=1)
    squares = (received - mean[..., None]).masked_fill(~valid, 0.0).square().sum(dim=-1)
    variance = squares / (tokens - 1).clamp(min=1)  # (batch, heads)
    low, high = variance.amin(dim=1, keepdim=True), variance.amax(dim=1, keepdim=True)
    return ((variance - low) / (high - low + EPS)).mean(dim=1)
