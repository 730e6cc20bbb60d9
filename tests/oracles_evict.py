"""Independent references of the eviction and allocation methods: loops over layers, heads and tokens, float64.

Nothing of kvcomp is imported. A row has no padding; `attention[layer][head]` is the `(queries, tokens)` float64 matrix
of a query head. What is quoted is the line of the method that the code below it does.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction

from oracles import column_sums, kind
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
        own = None if modality is None else kind(modality[tokens - rows + row])
        seen = [
            float(head[row, column])
            for column in range(tokens)
            if float(head[row, column]) > 0 and (modality is None or kind(modality[column]) != own)
        ]
        mass = sum(seen) if modality is not None else 1.0
        total -= sum(a / mass * math.log(a / mass) for a in seen)
    return total / rows


def entropy_weights(attention: list[list[Tensor]], modality: list[int] | None = None) -> list[float]:
    """MEDA: "E_l = mean_h(-sum_{ij} a log a)/S; softmax_l(E_l)"."""
    return softmax([sum(row_entropy(head, modality) for head in layer) / len(layer) for layer in attention])


# --- what the recipes keep: `attention`, `keys` and `modality` are those of one row ---


@dataclass
class Kept:
    """`indices[layer][head]` (of FastV `[layer]`); how far the nearest choice between two tokens is from a tie."""

    indices: list
    margin: float


def keep(scores: list[float], protected: list[int], slots: int) -> tuple[list[int], float]:
    """What is protected (the latest of it where that is more than the slots), then the best scores, the earlier of
    equal ones.
    """
    first = sorted(protected)[-slots:]
    others = [place for place in range(len(scores)) if place not in first]
    others.sort(key=lambda place: (-scores[place], place))
    count = slots - len(first)
    return sorted(first + others[:count]), _gap([scores[place] for place in others], count)


def _gap(ordered: list[float], count: int) -> float:
    """How far the last that is kept is above the first that is not; infinite where they are equal, for then their
    places decide.
    """
    if not 0 < count < len(ordered) or ordered[count - 1] == ordered[count]:
        return math.inf
    return ordered[count - 1] - ordered[count]


def last_row(heads: list[Tensor]) -> list[float]:
    """TOVA: "s_j = mean_h a[h,-1,j]"."""
    return [sum(float(head[-1, column]) for head in heads) / len(heads) for column in range(heads[0].shape[1])]


def window_votes(heads: list[Tensor], slots: int, window: int, kernel: int, pooling: str) -> tuple[list[float], int]:
    """SnapKV: "s = sum_{i in window} a[h,i,j]", group mean, pooled over neighbours before the window of min(window,
    slots // 2) tokens; and the size of that window.
    """
    tokens, kept = heads[0].shape[1], min(window, slots // 2)
    rows = min(max(kept, 1), heads[0].shape[0])
    votes = []
    for column in range(tokens - kept):
        received = [sum(float(head[row, column]) for row in range(-rows, 0)) for head in heads]
        votes.append(sum(received) / len(received))
    pooled = []
    for place in range(len(votes)):
        near = votes[max(0, place - kernel // 2) : place + kernel // 2 + 1]
        pooled.append(max(near) if pooling == "max" else sum(near) / len(near))
    return pooled + [0.0] * kept, kept


def pyramid_quotas(slots: int, window: int, tokens: int, layers: int, beta: int = 20) -> list[float]:
    """PyramidKV, without its whole-numbered step."""
    c = slots - window  # "c = C - w"
    low = c // beta  # "min = c // beta"
    high = 2 * c - low  # "max = 2c - min"
    if high >= tokens - window:  # "if max >= S - w: max = S - w, min = 2c - max"
        high = tokens - window
        low = 2 * c - high
    step = (high - low) / (layers - 1)  # "step = (max - min) // (L - 1)"
    return [high - layer * step + window for layer in range(layers)]  # "c_l = max - l * step, plus w"


def ada_quotas(
    scores: list[list[float]], protected: list[list[int]], slots: int, floor: float = 0.2, *, normalize: bool = False
) -> tuple[list[float], float]:
    """Ada-KV: "flatten heads, joint top-(H * base); count per head; cap_h = count * (1 - a) + a * base, base = C - w".

    `scores[head]`, `protected[head]` of one layer. Also how clear the joint choice is.
    """
    base = [slots - len(window) for window in protected]
    if normalize:  # "head score x its own top-base mass ratio"
        scores = [_normalized(*of_head) for of_head in zip(scores, protected, base, strict=True)]
    pool = [
        (score, place, head)
        for head, values in enumerate(scores)
        for place, score in enumerate(values)
        if place not in protected[head]
    ]
    pool.sort(key=lambda one: (-one[0], one[1], one[2]))
    chosen = pool[: sum(base)]
    counts = [sum(1 for _, _, head in chosen if head == number) for number in range(len(scores))]
    quotas = [
        len(window) + (1 - floor) * count + floor * share
        for window, count, share in zip(protected, counts, base, strict=True)
    ]
    return quotas, _gap([score for score, _, _ in pool], sum(base))


def _normalized(values: list[float], protected: list[int], base: int) -> list[float]:
    free = sorted((value for place, value in enumerate(values) if place not in protected), reverse=True)
    return [value * sum(free[: max(base, 1)]) / sum(free) if sum(free) > 0 else 0.0 for value in values]


def global_counts(
    scores: list[list[list[float]]], protected: list[list[list[int]]], slots: int, floor: float = 0.1
) -> tuple[list[list[int]], float]:
    """One budget over all layers and heads: each head's own best up to the floor, then the best of all others.

    `[layer][head]`, and how clear the choice is.
    """
    pool, counts, clear = [], [[0] * len(layer) for layer in scores], math.inf
    left = slots * sum(len(layer) for layer in scores)
    for layer, of_layer in enumerate(scores):
        for head, values in enumerate(of_layer):
            window = protected[layer][head]
            least = min(max(1, len(window), math.floor(slots * floor + 1e-9)), len(values))
            own, gap = keep(values, window, least)
            counts[layer][head], left, clear = least, left - least, min(clear, gap)
            pool += [(value, place, layer, head) for place, value in enumerate(values) if place not in own]
    pool.sort(key=lambda one: (-one[0], one[1], one[2], one[3]))
    for _, _, layer, head in pool[: max(left, 0)]:
        counts[layer][head] += 1
    return counts, min(clear, _gap([one[0] for one in pool], left))


def rows_after_images(modality: list[int], window: int = 32) -> list[int]:
    """VL-Cache: "rows after the last visual token (text tail)"; the last `window` where there is no such row."""
    tail = []
    for row in reversed(range(len(modality))):
        if modality[row] != 0:
            break
        tail.append(row)
    if not tail or len(tail) == len(modality):
        tail = list(range(max(0, len(modality) - window), len(modality)))
    return sorted(tail)


def post_vision_scores(heads: list[Tensor], modality: list[int]) -> list[float]:
    """VL-Cache: "s_j = sum_{i in post-vision} a[h,i,j]", mean over the group."""
    rows = rows_after_images(modality)
    sums = [[sum(float(head[row, column]) for row in rows) for column in range(len(modality))] for head in heads]
    return [sum(column) / len(column) for column in zip(*sums, strict=True)]


def density(heads: list[Tensor], modality: list[int]) -> float:
    """VL-Cache: "entry kept if a >= 0.01 * rowmax; sparsity gamma_l = 1 - kept / causal entries, mean over heads"; the
    budget goes by 1 - gamma_l.
    """
    densities = []
    for head in heads:
        kept = entries = 0
        for row in rows_after_images(modality):
            largest = max(float(head[row, column]) for column in range(row + 1))
            kept += sum(float(head[row, column]) >= 0.01 * largest for column in range(row + 1))
            entries += row + 1
        densities.append(kept / entries)
    return sum(densities) / len(densities)


def prefix_sizes(scores: list[list[float]], protected: int, slots: int) -> list[int]:
    """PrefixKV: "sort each layer's normalised scores, cumsum; ... p such that total dropped = ratio * total", where the
    protected tokens come on top: the level p rises from token to token until the budget is spent.
    """
    left = slots * len(scores) - protected * len(scores)
    levels = []
    for values in scores:
        ranked, total = sorted(values, reverse=True), sum(values)
        levels.append([sum(ranked[:rank]) / total if total > 0 else 0.0 for rank in range(len(ranked))])
    sizes = [0] * len(scores)
    while left > 0:
        open_layers = [layer for layer in range(len(scores)) if sizes[layer] < len(scores[layer]) - protected]
        if not open_layers:
            break
        lowest = min(open_layers, key=lambda layer: (round(levels[layer][sizes[layer]], 12), sizes[layer], layer))
        sizes[lowest] += 1
        left -= 1
    return [size + protected for size in sizes]


def fastv_smallest(modality: list[int], layers: int, first: int) -> float:
    """FastV: "layers < K keep all KV, so KV budget = (K + (L - K) * keep) / L", with no image kept: rounded up to six
    decimals, so that floor(ratio * tokens) slots hold it.
    """
    tokens, text = len(modality), sum(one not in (1, 2) for one in modality)
    slots = math.ceil(Fraction(first * tokens + (layers - first) * max(text, 1), layers))
    return math.ceil(Fraction(slots, tokens) * 10**6) / 10**6


def fastv_kept(attention: list[list[Tensor]], modality: list[int], slots: int, first: int) -> Kept | None:
    """FastV: "attention output of layer K-1, mean over heads, last token's row only; s_j, j in image span; all text".

    `indices[layer]` are those of every head; None where the budget does not hold the full layers and the text.
    """
    layers, tokens = len(attention), len(modality)
    others = [place for place, one in enumerate(modality) if one not in (1, 2)]
    left = layers * slots - first * tokens
    if left < (layers - first) * max(len(others), 1):
        return None
    scores, kept, clear = last_row(attention[first - 1]), [], math.inf
    for layer in range(layers):
        if layer < first:
            kept.append(list(range(tokens)))
            continue
        size = left // (layers - first) + (layer - first < left % (layers - first))
        chosen, gap = keep(scores, others, min(size, tokens))
        kept.append(chosen)
        clear = min(clear, gap)
    return Kept(kept, clear)


def key_norms(keys: Tensor) -> list[float]:
    """ "Keys with the smallest norms draw the most attention": minus the L2 norm."""
    return [-math.sqrt(sum(float(x) ** 2 for x in key)) for key in keys.double()]


def key_differences(keys: Tensor) -> list[float]:
    """KeyDiff: minus the cosine with the mean of the normalised keys; 0 for a zero key."""
    directions = []
    for key in keys.double():
        length = math.sqrt(sum(float(x) ** 2 for x in key))
        directions.append([float(x) / length if length > 0 else 0.0 for x in key])
    mean = [sum(column) for column in zip(*directions, strict=True)]
    length = math.sqrt(sum(x**2 for x in mean))
    return [
        -sum(x * y for x, y in zip(direction, mean, strict=True)) / length if length > 0 else 0.0
        for direction in directions
    ]
