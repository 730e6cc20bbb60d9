"""Compression of a later turn and while tokens are decoded, against a simulation that goes token by token.

One layer, so that queries and keys of a token depend on nothing but the token and its position. The simulation knows
one row and one KV head at a time: float64, plain lists, nothing of kvcomp.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import oracles
import pytest
import torch
from inference import left_padded
from models import text_inputs, tiny_llama
from torch import Tensor
from transformers import PreTrainedModel
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

import kvcomp

GROUP, WINDOW = 2, 32


def one_layer(implementation: str = "sdpa") -> PreTrainedModel:
    config = tiny_llama().config
    config.num_hidden_layers = 1
    torch.manual_seed(0)
    model = type(tiny_llama())(config).eval()
    model.set_attn_implementation(implementation)
    return model


@torch.no_grad()
def queries_and_keys(model: PreTrainedModel, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Return `(heads, tokens, head_dim)` queries and `(kv_heads, tokens, head_dim)` keys of one row, in float64."""
    layer, text = model.model.layers[0], model.model
    hidden = layer.input_layernorm(text.embed_tokens(ids))
    cos, sin = text.rotary_emb(hidden, torch.arange(ids.shape[1])[None])
    split = [
        proj(hidden).unflatten(-1, (-1, 16)).transpose(1, 2)
        for proj in (layer.self_attn.q_proj, layer.self_attn.k_proj)
    ]
    queries, keys = apply_rotary_pos_emb(*split, cos, sin)
    return queries[0].double(), keys[0].double()


@dataclass
class Head:
    """One KV head of one row, with its group of query heads."""

    queries: Tensor
    keys: Tensor
    kept: list[int] = field(default_factory=list)
    seen: int = 0
    first: int = 0  # the first query that votes
    sums: list[dict[int, float]] = field(default_factory=lambda: [{} for _ in range(GROUP)])

    def arrive(self, tokens: int, heard: bool = True) -> None:
        """Take in so many tokens at once; each attends to what is kept and to those before it, and is `heard` where
        queries are remembered.
        """
        self.kept += range(self.seen, self.seen + tokens)
        for query in range(self.seen, self.seen + tokens) if heard else ():
            for sums, row in zip(self.sums, self.rows(query), strict=True):
                for place, share in row.items():
                    sums[place] = sums.get(place, 0.0) + share
        self.seen += tokens

    def rows(self, query: int) -> list[dict[int, float]]:
        """What a query's attention gives to each kept token that it can see, one row per query head."""
        visible = [place for place in self.kept if place <= query]
        rows = (self.queries[:, query] @ self.keys[visible].T * self.keys.shape[1] ** -0.5).softmax(dim=-1)
        return [dict(zip(visible, row, strict=True)) for row in rows.tolist()]

    def votes(self, count: int) -> dict[int, float]:
        """What the last queries, prompt or decoded, give to each kept token together, mean over the group."""
        total = dict.fromkeys(self.kept, 0.0)
        for query in range(max(self.first, self.seen - count), self.seen):
            for row in self.rows(query):
                for place, share in row.items():
                    total[place] += share / GROUP
        return total

    def keep(self, places: list[int]) -> None:
        self.kept = sorted(places)
        self.sums = [{place: sums.get(place, 0.0) for place in self.kept} for sums in self.sums]


def h2o(head: Head, slots: int) -> None:
    recent = slots // 2
    before = head.kept[: len(head.kept) - recent]
    heavy = oracles.best({place: sum(sums[place] for sums in head.sums) for place in before}, slots - recent)
    head.keep(heavy + head.kept[len(before) :])


def streaming(head: Head, slots: int) -> None:
    sinks = [place for place in head.kept if place < 4 and slots > 4]
    others = [place for place in head.kept if place not in sinks]
    head.keep(sinks + others[len(others) - (slots - len(sinks)) :])


