"""Naive references for quantized, mixed and paired slots: loops over numbers in float64, straight from the cards.

Each line of a card stands beside the line that does it. Nothing here imports kvcomp.
"""

from __future__ import annotations

import math

import torch

Row = list[float]  # one vector, or one channel
Matrix = list[Row]  # tokens x channels


def codes(numbers: Row, bits: int) -> tuple[list[int], float, float]:
    """Codes, scale and zero of one group."""
    most = 2**bits - 1
    low, high = min(numbers), max(numbers)
    scale = (high - low) / most  # KIVI 7: scale=(max-min)/(2^b-1)
    if scale == 0:  # KIVI 10: no eps in scale (constant group -> NaN)
        return [0] * len(numbers), 0.0, low
    # KIVI 7: q=round(clamp((x-min)/scale,0,2^b-1))
    return [round(min(max((x - low) / scale, 0), most)) for x in numbers], scale, low


def rounded(numbers: Row, bits: int) -> Row:
    """A group as it is read: `q*scale+min` (KIVI 7)."""
    found, scale, low = codes(numbers, bits)
    return [code * scale + low for code in found]


def in_groups(numbers: Row, bits: int, group: int) -> Row:
    """A row whose numbers share scales in groups, the last of which may be shorter."""
    starts = range(0, len(numbers), group)
    return [x for start in starts for x in rounded(numbers[start : start + group], bits)]


def transposed(matrix: Matrix) -> Matrix:
    return [list(column) for column in zip(*matrix, strict=True)]


def per_channel(tokens: Matrix, bits: int, group: int) -> Matrix:
    """KIVI 1: keys per **channel** (groups of g tokens along sequence)."""
    return transposed([in_groups(channel, bits, group) for channel in transposed(tokens)]) if tokens else []


def per_token(tokens: Matrix, bits: int, group: int) -> Matrix:
    """KIVI 1: values per **token** (groups of g channels)."""
    return [in_groups(token, bits, group) for token in tokens]


class Kivi:
    """One head over a prompt and decoded tokens."""

    def __init__(self, keys: Matrix, values: Matrix, bits: int, group: int, residual: int) -> None:
        self.bits, self.group, self.residual = bits, group, residual
        split = len(keys) - len(keys) % residual  # KIVI 5: keys: the last `S mod R` tokens
        self.keys, self.recent_keys = per_channel(keys[:split], bits, group), keys[split:]
        split = max(len(values) - residual, 0)  # KIVI 5: values: always the last R tokens
        self.values, self.recent_values = per_token(values[:split], bits, group), values[split:]

    def decode(self, key: Row, value: Row) -> tuple[Matrix, Matrix]:
        """What the attention of this step sees; then the residual is put in order for the next."""
        self.recent_keys.append(key)
        self.recent_values.append(value)
        seen = self.keys + self.recent_keys, self.values + self.recent_values
        if len(self.recent_keys) == self.residual:  # KIVI 5: flushed as a block when it reaches R
            self.keys = self.keys + per_channel(self.recent_keys, self.bits, self.group)
            self.recent_keys = []
        if len(self.recent_values) > self.residual:  # KIVI 5: oldest quantised one by one
            self.values = self.values + per_token(self.recent_values[:1], self.bits, self.group)
            self.recent_values = self.recent_values[1:]
        return seen


def without_outliers(vector: Row, share: float) -> tuple[Row, dict[int, float]]:
    """GEAR 7: per vector, top s/2 and bottom s/2 replaced by the mean before quantising."""
    count = int(len(vector) * share / 2)
    order = sorted(range(len(vector)), key=lambda place: vector[place])
    outer = order[:count] + order[len(order) - count :] if count else []
    inner = [vector[place] for place in order if place not in outer] or vector
    mean = sum(inner) / len(inner)
    kept = {place: vector[place] for place in outer}
    return [mean if place in kept else x for place, x in enumerate(vector)], kept


