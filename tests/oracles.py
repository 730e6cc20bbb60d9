"""Independent references, written from the papers and the strategy cards, for one row and one head at a time.

Plain loops over Python numbers and float64 tensors; nothing of kvcomp is imported. A row has no padding: its tokens
are 0..tokens-1. `attention` is a list with one `(queries, tokens)` float64 matrix per query head.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction

import torch
from torch import Tensor

TEXT = 0
TIE = 1e-6


def num_slots(budget: str, tokens: int) -> int:
    """max(1, floor(ratio * tokens)) for the decimal as written."""
    return max(1, math.floor(Fraction(budget) * tokens))


def softmax_attention(
    queries: Tensor,
    keys: Tensor,
    visible: Tensor | None = None,
    *,
    scaling: float | None = None,
    softcap: float | None = None,
    sink: float | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """Full softmax rows of one head, `(queries, tokens)`; causal with the queries at the end unless told."""
    queries, keys = queries.double(), keys.double()
    rows, tokens = queries.shape[0], keys.shape[0]
    scaling = keys.shape[1] ** -0.5 if scaling is None else scaling
    probs = torch.zeros(rows, tokens, dtype=torch.float64)
    for row in range(rows):
        seen, logits = [], []
        for column in range(tokens):
            hidden = column > tokens - rows + row if visible is None else not bool(visible[row, column])
            if hidden:
                continue
            logit = float(queries[row] @ keys[column]) * scaling
            if softcap is not None:
                logit = softcap * math.tanh(logit / softcap)
            seen.append(column)
            logits.append(logit + (float(bias[row, column]) if bias is not None else 0.0))
        top = max([*logits, *([sink] if sink is not None else [])], default=0.0)
        total = sum(math.exp(logit - top) for logit in logits)
        total += math.exp(sink - top) if sink is not None else 0.0
        for column, logit in zip(seen, logits, strict=True):
            probs[row, column] = math.exp(logit - top) / total
    return probs


def column_sums(attention: Tensor) -> list[float]:
    """What each token receives from all rows (H2O), not normalised."""
    rows, tokens = attention.shape
    return [sum(float(attention[row, column]) for row in range(rows)) for column in range(tokens)]


def mean_over_group(per_head: list[list[float]]) -> list[float]:
    return [sum(column) / len(per_head) for column in zip(*per_head, strict=True)]


def best(scores: dict[int, float], count: int) -> list[int]:
    """The places of the `count` best scores, ascending; the earlier of equal ones."""
    return sorted(sorted(scores, key=lambda place: (-scores[place], place))[:count])


def h2o_scores(attention: list[Tensor]) -> list[float]:
    return mean_over_group([column_sums(head) for head in attention])


def h2o_kept(attention: list[Tensor], slots: int) -> list[int]:
    """slots // 2 recent tokens, the rest heavy hitters among those before."""
    tokens, recent = attention[0].shape[1], slots // 2
    scores = h2o_scores(attention)
    heavy = best({place: scores[place] for place in range(tokens - recent)}, slots - recent)
    return heavy + list(range(tokens - recent, tokens))


def last_rows_sum(attention: Tensor, rows: int) -> list[float]:
    queries, tokens = attention.shape
    return [sum(float(attention[row, column]) for row in range(queries - rows, queries)) for column in range(tokens)]


