"""What queries that are not there yet can be expected to look at."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from pydantic import Field
from torch import Tensor

from kvcomp.core.interfaces import Observation, Scorer
from kvcomp.core.rotary import Rotary
from kvcomp.core.types import LayerView
from kvcomp_strategies.observations.query_statistics import QueryStatistics

SAMPLED, TOGETHER = 128, 8  # tokens that tell how rotations go on, and how many of them at a time
BEYOND = 2**40  # farther away than any token


class ExpectedAttention(Scorer, use="expected-attention"):
    """Expected Attention (arXiv:2510.00636; NVIDIA/kvpress, `kvpress/presses/expected_attention_press.py`): take the
    queries to come for normally distributed, with the mean and covariance of the prompt's before their rotary
    embedding, turn both by the average rotation over the next `positions`, and score a key by the attention that such a
    query gives it, times the norm of its value:

        R = mean of R_p over p = T + 1 ... T + positions,   mu' = R mu,   C' = R C R^T
        s_j = (softmax_j(k_j mu' / sqrt(d) + k_j C' k_j / (2 d)), mean over the query heads, + epsilon) |v_j|_2

    It asks for no question and feeds nothing twice. The next rotations are read from those of the prompt: tokens that
    are as far apart in every axis of positions tell by how much one step turns, so that partial rotary embeddings,
    scaled ones and M-RoPE need no code of their own. A row without two such neighbours (an image and nothing else,
    under M-RoPE) takes the last token's rotation for all positions.

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


class Course(NamedTuple):
    """How rotations go on from a token: n positions later a pair is turned by `angle + n step`.

    Attributes:
        angle, step: `(batch, kv_heads, pairs)` float64.
        size: by how much a pair is stretched as well, 1 but for scaled rotations, likewise.
        ahead: positions between the token and the last of its row, `(batch, kv_heads)` int64.
    """

    angle: Tensor
    step: Tensor
    size: Tensor
    ahead: Tensor


def expected_rotation(layer: LayerView, positions: int) -> Rotary:
    """Return the mean of the rotations of the positions after the last, `(batch, kv_heads, 1, pairs)`: no rotation, as
    cos and sin of different angles cancel.

    Args:
        layer: with `rotary`.
        positions: how many.
    """
    assert layer.rotary is not None
    course = _course(layer, layer.rotary)
    ahead = course.ahead[..., None] + torch.arange(1, positions + 1, device=course.ahead.device)
    angles = (
        course.angle[:, :, None] + ahead[..., None] * course.step[:, :, None]
    )  # (batch, kv_heads, positions, pairs)
    cosines, sines = (turn(angles).mean(dim=2) * course.size for turn in (torch.cos, torch.sin))
    return Rotary(cosines.float()[:, :, None], sines.float()[:, :, None], layer.rotary.interleaved)


def _course(layer: LayerView, rotary: Rotary) -> Course:
    """Return how rotations go on, from a line through the angles of the tokens that stand in one row of positions.

    Two neighbours tell by how much a step turns, up to the rounding of a model's cos and sin, which is 0.004 in
    bfloat16 and 512 times that after 512 steps. So tokens farther and farther away make it more precise, each near
    enough for the last to tell how often it went round, and a line through all of them the most.
    """
    start, found = _start(layer)
    away, places = _sampled(layer, start, found)
    index = places[..., None].expand(-1, -1, -1, rotary.cos.shape[-1])
    cos, sin = rotary.cos.gather(2, index).double(), rotary.sin.gather(2, index).double()
    back = _wrapped(torch.atan2(sin, cos) - torch.atan2(sin, cos)[:, :, :1])  # from the token that is counted from
    step = _stepwise(away, -back)
    offset, slope = _line(away, _wrapped(back + away[..., None] * step[:, :, None]))
    largest = layer.positions.masked_fill(~layer.valid, -1).amax(dim=(0, 3))
    own = layer.positions.gather(3, start[None, ..., None].expand(len(layer.positions), -1, -1, 1))[..., 0].amax(dim=0)
    return Course(
        angle=torch.atan2(sin, cos)[:, :, 0] + offset,
        step=step - slope,
        size=(cos.square() + sin.square()).sqrt().mean(dim=2),
        ahead=largest.long() - own,
    )