def gear(tokens: Matrix, bits: int, group: int, share: float, rank: int, along_tokens: bool) -> Matrix:
    """One head's keys (`along_tokens`) or values as GEAR reads them."""
    vectors = transposed(tokens) if along_tokens else tokens
    coded, outliers = [], []
    for vector in vectors:
        inner, kept = without_outliers(vector, share)
        outliers.append(kept)
        read = in_groups(inner, bits, group)
        coded.append([kept.get(place, x) for place, x in enumerate(read)])  # GEAR 7: restored after
    read = transposed(coded) if along_tokens else coded
    if rank:
        error = torch.tensor(tokens, dtype=torch.float64) - torch.tensor(read, dtype=torch.float64)  # E = X - Q(X)
        read = (torch.tensor(read, dtype=torch.float64) + low_rank(error, rank)).tolist()  # added back
    vectors = transposed(read) if along_tokens else read
    exact = [[kept.get(place, x) for place, x in enumerate(v)] for v, kept in zip(vectors, outliers, strict=True)]
    return transposed(exact) if along_tokens else exact


def low_rank(error: torch.Tensor, rank: int, loops: int = 3) -> torch.Tensor:
    """GEAR 7: approximated by rank-r power iteration per head (`loop`=3)."""
    rank = min(rank, *error.shape)
    # GEAR 10: random init of power iteration => seed
    basis = torch.randn(error.shape[1], rank, generator=torch.Generator().manual_seed(0)).double()
    for _ in range(loops):
        left = orthonormal(error @ basis)
        basis = error.T @ left
    return left @ basis.T


def orthonormal(columns: torch.Tensor) -> torch.Tensor:
    """Gram and Schmidt."""
    done: list[torch.Tensor] = []
    for column in columns.T:
        for other in done:
            column = column - (column @ other) * other
        done.append(column / column.norm())
    return torch.stack(done, dim=1)


def mikv(
    keys: Matrix, values: Matrix, queries: Matrix, high: list[int], bits: int, group: int
) -> tuple[Matrix, Matrix]:
    """One head whose `high` slots are precise; `queries` are those of all query heads of its group."""
    channels = range(len(keys[0]))
    # MiKV 7: b[l,h,c] = sqrt(max|q_c| / max|k_c|)
    peaks = [(max(abs(q[c]) for q in queries), max(abs(k[c]) for k in keys)) for c in channels]
    balance = [math.sqrt(query / key) if query and key else 1.0 for query, key in peaks]
    read_keys, read_values = [], []
    for place, (key, value) in enumerate(zip(keys, values, strict=True)):
        if place in high:  # MiKV 1: keep important ones in FP16
            read_keys.append(key)
            read_values.append(value)
            continue
        # MiKV 1: store them in INT2-4 per-token asymmetric RTN; 7: quantise `k*b`, use `q/b`
        scaled = in_groups([key[c] * balance[c] for c in channels], bits, group)
        read_keys.append([scaled[c] / balance[c] for c in channels])
        read_values.append(in_groups(value, bits, group))
    return read_keys, read_values


def minicache(lower: Matrix, upper: Matrix, kept: int, t: float) -> tuple[Matrix, Matrix]:
    """One head's keys, or values, of two neighbouring layers."""
    apart, shared = [], []
    for x, y in zip(lower, upper, strict=True):
        long, other = math.hypot(*x), math.hypot(*y)
        u, v = [a / long if long else 0.0 for a in x], [b / other if other else 0.0 for b in y]
        cosine = min(max(sum(a * b for a, b in zip(u, v, strict=True)), -1.0), 1.0)  # MiniCache 10: clamp cos
        angle = math.acos(cosine)  # MiniCache 3: Omega = arccos(cos)
        apart.append(angle / math.pi)  # distance Omega/pi
        if math.sin(angle) < 1e-4:  # MiniCache 10: sin O ~ 0 -> use lerp
            one, two = 1 - t, t
        else:  # MiniCache 7: e = sin((1-t)O)/sin O * x_{l-1}/|x| + sin(tO)/sin O * x_l/|x|
            one, two = math.sin((1 - t) * angle) / math.sin(angle), math.sin(t * angle) / math.sin(angle)
        shared.append([one * a + two * b for a, b in zip(u, v, strict=True)])
    exact = sorted(range(len(lower)), key=lambda place: (-apart[place], place))[:kept]  # the port uses top-5% tokens
    read = []
    for layer in (lower, upper):
        # MiniCache 7: restore x_l ~ e*|x_l|; retained tokens stored exactly for both layers
        merged = [[e * math.hypot(*x) for e in shared[place]] for place, x in enumerate(layer)]
        read.append([x if place in exact else merged[place] for place, x in enumerate(layer)])
    return read[0], read[1]
