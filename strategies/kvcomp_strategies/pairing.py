"""Directions that two layers share."""

from __future__ import annotations

import math

import torch
from torch import Tensor

SMALLEST_SINE = 1e-4  # below it directions are interpolated on a line


def shared_direction(lower: Tensor, upper: Tensor, toward: float) -> tuple[Tensor, Tensor]:
    """Return the direction between those of two layers' vectors, and how far these are apart.

    MiniCache (arXiv:2405.14366): spherical interpolation, `e = sin((1 - t) O) / sin O * x / |x| + sin(t O) / sin O *
    y / |y|` with `O = arccos(cos)`; on a line where `sin O` is nearly 0.

    Args:
        lower: vectors of the lower layer, `(..., dim)`.
        upper: of the same tokens in the layer above.
        toward: `t`, how near to the upper one.

    Returns:
        `(..., dim)` float32 of length 1 (shorter between opposite vectors), and `O / pi` `(...)` in [0, 1].

    >>> direction, apart = shared_direction(torch.tensor([2.0, 0.0]), torch.tensor([0.0, 3.0]), toward=0.5)
    >>> direction.mul(100).round().tolist(), apart.item()
    ([71.0, 71.0], 0.5)
    """
    lower, upper = unit(lower), unit(upper)
    angle = (lower * upper).sum(dim=-1, keepdim=True).clamp(-1.0, 1.0).acos()
    sine = angle.sin()
    near = sine < SMALLEST_SINE
    safe = sine.masked_fill(near, 1.0)
    one = torch.where(near, 1.0 - toward, ((1.0 - toward) * angle).sin() / safe)
    other = torch.where(near, toward, (toward * angle).sin() / safe)
    return one * lower + other * upper, angle[..., 0] / math.pi


def unit(vectors: Tensor) -> Tensor:
    """Return vectors of length 1 in float32; zeros stay zeros."""
    vectors = vectors.float()
    largest = vectors.abs().amax(dim=-1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
    return torch.nn.functional.normalize(vectors / largest, dim=-1, eps=torch.finfo(torch.float32).tiny)


def length(vectors: Tensor) -> Tensor:
    """Return the length of each vector, `(...)` float32."""
    lengths: Tensor = torch.linalg.vector_norm(vectors.float(), dim=-1)
    return lengths
