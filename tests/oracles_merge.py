"""Independent references of the merging methods: loops over heads and tokens, float64, for one row.

Nothing of kvcomp is imported. A row has no padding: its tokens are 0..tokens-1. A head is one KV head with the
attention of its query group. What is quoted is the line of the method that the code below it does.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from fractions import Fraction

import torch
from oracles import TEXT, TIE, best, cosine, h2o_scores, kind, nearest
from torch import Tensor

Edges = dict[int, dict[int, float]]  # source -> pivot -> weight
Weights = Callable[["Head", int, dict[int, float]], dict[int, float]]


@dataclass
class Head:
    """One KV head: `attention` has one `(queries, tokens)` matrix per query head of its group."""

    attention: list[Tensor]
    keys: Tensor
    values: Tensor

    @property
    def tokens(self) -> int:
        return self.keys.shape[0]

    def received(self) -> list[float]:
        """`s[h,j] = sum_i a[h,i,j]`, group mean."""
        return h2o_scores(self.attention)


@dataclass
class Merged:
    """What a method makes of a head; `similarity` is what its choices went by, for a test that avoids near ties."""

    kept: list[int]
    edges: Edges
    keys: Tensor
    values: Tensor
    counts: list[float]
    similarity: list[float] = field(default_factory=list)


def dropped(head: Head, kept: list[int]) -> list[int]:
    return [token for token in range(head.tokens) if token not in kept]


def sources_of(edges: Edges, pivot: int) -> dict[int, float]:
    return {source: targets[pivot] for source, targets in edges.items() if pivot in targets}


def weighted_sum(vectors: Tensor, weights: dict[int, float]) -> Tensor:
    total = torch.zeros(vectors.shape[1], dtype=torch.float64)
    for token, weight in weights.items():
        total = total + weight * vectors[token].double()
    return total


def assemble(head: Head, kept: list[int], edges: Edges, key_weights: Weights, value_weights: Weights) -> Merged:
    """Merge K and V from the *original* tensors simultaneously; a slot counts its pivot and what goes to it."""
    keys, values, counts = [], [], []
    for pivot in kept:
        sources = sources_of(edges, pivot)
        keys.append(weighted_sum(head.keys, key_weights(head, pivot, sources)))
        values.append(weighted_sum(head.values, value_weights(head, pivot, sources)))
        counts.append(1.0 + sum(sources.values()))
    return Merged(kept, edges, torch.stack(keys), torch.stack(values), counts)


# --- merges: what each member of a slot weighs ---


def pivot_weights(head: Head, pivot: int, sources: dict[int, float]) -> dict[int, float]:
    """`k_j <- [k_j + sum_i (k_i + k_j)/2] / (n_j+1)`."""
    n = len(sources)
    return {pivot: (1 + n / 2) / (n + 1)} | dict.fromkeys(sources, 0.5 / (n + 1))


def mean_weights(head: Head, pivot: int, sources: dict[int, float]) -> dict[int, float]:
    """`k_j <- (k_j + sum_i k_i)/(n_j+1)`."""
    return {token: 1 / (len(sources) + 1) for token in (pivot, *sources)}


def cosine_weights(head: Head, pivot: int, sources: dict[int, float]) -> dict[int, float]:
    """`k_j <- (k_j + sum_i u_ij k_i)/(n_j+1)`; raw cosines, not normalised."""
    n = len(sources)
    return {pivot: 1 / (n + 1)} | {i: cosine(head.keys[i], head.keys[pivot]) / (n + 1) for i in sources}


def exp_weights(head: Head, pivot: int, sources: dict[int, float]) -> dict[int, float]:
    """`w_i = exp(u_ij) / (sum exp(u_ij) + e)`, `w_j = e / (sum exp(u_ij) + e)`."""
    similar = {source: math.exp(cosine(head.keys[source], head.keys[pivot])) for source in sources}
    total = sum(similar.values()) + math.e
    return {pivot: math.e / total} | {source: value / total for source, value in similar.items()}


def gaussian_weights(head: Head, pivot: int, sources: dict[int, float], sigma: str = "distance") -> dict[int, float]:
    """`g_i = exp(-||k_p - k_i||^2 / (2 sigma^2))`, `w_i = g_i / sum g`, (`g_p = 1`)."""
    members = [pivot, *sources]
    distance = {i: float((head.keys[pivot].double() - head.keys[i].double()).square().sum()) for i in members}
    # "`2*sigma^2 = mean_i ||k_p-k_i||^2` (clamped >= 1e-12)"
    twice = max(sum(distance.values()) / len(members), 1e-12)
    kernel = {i: math.exp(-distance[i] / twice) for i in members}
    if sigma == "paper":
        # "`sigma = sum_i g_i / (sqrt(2) * |set|)`, which is circular (g depends on sigma)": "g from a preliminary
        # bandwidth = mean squared distance, then recompute"
        literal = sum(kernel.values()) / (math.sqrt(2) * len(members))
        kernel = {i: math.exp(-distance[i] / (2 * literal**2)) for i in members}
    return {i: value / sum(kernel.values()) for i, value in kernel.items()}


def size_gaussian_weights(head: Head, pivot: int, sources: dict[int, float]) -> dict[int, float]:
    """the paper's value weights carry an extra factor |set|."""
    return {i: w * (len(sources) + 1) for i, w in gaussian_weights(head, pivot, sources).items()}


