"""Independent references of the eviction and allocation methods: loops over layers, heads and tokens, float64.

Nothing of kvcomp is imported. A row has no padding; `attention[layer][head]` is the `(queries, tokens)` float64 matrix
of a query head. What is quoted is the line of the method that the code below it does.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction

from oracles import column_sums
from torch import Tensor

TIED = 1e-9


@dataclass
class Bin:
    """One KV head of one layer: what it weighs, and what it must and can hold."""

    layer: int
    head: int
    weight: float
    held: int
    protected: int = 0
    score: float = 0.0  # the sum of its scores, which decides between heads with equal remainders
    whole: bool = False  # keeps everything


def shares(bins: list[Bin], total: int) -> list[int]:
    """Whole numbers in proportion to the weights: "corrected by largest remainder so that the sum is exactly
    layers x slots", "capped by what the head holds and the excess goes to the others", and no head below what is
    protected unless the budget forces it.
    """
    total = min(total, sum(one.held for one in bins))
    least = [one.held if one.whole else min(max(one.protected, 1), one.held) for one in bins]
    most = [one.held for one in bins]
    weights = [Fraction(one.weight) for one in bins]
    if sum(least) > total:
        weights, most = [Fraction(number) for number in least], least
        least = [one.held if one.whole else min(1, one.held) for one in bins]
    largest = max(weights) if max(weights) > 0 else Fraction(1)
    weights = [max(weight / largest, Fraction(1, 10**9)) if max(weights) > 0 else Fraction(1) for weight in weights]
    quotas = _quotas(weights, least, most, total)
    down = [math.floor(quota + Fraction(1, 10**9)) for quota in quotas]
    rest = [round((quota - number) / Fraction(TIED)) for quota, number in zip(quotas, down, strict=True)]
    places = [place for place in range(len(bins)) if down[place] < most[place]]
    places.sort(key=lambda place: (-rest[place], bins[place].layer, -bins[place].score, bins[place].head))
    for place in places[: total - sum(down)]:
        down[place] += 1
    return down


def _quotas(weights: list[Fraction], least: list[int], most: list[int], total: int) -> list[Fraction]:
    """clamp(level * weight, least, most) at the level where the sum is the total: halving, then one equation."""

    def at(level: Fraction) -> list[Fraction]:
        return [min(max(level * w, Fraction(a)), Fraction(b)) for w, a, b in zip(weights, least, most, strict=True)]

    low, high = Fraction(0), Fraction(10) ** 15
    for _ in range(160):
        middle = (low + high) / 2
        low, high = (middle, high) if sum(at(middle)) < total else (low, middle)
    free = [i for i, w in enumerate(weights) if least[i] < high * w and low * w < most[i]]
    if not free:
        return at(high)
    settled = sum(quota for i, quota in enumerate(at(high)) if i not in free)
    return at((total - settled) / sum(weights[i] for i in free))


def softmax(numbers: list[float]) -> list[float]:
    top = max(numbers)
    weights = [math.exp(number - top) for number in numbers]
    return [weight / sum(weights) for weight in weights]


def variance_weights(attention: list[list[Tensor]]) -> list[float]:
    """D2O: "x_l = mean_h( minmax_h( var_j( sum_i a[h,i,j] ) ) ), minmax across heads within the layer (eps 1e-6);
    w = softmax_l(-x_l)".
    """
    spreads = []
    for layer in attention:
        variances = []
        for head in layer:
            received = column_sums(head)
            mean = sum(received) / len(received)
            variances.append(sum((one - mean) ** 2 for one in received) / max(len(received) - 1, 1))
        low, high = min(variances), max(variances)
        scaled = [(one - low) / (high - low + 1e-6) for one in variances]
        spreads.append(sum(scaled) / len(scaled))
    return softmax([-spread for spread in spreads])


def row_entropy(head: Tensor, modality: list[int] | None = None) -> float:
    """Mean over rows of -sum_j a log a; with modalities, of the row restricted to other modalities and normalised."""
    total = 0.0
    rows, tokens = head.shape
    for row in range(rows):
        own = None if modality is None else modality[tokens - rows + row]
        seen = [
            float(head[row, column])
            for column in range(tokens)
            if float(head[row, column]) > 0 and (modality is None or modality[column] != own)
        ]
        mass = sum(seen) if modality is not None else 1.0
        total -= sum(a / mass * math.log(a / mass) for a in seen)
    return total / rows


def entropy_weights(attention: list[list[Tensor]], modality: list[int] | None = None) -> list[float]:
    """MEDA: "E_l = mean_h(-sum_{ij} a log a)/S; softmax_l(E_l)"."""
    return softmax([sum(row_entropy(head, modality) for head in layer) / len(layer) for layer in attention])
