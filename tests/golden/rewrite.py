"""Write `kept.json` anew: the kept indices of every recipe on one fixed prompt, as the naive oracles find them.

    python tests/golden/rewrite.py

Nothing of kvcomp decides what is expected: the prompt is a formula, the attention and the choice are
`tests/oracles.py`. The one exception is `random`, whose hash is its definition; it is written out again here, on
Python integers.
"""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import torch
from torch import Tensor

FILE = Path(__file__).with_name("kept.json")
LENGTHS, KV_HEADS, GROUP, HEAD_DIM = (29, 90), 2, 2, 8
BUDGETS = ("0.04", "0.2", "0.5", "0.9", "1.0")
RECIPES = (
    *("full", "random", "streaming-llm", "h2o", "snapkv"),
    *("flowmm", "flowmm-misaligned", "flowmm-no-flow", "flowmm-no-gate", "flowmm-no-flow-no-gate"),
)
MERGING = ("look-m", "look-m-mean", "look-m-weighted", "look-m-evict", "d2o", "meda", "kvmerge", "cam")
RECONSTRUCTING = ("kvzip", "critical", "kvcomp-global", "kvcomp-global-merge")  # from the rows of the prompt itself
EXPECTING = "expected-attention"
EVICTING = ("tova", "recency", "key-norm", "keydiff", "pyramidkv", "ada-kv", "vl-cache", "prefixkv")
LAYER, HIDDEN = 1, 10


def wave(heads: int, tokens: int, phase: float) -> Tensor:
    """`(heads, tokens, head_dim)` float32: numbers without a pattern, the same on every machine."""
    count = heads * tokens * HEAD_DIM
    numbers = [math.sin(phase + 12.9898 * place) * 43758.5453 for place in range(count)]
    flat = torch.tensor([3.0 * (number - math.floor(number)) - 1.5 for number in numbers], dtype=torch.float32)
    return flat.view(heads, tokens, HEAD_DIM)


def prompt(row: int) -> tuple[Tensor, Tensor, Tensor, list[int]]:
    """Queries, keys, values and modalities of one row: images of 7 tokens, text of 4 between them."""
    tokens = LENGTHS[row]
    queries, keys, values = (
        wave(heads, tokens, row + step) for heads, step in ((KV_HEADS * GROUP, 0.1), (KV_HEADS, 0.2), (KV_HEADS, 0.3))
    )
    return queries, keys, values, [int(place % 11 >= 4 and place < tokens - 6) for place in range(tokens)]


def mix(state: int) -> int:
    state &= 0xFFFFFFFF
    for _ in range(2):
        state = ((state >> 16) ^ state) * 0x45D9F3B & 0xFFFFFFFF
    return (state >> 16) ^ state


def random_kept(tokens: int, slots: int, head: int) -> list[int]:
    import oracles

    stream = mix(head + LAYER * 4096)
    return oracles.best({place: mix(mix(place ^ stream) ^ stream) for place in range(tokens)}, slots)


