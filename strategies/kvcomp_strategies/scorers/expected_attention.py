"""What queries that are not there yet can be expected to look at."""

from __future__ import annotations

import math

import torch
from einops import rearrange
from pydantic import Field
from torch import Tensor

from kvcomp.core.interfaces import Observation, Scorer
from kvcomp.core.rotary import Rotary
from kvcomp.core.types import LayerView
from kvcomp_strategies.observations.query_statistics import QueryStatistics


class ExpectedAttention(Scorer, use="expected-attention"):
    """Expected Attention (arXiv:2510.00636; NVIDIA/kvpress, `kvpress/presses/expected_attention_press.py`): take the
    queries to come for normally distributed, with the mean and covariance of the prompt's before their rotary
    embedding, turn both by the average rotation over the next `positions`, and score a key by the attention that such a
    query gives it, times the norm of its value:

        R = mean of R_p over p = T + 1 ... T + positions,   mu' = R mu,   C' = R C R^T
        s_j = (softmax_j(k_j mu' / sqrt(d) + k_j C' k_j / (2 d)), mean over the query heads, + epsilon) |v_j|_2

    It asks for no question and feeds nothing twice. The next rotations are read from those of the prompt: two tokens
    of a row whose positions follow each other in every axis tell by how much one step turns, so that partial rotary
    embeddings, scaled ones and M-RoPE need no code of their own. A row without two such tokens (an image and nothing
    else, under M-RoPE) takes the last token's rotation for all positions.

    Deviations:

    - `1 / sqrt(d)` is the model's own scaling of logits; a softcap and attention sinks of the model are left out.
    - the softmax is over the row's valid tokens without the first `sinks`, as in kvpress, which gives these the largest
      score of any row; here they are protected.
    - in a later turn the statistics are those of its new tokens, its own first `sinks` left out.

    Attributes:
        positions: how many future positions are averaged over.
        sinks: first tokens that are protected; as many queries are left out of the statistics.
        covariance: false to look at the mean alone.
        value_norm: false to leave the norm of the value out.
        epsilon: added to the expected attention before it is multiplied by the norm.
    """

    rotary = True
    prefill_only = "it expects queries like those of the prompt, and decoded ones are too few to tell"

    positions: int = Field(default=512, ge=1)
    sinks: int = Field(default=4, ge=0)
    covariance: bool = True
    value_norm: bool = True
    epsilon: float = Field(default=0.0, ge=0.0)

    def observations(self) -> tuple[Observation, ...]:
        """Return the statistics of the queries."""
        return (self._statistics(),)

    def score(self, layer: LayerView, slots: Tensor) -> Tensor:
        """Return the expected attention times the norm of the value."""
        statistics = rearrange(
            layer.observations[self._statistics()], "b (kv group) r d -> group b kv r d", kv=layer.shape[1]
        )
        future, keys = expected_rotation(layer, self.positions), layer.keys.float()
        hidden = ~layer.valid | (layer.indices < self.sinks)
        lowest = torch.finfo(torch.float32).min
        received = [
            self._logits(member, future, keys).nan_to_num().masked_fill(hidden, lowest).softmax(dim=-1)
            for member in statistics
        ]
        attention = torch.stack(received).mean(dim=0).masked_fill(hidden, 0.0)
        return (attention + self.epsilon) * layer.values.float().norm(dim=-1) if self.value_norm else attention

    def protect(self, layer: LayerView, slots: Tensor) -> Tensor | None:
        """Return the sinks."""
        return layer.valid & (layer.indices < self.sinks) if self.sinks else None

    def _logits(self, statistics: Tensor, future: Rotary, keys: Tensor) -> Tensor:
        """Return the logarithm of the expected weight of each key, `(batch, kv_heads, tokens)`.

        Args:
            statistics: of one query head of each KV head, `(batch, kv_heads, 1 + head_dim, head_dim)`.
            future: `(batch, kv_heads, 1, pairs)`.
            keys: `(batch, kv_heads, tokens, head_dim)`.
        """
        turned = future.rotate(statistics)  # every row of it: the mean, and C R^T
        logits = (keys @ turned[:, :, 0, :, None])[..., 0]
        if not self.covariance:
            return logits
        covariance = future.rotate(turned[:, :, 1:].transpose(-1, -2))
        return logits + ((keys @ covariance) * keys).sum(dim=-1) / 2

    def _statistics(self) -> QueryStatistics:
        return QueryStatistics(sinks=self.sinks)


def expected_rotation(layer: LayerView, positions: int) -> Rotary:
    """Return the mean of the rotations of the positions after the last, `(batch, kv_heads, 1, pairs)`: no rotation, as
    cos and sin of different angles cancel.

    Args:
        layer: with `rotary`.
        positions: how many.
    """
    assert layer.rotary is not None
    cos, sin = layer.rotary.cos.float(), layer.rotary.sin.float()
    step, at = _step(layer, torch.atan2(sin, cos))  # (batch, kv_heads, pairs), (batch, kv_heads)
    index = at[..., None, None].expand(*at.shape, 1, cos.shape[-1])
    cos, sin = cos.gather(2, index), sin.gather(2, index)  # of the token that later ones are counted from
    largest = layer.positions.masked_fill(~layer.valid, -1).amax(dim=(0, 3))
    own = layer.positions.gather(3, at[None, ..., None].expand(len(layer.positions), -1, -1, 1))[..., 0]
    ahead = (largest - own.amax(dim=0))[..., None] + torch.arange(1, positions + 1, device=at.device)
    angles = ahead[..., None] * step[:, :, None]  # (batch, kv_heads, positions, pairs)
    cosines, sines = angles.cos().mean(dim=2, keepdim=True), angles.sin().mean(dim=2, keepdim=True)
    return Rotary(cos * cosines - sin * sines, sin * cosines + cos * sines, layer.rotary.interleaved)


def _step(layer: LayerView, angles: Tensor) -> tuple[Tensor, Tensor]:
    """Return by how much one position turns each pair, `(batch, kv_heads, pairs)`, and the token to count from,
    `(batch, kv_heads)`: the later of the last two neighbours whose positions follow each other in every axis; without
    such, no turn and the last valid token.
    """
    follows = (layer.positions.diff(dim=-1) == 1).all(dim=0) & layer.valid[..., 1:] & layer.valid[..., :-1]
    places = torch.arange(layer.shape[2], device=angles.device)
    last = torch.where(layer.valid, places, 0).amax(dim=-1)
    if layer.shape[2] == 1:
        return torch.zeros_like(angles[:, :, 0]), last
    neighbour = torch.where(follows, places[1:], 0).amax(dim=-1)
    found = neighbour > 0
    index = neighbour.clamp(min=1)[..., None, None].expand(*neighbour.shape, 1, angles.shape[-1])
    turn = (angles.gather(2, index) - angles.gather(2, index - 1))[:, :, 0]
    turn = torch.remainder(turn + math.pi, 2 * math.pi) - math.pi  # the step of a pair is less than half a turn
    return torch.where(found[..., None], turn, 0.0), torch.where(found, neighbour, last)
