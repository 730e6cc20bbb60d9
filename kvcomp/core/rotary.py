"""Rotary embeddings of keys: how each token's key was turned, and how to turn it back."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from kvcomp.core.types import Pivots


@dataclass(frozen=True, eq=False)
class Rotary:
    """How the key of each token was rotated: each pair of coordinates (x, y) became (x cos - y sin, y cos + x sin).

    The pairs cover the first `2 * pairs` coordinates; those after them were left alone (partial rotary models). There
    are no pairs in a layer that does not rotate. A scaled rotation (YaRN) has cos^2 + sin^2 other than 1.

    Attributes:
        cos: `(batch, kv_heads, tokens, pairs)`, of any float dtype: what the model multiplied with.
        sin: likewise.
        interleaved: a pair is coordinates `2 i` and `2 i + 1`; otherwise `i` and `i + pairs`.
    """

    cos: Tensor
    sin: Tensor
    interleaved: bool = False

    def rotate(self, keys: Tensor) -> Tensor:
        """Return keys `(batch, kv_heads, tokens, head_dim)` rotated, in float32."""
        first, second, rest = self._pairs(keys)
        cos, sin = self.cos.float(), self.sin.float()
        return self._joined(first * cos - second * sin, second * cos + first * sin, rest)

    def unrotate(self, keys: Tensor) -> Tensor:
        """Return keys `(batch, kv_heads, tokens, head_dim)` as they were before they were rotated, in float32."""
        first, second, rest = self._pairs(keys)
        cos, sin = self.cos.float(), self.sin.float()
        norm = cos.square() + sin.square()
        cos, sin = cos / norm, sin / norm
        return self._joined(first * cos + second * sin, second * cos - first * sin, rest)

    def gather(self, pivots: Pivots) -> Rotary:
        """Return the rotations of the pivots."""
        return replace(self, cos=pivots.gather(self.cos), sin=pivots.gather(self.sin))

    def rows(self, places: Tensor) -> Rotary:
        """Return the rotations of some tokens of each row, `(batch, rows)` int64, the same of every head."""
        index = places[:, None, :, None].expand(-1, self.cos.shape[1], -1, self.cos.shape[3])
        return replace(self, cos=self.cos.gather(2, index), sin=self.sin.gather(2, index))

    def _pairs(self, keys: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the first and the second coordinate of each pair, and the coordinates that are not rotated."""
        pairs = self.cos.shape[-1]
        rotated, rest = keys[..., : 2 * pairs].float(), keys[..., 2 * pairs :].float()
        if self.interleaved:
            return rotated[..., 0::2], rotated[..., 1::2], rest
        return rotated[..., :pairs], rotated[..., pairs:], rest

    def _joined(self, first: Tensor, second: Tensor, rest: Tensor) -> Tensor:
        if self.interleaved:
            return torch.cat([torch.stack([first, second], dim=-1).flatten(-2), rest], dim=-1)
        return torch.cat([first, second, rest], dim=-1)