def expected() -> dict[str, dict[str, list]]:
    """Recipe, budget: `[row][head]` lists of kept indices; of methods that merge also where each merged token goes."""
    import oracles

    table: dict[str, dict[str, list]] = {recipe: {budget: [] for budget in BUDGETS} for recipe in RECIPES}
    table |= {
        recipe: {budget: [] for budget in BUDGETS} for recipe in (*MERGING, *RECONSTRUCTING, EXPECTING, *EVICTING)
    }
    for row in range(len(LENGTHS)):
        queries, keys, values, modality = prompt(row)
        attention = [oracles.softmax_attention(queries[h], keys[h // GROUP]) for h in range(len(queries))]
        rho = oracles.flow_ratio(attention, modality, modality)
        for budget in BUDGETS:
            slots = oracles.num_slots(budget, LENGTHS[row])
            for recipe in RECIPES:
                heads = [
                    one_head(
                        recipe, attention[h * GROUP : (h + 1) * GROUP], keys[h], values[h], modality, slots, rho, h
                    )
                    for h in range(KV_HEADS)
                ]
                table[recipe][budget].append(heads)
            groups = [attention[h * GROUP : (h + 1) * GROUP] for h in range(KV_HEADS)]
            for recipe in MERGING:
                table[recipe][budget].append(merging_row(recipe, groups, keys, values, modality, slots))
            for recipe in RECONSTRUCTING:
                table[recipe][budget].append(reconstructing_row(recipe, groups, keys, values, slots))
            table[EXPECTING][budget].append(expecting_row(queries, keys, values, slots))
            for recipe in EVICTING:
                table[recipe][budget].append(evicting_row(recipe, groups, keys, modality, slots))
    return table


def merging_row(recipe, groups, keys, values, modality, slots):  # type: ignore[no-untyped-def]
    """What a merging method makes of the heads of one row, each of which is allotted the same slots."""
    import oracles_merge

    heads = [oracles_merge.Head(*head) for head in zip(groups, keys, values, strict=True)]
    allotted = [slots] * len(heads)
    if recipe == "d2o":
        merged, _ = oracles_merge.d2o(heads, modality, allotted)
    elif recipe == "kvmerge":
        merged = [oracles_merge.kvmerge(head, oracles_merge.kvmerge_sets(head, slots)) for head in heads]
    elif recipe == "cam":
        merged = [oracles_merge.cam(head, slots, LAYER) for head in heads]
    else:
        merge = {"look-m": "pivot", "meda": "mean"}.get(recipe, recipe.removeprefix("look-m-"))
        merged = oracles_merge.look_m(heads, modality, allotted, merge)
    return [
        {"kept": one.kept, "edges": [[source, pivot] for source in sorted(one.edges) for pivot in one.edges[source]]}
        for one in merged
    ]


def output() -> Tensor:
    """W_O of each query head, `(heads, hidden, head_dim)`."""
    return wave(KV_HEADS * GROUP, HIDDEN, 0.4)


def reconstructing_row(recipe, groups, keys, values, slots):  # type: ignore[no-untyped-def]
    """What is kept of the heads of one row, which share the budget but for `critical`."""
    import oracles
    import oracles_recon

    tokens = keys.shape[1]
    if recipe == "critical":
        weights = [list(output()[h * GROUP : (h + 1) * GROUP]) for h in range(KV_HEADS)]
        norms = [[oracles_recon.output_norm(value, weights[h], "l1") for value in values[h]] for h in range(KV_HEADS)]
        window = min(32, slots // 2)
        votes = [oracles.snapkv_scores(group, slots) + [0.0] * window for group in groups]
        kept = [oracles_recon.critical_kept(votes[h], norms[h], slots, window) for h in range(KV_HEADS)]
        return [{"kept": places} for places in kept]
    largest = [[max(float(head[:, token].max()) for head in group) for token in range(tokens)] for group in groups]
    if recipe == "kvzip":
        return [{"kept": places} for places in oracles_recon.shared_budget([largest], slots, floor=0, sinks=4)[0]]
    squares = [
        [sum(float(head[row, token]) ** 2 for head in group for row in range(len(head))) for token in range(tokens)]
        for group in groups
    ]
    kept = oracles_recon.shared_budget([squares], slots, floor=slots // 10)[0]
    if recipe == "kvcomp-global":
        return [{"kept": places} for places in kept]
    goes = [sorted(set(range(tokens)) - set(places)) for places in kept]
    edges = [[[one, oracles.nearest(one, kept[h], keys[h])] for one in goes[h]] for h in range(KV_HEADS)]
    edges = [[e for e in edges[h] if oracles.cosine(*keys[h][e]) >= 0.9] for h in range(KV_HEADS)]
    return [{"kept": kept[h], "edges": edges[h]} for h in range(KV_HEADS)]


def expecting_row(queries, keys, values, slots):  # type: ignore[no-untyped-def]
    """What is kept of the heads of one row, rotated by place as `kvcomp.testing` says: all but two coordinates."""
    import oracles_expected
    import oracles_recon

    pairs = HEAD_DIM // 2 - 1

    def turned(position: int) -> Tensor:
        return oracles_expected.rotation([position * 1e4 ** -(pair / pairs) for pair in range(pairs)], HEAD_DIM)

    tokens = keys.shape[1]
    turn = sum(turned(tokens + ahead) for ahead in range(512)) / 512
    before = torch.stack([turned(token).T for token in range(tokens)])
    queries = torch.einsum("tij,htj->hti", before, queries.double())
    scaling, kept = HEAD_DIM**-0.5, []
    for head in range(KV_HEADS):
        group = list(queries[head * GROUP : (head + 1) * GROUP])
        scores = oracles_expected.expected_scores(group, keys[head], values[head], turn, scaling)
        kept.append({"kept": oracles_recon.kept(scores, slots, sinks=4)})
    return kept


def evicting_row(recipe, groups, keys, modality, slots):  # type: ignore[no-untyped-def]
    """What is kept of the heads of one row. One layer by itself has its own budget, however layers would share one."""
    import oracles
    import oracles_evict

    tokens, everyone = len(modality), [head for group in groups for head in group]
    window, sizes = list(range(tokens - min(32, slots // 2), tokens)), [slots] * KV_HEADS
    pooling = {"pyramidkv": (5, "average"), "ada-kv": (7, "max")}
    if recipe in pooling:
        scores = [oracles_evict.window_votes(group, slots, 32, *pooling[recipe])[0] for group in groups]
        if recipe == "ada-kv":
            quotas, _ = oracles_evict.ada_quotas(scores, [window] * KV_HEADS, slots)
            bins = [
                oracles_evict.Bin(LAYER, head, quota, tokens, len(window), sum(scores[head]))
                for head, quota in enumerate(quotas)
            ]
            sizes = oracles_evict.shares(bins, slots * KV_HEADS)
        protected = window
    elif recipe == "prefixkv":
        scores, protected = [oracles.h2o_scores(everyone)] * KV_HEADS, sorted({*range(min(4, tokens)), tokens - 1})
    elif recipe == "vl-cache":
        scores = [oracles_evict.post_vision_scores(group, modality) for group in groups]
        protected = list(range(tokens - slots // 10, tokens))
    else:
        of_head = {"key-norm": oracles_evict.key_norms, "keydiff": oracles_evict.key_differences}
        same = oracles_evict.last_row(everyone) if recipe == "tova" else [float(place) for place in range(tokens)]
        scores, protected = [of_head[recipe](head) if recipe in of_head else same for head in keys], []
    return [{"kept": oracles_evict.keep(scores[h], protected, sizes[h])[0]} for h in range(KV_HEADS)]


def one_head(recipe, attention, keys, values, modality, slots, rho, head):  # type: ignore[no-untyped-def]
    import oracles

    tokens = len(modality)
    if recipe == "full":
        return {"kept": list(range(tokens))}
    if recipe == "random":
        return {"kept": random_kept(tokens, slots, head)}
    if recipe == "streaming-llm":
        return {"kept": oracles.streaming_kept(tokens, slots)}
    if recipe == "h2o":
        return {"kept": oracles.h2o_kept(attention, slots)}
    if recipe == "snapkv":
        return {"kept": oracles.snapkv_kept(attention, slots)}
    options = {
        "threshold": None if "no-flow" in recipe else 0.25,
        "share": None if "no-gate" in recipe else 0.8,
        "misaligned": "misaligned" in recipe,
    }
    merged = oracles.flowmm(attention, keys, values, modality, slots, rho=rho, **options)
    return {"kept": merged.kept, "edges": [[source, pivot] for source, pivot in sorted(merged.edges.items())]}


def dumped(table: dict) -> str:
    """One line per recipe and budget, so that a change is a readable diff."""
    recipes = []
    for recipe, budgets in table.items():
        rows = [f'  "{budget}": {json.dumps(heads, separators=(",", ":"))}' for budget, heads in budgets.items()]
        recipes.append(f'"{recipe}": {{\n' + ",\n".join(rows) + "\n}")
    return "{\n" + ",\n".join(recipes) + "\n}\n"


if __name__ == "__main__":
    sys.path.insert(0, str(FILE.parents[1]))
    FILE.write_text(dumped(expected()), encoding="utf-8")
    print(f"wrote {FILE}")