def windowed(kernel: int) -> Callable[[Head, int], None]:
    def keep(head: Head, slots: int) -> None:
        window = min(WINDOW, slots // 2)
        votes = head.votes(max(1, window))
        before = head.kept[: len(head.kept) - window]
        pooled = {}
        for number, place in enumerate(before):
            near = before[max(0, number - kernel // 2) : number + kernel // 2 + 1]
            pooled[place] = sum(votes[other] for other in near) / len(near)
        head.keep(oracles.best(pooled, slots - window) + head.kept[len(before) :])

    return keep


def tova(heads: list[Head], slots: int) -> None:
    """What the latest query looks at, mean over all query heads: one choice for all KV heads."""
    rows = [row for head in heads for row in head.rows(head.seen - 1)]
    scores = {place: sum(row[place] for row in rows) / len(rows) for place in heads[0].kept}
    for head in heads:
        head.keep(oracles.best(scores, slots))


def each(method: Callable[[Head, int], None]) -> Callable[[list[Head], int], None]:
    def keep(heads: list[Head], slots: int) -> None:
        for head in heads:
            method(head, slots)

    return keep


METHODS = {
    "h2o": ({}, each(h2o)),
    "streaming-llm": ({}, each(streaming)),
    "tova": ({}, tova),
    "snapkv": ({}, each(windowed(kernel=5))),
    "flowmm": ({"policy": "uniform", "matcher": "none", "merger": "drop"}, each(windowed(kernel=1))),
}


class Simulation:
    """All heads of one row, compressed at the end of a forward of several tokens and as the trigger says.

    Where that is all, at the prefill's end, no query of a decoded token is remembered, and none of an earlier turn but
    in the sums of what it looked at.
    """

    def __init__(
        self, model: PreTrainedModel, ids: Tensor, method: Callable[[list[Head], int], None], slots: Callable
    ) -> None:
        queries, keys = queries_and_keys(model, ids)
        self.heads = [Head(queries[kv * GROUP : (kv + 1) * GROUP], keys[kv]) for kv in range(len(keys))]
        self.method, self.slots = method, slots
        self.since = 0

    def forward(self, tokens: int, trigger: Any) -> None:
        """Take in tokens; `slots(seen, prompt)` is the budget."""
        prefills = trigger == "prefill-end"
        for head in self.heads:
            head.arrive(tokens, heard=tokens > 1 or not prefills)
            head.first = head.seen - tokens if prefills else 0
        seen = self.heads[0].seen
        if tokens > 1:
            self.prompt, self.since = seen, 0
        else:
            self.since += 1
        over_budget = trigger == "over-budget"
        slots = self.slots(self.prompt if over_budget else seen, seen)
        due = len(self.heads[0].kept) > slots if over_budget else not prefills and self.since == trigger["every"]
        if tokens == 1 and not due:
            return
        self.since = 0
        if len(self.heads[0].kept) > slots:
            self.method(self.heads, slots)


BUDGETS = {
    "ratio": ("0.3", lambda prompt, seen: oracles.num_slots("0.3", prompt)),
    "tokens": ({"tokens": 12}, lambda prompt, seen: min(12, seen)),
    "more than the prompt": ({"tokens": 78}, lambda prompt, seen: min(78, seen)),  # sums are folded before that
}


@pytest.mark.parametrize("trigger", ["prefill-end", "over-budget", {"every": 5}], ids=str)
@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("recipe", METHODS)
def test_every_step_keeps_what_a_simulation_of_it_keeps(recipe: str, budget: str, trigger: Any) -> None:
    """Three rows of different lengths in one batch, each as the simulation has it alone; then a longer turn."""
    implementation = "eager" if budget == "tokens" else "sdpa"
    model, lengths, widths = one_layer(implementation), (40, 27, 9), [*[1] * 42, 7, *[1] * 12]
    later = text_inputs(sum(widths), seed=9, batch=len(lengths))["input_ids"]
    prompts = [text_inputs(tokens, seed=tokens)["input_ids"] for tokens in lengths]
    overrides, method = METHODS[recipe]
    spelled, slots = BUDGETS[budget]
    simulated = [
        Simulation(model, torch.cat([prompt, later[row : row + 1]], dim=1), method, slots)
        for row, prompt in enumerate(prompts)
    ]
    inputs = left_padded(prompts)
    mask = torch.cat([inputs["attention_mask"], torch.ones_like(later)], dim=1)
    ids = torch.cat([inputs["input_ids"], later], dim=1)
    seen = 0
    with kvcomp.compress(model, recipe, budget=spelled, trigger=trigger, **overrides) as cache, torch.no_grad():
        for width in [max(lengths), *widths]:
            end = seen + width
            positions = (mask[:, :end].cumsum(dim=1) - 1).clamp(min=0)[:, seen:]
            model(
                input_ids=ids[:, seen:end], attention_mask=mask[:, :end], position_ids=positions, past_key_values=cache
            )
            for row, simulation in enumerate(simulated):
                simulation.forward(lengths[row] if seen == 0 else width, trigger)
                for number, head in enumerate(simulation.heads):
                    kept = cache.layers[0].indices[row, number]
                    assert kept[kept >= 0].tolist() == head.kept, (row, number, end)
            seen = end
