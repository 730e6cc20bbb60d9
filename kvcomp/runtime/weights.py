"""A sample of a model's weights, by which a saved cache knows the model that made it from a sibling with the same
configuration.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from torch import Tensor

ROUNDING = 2.0**-6  # relative; of a weight in two dtypes of eight bits or more
SMALLEST = 1e-5  # weights below it may be 0 in another dtype

Sample = list[float | None]


def sample_weights(module: Any) -> Sample:
    """Return the middle number of every parameter, in the order of their names: a few hundred of a large model.

    None where it cannot be read without moving weights: those that lie on a disk, or are packed in few bits.

    >>> from torch import nn
    >>> layer = nn.LayerNorm(3)  # its bias, then its weight
    >>> sample_weights(layer), sample_weights(layer.to("meta"))
    ([0.0, 1.0], [None, None])
    """
    return [_middle(parameter) for _, parameter in sorted(module.named_parameters())]


def _middle(parameter: Tensor) -> float | None:
    plain = type(parameter.data) is Tensor and parameter.is_floating_point() and parameter.numel() > 0
    if parameter.is_meta or not plain:
        return None
    number = float(parameter.detach()[tuple(size // 2 for size in parameter.shape)])
    return number if math.isfinite(number) else None


def differing(one: Sequence[float | None], other: Sequence[float | None], *, rounded: bool) -> int:
    """Return how many of two samples differ; 0 where nothing can be compared.

    Args:
        one: a sample.
        other: another; the parameters of a model that was wrapped or split may be others, and count as differing.
        rounded: whether the models are held in different dtypes.

    >>> differing([0.1, 2.0, None], [0.1, 2.5, 3.0], rounded=False), differing([0.1], [0.1001], rounded=True)
    (1, 0)
    """
    if not one or not other:
        return 0
    known = [(a, b) for a, b in zip(one, other, strict=False) if a is not None and b is not None]
    relative, absolute = (ROUNDING, SMALLEST) if rounded else (0.0, 0.0)
    changed = sum(not math.isclose(a, b, rel_tol=relative, abs_tol=absolute) for a, b in known)
    return changed + abs(len(one) - len(other))