def _start(layer: LayerView) -> tuple[Tensor, Tensor]:
    """Return the token to count from, `(batch, kv_heads)` int64: the later of the last two neighbours whose positions
    follow each other in every axis, else the last valid token; and whether there are such neighbours, bool.
    """
    places = torch.arange(layer.shape[2], device=layer.positions.device)
    last = torch.where(layer.valid, places, 0).amax(dim=-1)
    follows = (layer.positions.diff(dim=-1) == 1).all(dim=0) & layer.valid[..., 1:] & layer.valid[..., :-1]
    neighbour = (F.pad(follows, (1, 0)) * places).amax(dim=-1)
    return torch.where(neighbour > 0, neighbour, last), neighbour > 0


def _sampled(layer: LayerView, start: Tensor, found: Tensor) -> tuple[Tensor, Tensor]:
    """Return some tokens that lie as far before the first of them, `start`, in every axis, nearest first and ever
    farther apart: how far, and their places, `(batch, kv_heads, SAMPLED)` int64 each. Where no neighbours were
    `found`, the first one alone.
    """
    positions = layer.positions.long()
    differ = positions.gather(3, start[None, ..., None].expand(len(positions), -1, -1, 1)) - positions
    before = (differ == differ[:1]).all(dim=0) & (differ[0] >= 0) & layer.valid & found[..., None]
    places = torch.arange(layer.shape[2], device=start.device)
    order = torch.where(before, differ[0], BEYOND).masked_fill(places == start[..., None], -1).argsort(dim=-1)
    count = before.sum(dim=-1, keepdim=True).clamp(min=1).double()
    ranks = count.pow(torch.linspace(0, 1, SAMPLED, dtype=torch.float64, device=start.device)).round().long() - 1
    chosen = order.gather(2, ranks)
    return differ[0].gather(2, chosen), chosen


def _stepwise(away: Tensor, turned: Tensor) -> Tensor:
    """Return by how much one position turns each pair, `(batch, kv_heads, pairs)`.

    Args:
        away: of tokens, nearest first, `(batch, kv_heads, SAMPLED)`.
        turned: by how much all these steps do, up to whole rounds, `(batch, kv_heads, SAMPLED, pairs)`.
    """
    next_to = (away == 1)[..., None]
    step = (turned * next_to).sum(dim=2) / next_to.sum(dim=2).clamp(min=1)
    for far, turn in zip(torch.split(away, TOGETHER, dim=2), torch.split(turned, TOGETHER, dim=2), strict=True):
        rest = _wrapped(turn - far[..., None] * step[:, :, None]) / far.clamp(min=1)[..., None]
        counted = (far > 0)[..., None]
        step = step + (rest * counted).sum(dim=2) / counted.sum(dim=2).clamp(min=1)
    return step


def _line(along: Tensor, heights: Tensor) -> tuple[Tensor, Tensor]:
    """Return the height at 0 and the slope of the line with the least squares, `(batch, kv_heads, pairs)` each.

    Args:
        along: `(batch, kv_heads, points)`.
        heights: `(batch, kv_heads, points, pairs)`.
    """
    centre, level = along.double().mean(dim=2, keepdim=True), heights.mean(dim=2)
    apart = (along - centre)[..., None]
    slope = (apart * heights).sum(dim=2) / apart.square().sum(dim=2).clamp(min=1)
    return level - centre * slope, slope


def _wrapped(angles: Tensor) -> Tensor:
    """Return angles between minus and plus half a turn."""
    return torch.remainder(angles + math.pi, 2 * math.pi) - math.pi