def paper_gaussian_weights(head: Head, pivot: int, sources: dict[int, float]) -> dict[int, float]:
    return gaussian_weights(head, pivot, sources, "paper")


def added_weights(head: Head, pivot: int, sources: dict[int, float]) -> dict[int, float]:
    """`v_t <- v_t + mask * v_i / m`."""
    return {pivot: 1.0} | sources


def own_weights(head: Head, pivot: int, sources: dict[int, float]) -> dict[int, float]:
    """Keys are not merged."""
    return {pivot: 1.0}


def attention_weights(head: Head, pivot: int, sources: dict[int, float]) -> dict[int, float]:
    """Each member weighs the attention that it received."""
    received = head.received()
    total = sum(received[token] for token in (pivot, *sources))
    return {token: received[token] / total for token in (pivot, *sources)}


# --- LOOK-M ---


def look_m_kept(head: Head, modality: list[int], slots: int) -> list[int]:
    """The strict budget: never more than `slots`."""
    scores = head.received()
    # "(2) recent = last r": "hh:recent 1:1"
    recent = list(range(head.tokens - slots // 2, head.tokens))
    # "(3) order the rest by (is_text, score) and take hh"
    rest = [token for token in range(head.tokens) if token not in recent]
    rest.sort(key=lambda token: (modality[token] != TEXT, -scores[token], token))
    # "(4) kept = union, sorted"
    return sorted(recent + rest[: slots - len(recent)])


def look_m_official_kept(head: Head, modality: list[int], slots: int) -> list[int]:
    """kept = max(n_text_nonrecent, hh) + recent: all text stays, whatever the budget."""
    text = [token for token in range(head.tokens) if modality[token] == TEXT]
    return sorted({*look_m_kept(head, modality, slots), *text})


def nearest_edges(
    head: Head, kept: list[int], modality: list[int], rule: str = "cross"
) -> tuple[Edges, dict[int, float]]:
    """`j*(i) = argmax_j u_ij` over *all* kept tokens (text, image, sinks, recent), per head; `m_i = max_j u_ij`."""
    edges, similarity = {}, {}
    for token in dropped(head, kept):
        allowed = [
            p for p in kept if rule == "cross" or (kind(modality[p]) == kind(modality[token])) == (rule == "intra")
        ]
        target = nearest(token, allowed, head.keys)
        if target is not None:
            edges[token] = {target: 1.0}
            similarity[token] = max(cosine(head.keys[token], head.keys[pivot]) for pivot in allowed)
    return edges, similarity


def passing(edges: list[Edges], similarity: list[dict[int, float]], tau: float, by_rank: bool = False) -> list[Edges]:
    """Token p passes if `m >= tau`, per head; `by_rank`: `mean_h m[h,p] >= tau`, the official code."""
    chosen: list[Edges] = []
    for one, similar in zip(edges, similarity, strict=True):
        chosen.append({})
        for rank, token in enumerate(similar):
            m = similar[token]
            if by_rank:
                at_rank = [list(other.values())[rank] for other in similarity if len(other) > rank]
                m = sum(at_rank) / len(at_rank)
            if m >= tau - TIE:
                chosen[-1][token] = one[token]
    return chosen


def mean_similarity(similarity: list[dict[int, float]]) -> float:
    """`tau_0 = mean(m)` over heads and evicted."""
    every = [m for similar in similarity for m in similar.values()]
    return sum(every) / len(every) if every else 0.0


def look_m(heads: list[Head], modality: list[int], slots: list[int], merge: str = "pivot") -> list[Merged]:
    kept = [look_m_kept(head, modality, count) for head, count in zip(heads, slots, strict=True)]
    found = [nearest_edges(head, keep, modality) for head, keep in zip(heads, kept, strict=True)]
    edges, similarity = [one for one, _ in found], [similar for _, similar in found]
    # "No similarity floor for pivot; average/weighted filter dropped ranks by `mean_h m[h,p] >= mean_{h,p} m`",
    # and "do the filter per head (recommended)"
    if merge == "evict":
        edges = [{} for _ in heads]
    elif merge != "pivot":
        edges = passing(edges, similarity, mean_similarity(similarity))
    weights = {"pivot": pivot_weights, "mean": mean_weights, "weighted": cosine_weights, "evict": own_weights}[merge]
    merged = [assemble(*args, weights, weights) for args in zip(heads, kept, edges, strict=True)]
    return [_with_similarity(one, similar, similarity) for one, similar in zip(merged, similarity, strict=True)]


def _with_similarity(one: Merged, own: dict[int, float], every: list[dict[int, float]]) -> Merged:
    one.similarity = [*own.values(), mean_similarity(every)]
    return one


# --- D2O ---


def d2o_kept(head: Head, slots: int, sinks: int = 4) -> list[int]:
    """Force first 4, top-hh + recent, hh:recent 1:1."""
    recent = list(range(head.tokens - slots // 2, head.tokens))
    scores = {token: score for token, score in enumerate(head.received()) if token not in recent}
    # "first 4 positions set to +inf"
    scores = {token: math.inf if token < sinks else score for token, score in scores.items()}
    return sorted(best(scores, slots - len(recent)) + recent)


def d2o(
    heads: list[Head],
    modality: list[int],
    slots: list[int],
    *,
    weighting: str = "exp",
    tau: float | None = None,
    beta: float = 0.7,
    by_rank: bool = False,
    rule: str = "cross",
) -> tuple[list[Merged], float]:
    """What D2O makes of the heads of one row at one compression, and tau after it; `tau` is that before, if any."""
    kept = [d2o_kept(head, count) for head, count in zip(heads, slots, strict=True)]
    # "`m_i = max_j u_ij`, `j*(i) = argmax`, over all kept tokens (sinks and recent included), post-RoPE keys, per head"
    found = [nearest_edges(head, keep, modality, rule) for head, keep in zip(heads, kept, strict=True)]
    edges, similarity = [one for one, _ in found], [similar for _, similar in found]
    latest = mean_similarity(similarity)
    # "EMA `tau_t = beta*mean(m_t) + (1-beta)*tau_{t-1}`, beta = 0.7"
    tau = latest if tau is None else beta * latest + (1 - beta) * tau if any(similarity) else tau
    chosen = passing(edges, similarity, tau, by_rank)
    weights = {"exp": exp_weights, "cosine_mean": cosine_weights}[weighting]
    merged = [assemble(*args, weights, weights) for args in zip(heads, kept, chosen, strict=True)]
    for one, similar in zip(merged, similarity, strict=True):
        one.similarity = [*similar.values(), tau]
    return merged, tau


# --- KVMerger ---


def adjacent_similarity(head: Head) -> list[float]:
    """`u_{i,i+1} = cos(k_i, k_{i+1})`, in millionths."""
    return [round(cosine(head.keys[i], head.keys[i + 1]) * 1e6) for i in range(head.tokens - 1)]


def runs_of(tokens: list[int]) -> list[list[int]]:
    """Maximal runs of consecutive numbers."""
    runs: list[list[int]] = []
    for token in tokens:
        if runs and runs[-1][-1] == token - 1:
            runs[-1].append(token)
        else:
            runs.append([token])
    return runs


def kvmerge_sets(head: Head, slots: int, recent_share: str = "0.35", protected_share: str = "0.25") -> list[list[int]]:
    """The merging sets in budget mode, singletons included, by place."""
    # "(1) dense prefill, per KV head column sums s (group mean)"
    scores = head.received()
    # "(2) recent = last `n_r`, protected = top `n_p` of s outside recent"; "n_r = floor(0.35*B), n_p = floor(0.25*B)"
    recent = list(range(head.tokens - math.floor(Fraction(recent_share) * slots), head.tokens))
    before = [token for token in range(head.tokens) if token not in recent]
    for count in range(math.floor(Fraction(protected_share) * slots), -1, -1):
        protected = best({token: scores[token] for token in before}, count)
        # "a protected token is a singleton and also breaks the chain"
        sets = runs_of([token for token in before if token not in protected])
        # "If mandatory cuts alone exceed B', reduce n_p."
        if len(sets) <= slots - len(recent) - len(protected):
            break
    # "cut only at the B' - 1 smallest adjacent similarities plus the mandatory cuts around protected tokens"
    similarity = adjacent_similarity(head)
    while len(sets) < slots - len(recent) - len(protected):
        edges = [i for one in sets for i in one[:-1]]
        weakest = min(edges, key=lambda i: (similarity[i], i))
        sets = [part for one in sets for part in _split(one, weakest)]
    return sorted([*sets, *([token] for token in protected), *([token] for token in recent)])


def _split(one: list[int], edge: int) -> list[list[int]]:
    parts = [token for token in one if token <= edge], [token for token in one if token > edge]
    return [part for part in parts if part]


def threshold_sets(head: Head, recent: int, protected: int, threshold: float) -> list[list[int]]:
    """The paper's own: "scan from last token to first; token i joins the current set if `cos(k_i, k_{i+1}) > eps`,
    otherwise starts a new set; a protected token is a singleton and also breaks the chain".
    """
    scores, similarity = head.received(), adjacent_similarity(head)
    before = range(head.tokens - recent)
    alone = {*best({token: scores[token] for token in before}, protected), *range(head.tokens - recent, head.tokens)}
    sets: list[list[int]] = []
    for token in reversed(range(head.tokens)):
        joins = bool(sets) and token not in alone and token + 1 not in alone and similarity[token] > threshold * 1e6
        sets = [[token, *sets[0]], *sets[1:]] if joins else [[token], *sets]
    return sets


def kvmerge(head: Head, sets: list[list[int]], sigma: str = "distance", value_scale: str = "none") -> Merged:
    """(5) pivot = argmax s in set; (6) Gaussian weights, merge K and V; (7) write at the pivot's index, sort."""
    scores = head.received()
    pivots = {max(one, key=lambda token: (scores[token], -token)): one for one in sets}
    edges = {token: {pivot: 1.0} for pivot, one in pivots.items() for token in one if token != pivot}
    keys = {"distance": gaussian_weights, "paper": paper_gaussian_weights}[sigma]
    values = {"none": keys, "size": size_gaussian_weights}[value_scale]
    return assemble(head, sorted(pivots), edges, keys, values)


# --- CaM ---


def mix(state: int) -> int:
    """The 32-bit hash that defines the lot: two rounds of multiply and xor-shift."""
    state &= 0xFFFFFFFF
    for _ in range(2):
        state = ((state >> 16) ^ state) * 0x45D9F3B & 0xFFFFFFFF
    return (state >> 16) ^ state


def lot(token: int, layer: int, seed: int = 0) -> float:
    key = mix(0xCA3 + (seed * 1_000_003 + layer) * 4096)
    return mix(mix(token ^ key) ^ key) / 2**32


def cam_kept(tokens: int, slots: int) -> list[int]:
    """Sinks (start) + recent, ratios 0.1 + 0.1: as many of the first as of the latest tokens."""
    first = slots // 2
    return list(range(first)) + list(range(tokens - (slots - first), tokens))


def cam_chances(head: Head, kept: list[int], window: int = 32) -> dict[int, tuple[list[int], float]]:
    """The following kept tokens that would share each token, and p."""
    received, chances = head.received(), {}
    for token in dropped(head, kept):
        following = [pivot for pivot in kept if pivot > token][:window]
        # "`p = clamp( abar_i / mean(abar_{i+1..i+m}), 0, 1 )`"
        mean = sum(received[pivot] for pivot in following) / len(following)
        chances[token] = following, min(max(received[token] / mean, 0.0), 1.0)
    return chances


def cam(head: Head, slots: int, layer: int, window: int = 32) -> Merged:
    kept = cam_kept(head.tokens, slots)
    # "mask ~ Bernoulli(p)", "Targets = the next m positions (sequential, no similarity)"
    edges = {
        token: {pivot: 1 / len(following) for pivot in following}
        for token, (following, chance) in cam_chances(head, kept, window).items()
        if lot(token, layer) < chance
    }
    # "`v_t <- v_t + mask * v_i / m`", "Keys are not merged"
    return assemble(head, kept, edges, own_weights, added_weights)