def snapkv_scores(attention: list[Tensor], slots: int, window: int = 32, kernel: int = 5) -> list[float]:
    """Scores of the tokens before the window: votes of the window, group mean, average pool without the padding."""
    tokens, kept = attention[0].shape[1], min(window, slots // 2)
    rows = min(max(1, kept), attention[0].shape[0])
    votes = mean_over_group([last_rows_sum(head, rows) for head in attention])[: tokens - kept]
    pooled = []
    for place in range(len(votes)):
        near = votes[max(0, place - kernel // 2) : place + kernel // 2 + 1]
        pooled.append(sum(near) / len(near))
    return pooled


def snapkv_kept(attention: list[Tensor], slots: int, window: int = 32, kernel: int = 5) -> list[int]:
    tokens, kept = attention[0].shape[1], min(window, slots // 2)
    scores = snapkv_scores(attention, slots, window, kernel)
    return best(dict(enumerate(scores)), slots - kept) + list(range(tokens - kept, tokens))


def streaming_kept(tokens: int, slots: int, sinks: int = 4) -> list[int]:
    if slots >= tokens:
        return list(range(tokens))
    if slots <= sinks:
        return list(range(tokens - slots, tokens))
    return list(range(sinks)) + list(range(tokens - (slots - sinks), tokens))


def kind(modality: int) -> int:
    """Text, visual (images and videos alike), or audio."""
    return 1 if modality == 2 else modality


def flow_ratio(attention: list[Tensor], query_modality: list[int], key_modality: list[int]) -> float:
    """Eq. 6-7: the mean over heads of (attention to another modality) / (all attention)."""
    if len(set(map(kind, key_modality))) < 2:
        return math.nan
    ratios = []
    for head in attention:
        crossing = total = 0.0
        for row, own in enumerate(query_modality):
            for column, other in enumerate(key_modality):
                total += float(head[row, column])
                crossing += float(head[row, column]) if kind(own) != kind(other) else 0.0
        ratios.append(crossing / total)
    return sum(ratios) / len(ratios)


def proxy_counts(slots: int, proxies: int = 32) -> tuple[int, int]:
    """Rows d and e of the card: how many rows vote, and how many tokens of the window are kept."""
    return max(1, min(proxies, slots // 2)), min(proxies, slots // 2)


def flowmm_importance(attention: list[Tensor], slots: int, proxies: int = 32) -> list[float]:
    """Eq. 8: importance of the tokens before the kept window."""
    voting, kept = proxy_counts(slots, proxies)
    rows = min(voting, attention[0].shape[0])
    votes = mean_over_group([last_rows_sum(head, rows) for head in attention])
    return votes[: attention[0].shape[1] - kept]


def flowmm_kept(attention: list[Tensor], slots: int, proxies: int = 32) -> list[int]:
    tokens, (_, kept) = attention[0].shape[1], proxy_counts(slots, proxies)
    importance = flowmm_importance(attention, slots, proxies)
    return best(dict(enumerate(importance)), slots - kept) + list(range(tokens - kept, tokens))


def quantile(values: list[float], share: float) -> float:
    return float(torch.quantile(torch.tensor(values, dtype=torch.float32), share, interpolation="linear"))


def eligible_pivots(importance: list[float], pivots: list[int], share: float | None) -> list[int]:
    """Row b: the scored pivots (proxies are none) with importance at most tau; all of them without a gate."""
    scored = [pivot for pivot in pivots if pivot < len(importance)]
    if share is None or not scored:
        return scored
    tau = quantile([importance[pivot] for pivot in scored], share)
    return [pivot for pivot in scored if torch.tensor(importance[pivot], dtype=torch.float32) <= tau]


def cosine(one: Tensor, other: Tensor) -> float:
    """Cosine of two vectors, 0 where one is zero."""
    one, other = one.double(), other.double()
    length = float(one.norm()) * float(other.norm())
    return float(one @ other) / length if length > 0 else 0.0


def nearest(source: int, candidates: list[int], keys: Tensor) -> int | None:
    """Eq. 9-10: the candidate with the largest cosine, the earliest of those within 1e-6 of it."""
    if not candidates:
        return None
    similar = {pivot: cosine(keys[source], keys[pivot]) for pivot in candidates}
    top = max(similar.values())
    return min(pivot for pivot, value in similar.items() if value >= top - TIE)


def margin(source: int, candidates: list[int], keys: Tensor) -> float:
    """How far the best cosine is above the next: a test that compares float32 with float64 needs room."""
    similar = sorted((cosine(keys[source], keys[pivot]) for pivot in candidates), reverse=True)
    return similar[0] - similar[1] if len(similar) > 1 else 1.0


def allowed(source: int, pivots: list[int], modality: list[int], rule: str) -> list[int]:
    if rule == "cross":
        return pivots
    same = rule == "intra"
    return [pivot for pivot in pivots if (kind(modality[pivot]) == kind(modality[source])) == same]


def flow_rule(rho: float, threshold: float, *, misaligned: bool = False) -> str:
    """Sec. 3.3.1: across modalities above the threshold; Sec. 3.2.2, misaligned: the other way round."""
    if math.isnan(rho):
        return "intra"
    if misaligned:
        return "intra" if rho > threshold else "hetero"
    return "cross" if rho > threshold else "intra"


def pivot_mean(pivot: Tensor, sources: list[Tensor]) -> Tensor:
    """Row a: k (1 + n/2) / (n + 1) + sum of sources / (2 (n + 1))."""
    n = len(sources)
    merged = pivot.double() * (1 + n / 2) / (n + 1)
    for source in sources:
        merged = merged + source.double() / (2 * (n + 1))
    return merged


def plain_mean(pivot: Tensor, sources: list[Tensor]) -> Tensor:
    return torch.stack([vector.double() for vector in (pivot, *sources)]).mean(dim=0)


@dataclass
class Merged:
    """What FlowMM makes of one KV head: `edges` maps each token that is merged to its pivot."""

    rho: float
    rule: str
    kept: list[int]
    edges: dict[int, int]
    keys: Tensor
    values: Tensor
    counts: list[float]


def flowmm(
    attention: list[Tensor],
    keys: Tensor,
    values: Tensor,
    modality: list[int],
    slots: int,
    *,
    rho: float,
    threshold: float | None = 0.25,
    share: float | None = 0.8,
    misaligned: bool = False,
) -> Merged:
    """The whole of FlowMM for one KV head; `attention` is of its query group, `rho` of all heads (`flow_ratio`).

    `threshold` None is FlowMM without flow guidance, `share` None without the gate.
    """
    rule = "cross" if threshold is None else flow_rule(rho, threshold, misaligned=misaligned)
    importance, kept = flowmm_importance(attention, slots), flowmm_kept(attention, slots)
    receiving = eligible_pivots(importance, kept, share)
    edges: dict[int, int] = {}
    for source in sorted(set(range(keys.shape[0])) - set(kept)):
        target = nearest(source, allowed(source, receiving, modality, rule), keys)
        if target is not None:
            edges[source] = target
    groups = {pivot: [source for source, target in edges.items() if target == pivot] for pivot in kept}
    return Merged(
        rho=rho,
        rule=rule,
        kept=kept,
        edges=edges,
        keys=torch.stack([pivot_mean(keys[pivot], [keys[i] for i in groups[pivot]]) for pivot in kept]),
        values=torch.stack([pivot_mean(values[pivot], [values[i] for i in groups[pivot]]) for pivot in kept]),
        counts=[1.0 + len(groups[pivot]) for pivot in kept],
    )
