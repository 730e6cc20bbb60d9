"""Independent references for reconstruction, value norms and what is built on them: eager attention in float64, loops
over heads and tokens, on what a stock model shows. Nothing of kvcomp is imported.

Reconstruction has no card in a collection; the lines that are quoted are of KVzip (arXiv:2505.23416) and CriticalKV
(arXiv:2502.03805), in our words.
"""

from __future__ import annotations

import copy
import math
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import oracles
import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface
from transformers.modeling_utils import AttentionInterface


@dataclass
class Seen:
    """What the attention of each layer saw in the last forward: `(heads, rows, head_dim)` and `(kv_heads, tokens,
    head_dim)` float64, and W_O.
    """

    queries: dict[int, Tensor] = field(default_factory=dict)
    keys: dict[int, Tensor] = field(default_factory=dict)
    values: dict[int, Tensor] = field(default_factory=dict)
    output: dict[int, Tensor] = field(default_factory=dict)
    hidden: dict[int, Tensor] = field(default_factory=dict)  # (kv_heads, tokens) bool, of the cache, not to be seen


@contextmanager
def watched(model: PreTrainedModel) -> Iterator[Seen]:
    """The text model with eager attention that also shows what it saw."""
    seen, decoder = Seen(), model.get_decoder()

    def attend(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **kwargs: Any) -> Any:
        layer = module.layer_idx
        usual = query.shape[-1] ** -0.5  # the oracles' own; Gemma's is another
        seen.queries[layer] = query[0] * (kwargs.get("scaling", usual) / usual)
        seen.keys[layer], seen.values[layer] = key[0], value[0]
        seen.output[layer] = module.o_proj.weight.detach()
        if layer in seen.hidden:
            hidden = seen.hidden[layer].repeat_interleave(query.shape[1] // key.shape[1], dim=0)
            seen_before = torch.zeros(query.shape[1], 1, key.shape[2]).masked_fill(
                torch.nn.functional.pad(hidden, (0, query.shape[2]))[:, None], -torch.inf
            )
            mask = seen_before[None].double() + (0 if mask is None else mask)
        eager = sys.modules[type(module).__module__].eager_attention_forward
        return eager(module, query, key, value, mask, **kwargs)

    AttentionInterface.register("watched", attend)
    AttentionMaskInterface.register("watched", ALL_MASK_ATTENTION_FUNCTIONS["eager"])
    decoder.set_attn_implementation("watched")
    try:
        yield seen
    finally:
        decoder.set_attn_implementation("eager")


@dataclass
class Prefilled:
    """A prompt in a stock cache: what the text model was given, and at which positions `(axes, tokens)`.

    Per token: its features of each layer that takes any (Qwen3-VL's images), what every layer is given of it (Gemma 4).
    """

    cache: DynamicCache
    embeddings: Tensor
    positions: Tensor
    features: dict[int, list[Tensor]]
    every_layer: Tensor | None

    def more(self, first: int, end: int) -> dict[str, Any]:
        """What the text model is given of some tokens beside embeddings and positions."""
        given: dict[str, Any] = {}
        if self.features:
            marked = [place in self.features for place in range(first, end)]
            layers = zip(*(self.features[place] for place in range(first, end) if place in self.features), strict=True)
            given = {"visual_pos_masks": torch.tensor([marked]), "deepstack_visual_embeds": [*map(torch.stack, layers)]}
        return given if self.every_layer is None else given | {"per_layer_inputs": self.every_layer[:, first:end]}


def prefill(model: PreTrainedModel, inputs: dict[str, Tensor]) -> Prefilled:
    given: dict[str, Any] = {}
    decoder = model.get_decoder()
    handle = decoder.register_forward_pre_hook(lambda module, args, kwargs: given.update(kwargs), with_kwargs=True)
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(**inputs, past_key_values=cache)
        handle.remove()
        embeddings = given["inputs_embeds"]
        if embeddings is None:
            embeddings = model.get_input_embeddings()(given["input_ids"])
    positions = given["position_ids"]
    if positions is None:
        positions = torch.arange(embeddings.shape[1])[None]
    marks = given.get("visual_pos_masks")
    places = [] if marks is None else marks[0].nonzero()[:, 0].tolist()
    features = {place: [layer[rank] for layer in given["deepstack_visual_embeds"]] for rank, place in enumerate(places)}
    positions = positions[-3:, 0] if positions.dim() == 3 else positions
    return Prefilled(cache, embeddings, positions, features, given.get("per_layer_inputs"))


def reconstruction(
    model: PreTrainedModel,
    inputs: dict[str, Tensor],
    *,
    chunk: int = 10**6,
    overlap: int = 0,
    instruction: tuple[int, ...] = (),
    noise: int = 0,
    hidden: dict[int, Tensor] | None = None,
    squares: bool = False,
) -> list[list[list[float]]]:
    """The score of each token, `[layer][kv_head][token]`, for one row without padding. The model is in float64.

    `hidden` `(kv_heads, tokens)` bool, per layer: what of the cache is not seen. With `squares` a score is the sum of
    the squares, in place of the largest. With `noise` not the context is read, but so many sequences of other tokens.
    """
    prompt = prefill(model, inputs)
    tokens = prompt.embeddings.shape[1]
    scores: list[list[list[float]]] = []
    with watched(model) as seen:
        seen.hidden.update(hidden or {})
        for given, place in readings(model, prompt, chunk, overlap, instruction, noise):
            with torch.no_grad():
                model.get_decoder()(
                    position_ids=place[:, None] if len(place) > 1 else place,
                    past_key_values=copy.deepcopy(prompt.cache),  # what one chunk adds is gone before the next
                    **given,
                )
            for layer in range(len(seen.queries)):
                found = []
                if seen.keys[layer].shape[1] == tokens + place.shape[1]:  # else its window slides
                    rows = (seen.queries[layer], seen.keys[layer], tokens, seen.hidden.get(layer))
                    found = (squares_received if squares else largest_received)(*rows)
                if layer == len(scores):
                    scores.append([[0.0] * tokens for _ in found])
                scores[layer] = joined(sum if squares else max, scores[layer], found)
    return scores


def joined(join: Any, before: list[list[float]], now: list[list[float]]) -> list[list[float]]:
    """Two readings of a layer as one, `[kv_head][token]`."""
    return [[join(pair) for pair in zip(*heads, strict=True)] for heads in zip(before, now, strict=True)]


def readings(
    model: PreTrainedModel, prompt: Prefilled, chunk: int, overlap: int, instruction: tuple[int, ...], noise: int
) -> Iterator[tuple[dict[str, Any], Tensor]]:
    """What the text model is given each time, and at which positions `(axes, tokens)`."""
    tokens = prompt.embeddings.shape[1]
    following = int(prompt.positions.max()) + 1  # positions go on after the largest of any axis
    for start in range(0, tokens, chunk):
        first = max(0, start - overlap)
        # "So many sequences of tokens of the vocabulary, as long as the chunk, in its place", each with its own seed
        for number in range(noise):
            count = min(chunk, tokens - start)
            drawn = torch.Generator().manual_seed(start + number)
            ids = torch.randint(model.get_decoder().config.vocab_size, (1, count), generator=drawn)
            yield {"input_ids": ids}, (following + torch.arange(count)).expand(len(prompt.positions), -1)
        if noise:
            continue
        # "The model is given a request to repeat, then the chunk": the request here is given by its ids.
        asked = model.get_input_embeddings()(torch.tensor([instruction], dtype=torch.long))
        end = min(start + chunk, tokens)
        more = prompt.more(first, end)
        if "visual_pos_masks" in more:
            unmarked = torch.zeros(1, len(instruction), dtype=torch.bool)
            more["visual_pos_masks"] = torch.cat([unmarked, more["visual_pos_masks"]], dim=1)
        place = prompt.positions[:, first:end]
        place = place - place.min() + following + len(instruction)
        place = torch.cat([(following + torch.arange(len(instruction))).expand(len(place), -1), place], dim=1)
        yield {"inputs_embeds": torch.cat([asked, prompt.embeddings[:, first:end]], dim=1), **more}, place


def halved(model: PreTrainedModel, inputs: dict[str, Tensor], slots: int) -> list[list[list[int]]]:
    """What is kept of a cache that is halved until the budget is reached, reconstructed from what is left each time:
    `[layer][kv_head]` places. Each time a head keeps its best.
    """
    tokens, hidden, share = inputs["input_ids"].shape[1], None, inputs["input_ids"].shape[1]
    while True:
        scores, share = reconstruction(model, inputs, hidden=hidden), max(slots, share // 2)
        left = [[kept(head, share) for head in heads] for heads in scores]
        if share == slots:
            return left
        hidden = {
            layer: torch.tensor([[token not in alive for token in range(tokens)] for alive in heads])
            for layer, heads in enumerate(left)
        }


def largest_received(queries: Tensor, keys: Tensor, tokens: int, hidden: Tensor | None = None) -> list[list[float]]:
    """ "The score of a pair is the largest attention that it receives while the context is reconstructed", over all
    rows and all query heads of a KV head, `[kv_head][token]`.
    """
    scores = [[0.0] * tokens for _ in keys]
    for kv_head, probs in received(queries, keys, tokens, hidden):
        for row in range(probs.shape[0]):
            for token in range(tokens):
                scores[kv_head][token] = max(scores[kv_head][token], float(probs[row, token]))
    return scores


def squares_received(queries: Tensor, keys: Tensor, tokens: int, hidden: Tensor | None = None) -> list[list[float]]:
    """The sum of the squares of the same, `[kv_head][token]`."""
    scores = [[0.0] * tokens for _ in keys]
    for kv_head, probs in received(queries, keys, tokens, hidden):
        for row in range(probs.shape[0]):
            for token in range(tokens):
                scores[kv_head][token] += float(probs[row, token]) ** 2
    return scores


def received(queries: Tensor, keys: Tensor, tokens: int, hidden: Tensor | None = None) -> Iterator[tuple[int, Tensor]]:
    """The attention of each query head, `(rows, columns)`, and the KV head that it belongs to."""
    group = queries.shape[0] // keys.shape[0]
    rows, new = queries.shape[1], keys.shape[1] - tokens
    for head in range(queries.shape[0]):
        visible = torch.ones(rows, tokens + new).tril(tokens).bool()
        if hidden is not None:
            visible[:, :tokens] &= ~hidden[head // group]
        yield head // group, oracles.softmax_attention(queries[head], keys[head // group], visible)


def kept(scores: list[float], slots: int, sinks: int = 0) -> list[int]:
    """The best, behind the sinks; of too many sinks the latest."""
    forced = list(range(min(sinks, len(scores))))[-slots:]
    rest = {token: score for token, score in enumerate(scores) if token not in forced}
    return sorted(forced + oracles.best(rest, slots - len(forced)))


def output_norm(value: Tensor, weights: list[Tensor], norm: str) -> float:
    """The mean over the query heads of ||W_O v||, each head with its own columns `(hidden, head_dim)` of W_O."""
    norms = []
    for weight in weights:
        entries = [float(row.double() @ value.double()) for row in weight]
        l1, l2 = sum(map(abs, entries)), math.sqrt(sum(entry * entry for entry in entries))
        norms.append(l1 if norm == "l1" else l2)
    return sum(norms) / len(norms)


def weighed(attention: list[float], norms: list[float], power: float) -> list[float]:
    return [received * norm**power for received, norm in zip(attention, norms, strict=True)]


def critical_kept(
    attention: list[float], norms: list[float], slots: int, window: int, first: float = 0.5, epsilon: float = 1e-4
) -> list[int]:
    """Tokens of the last `window` stay. "A share of the budget goes to the highest attention": the window is the first
    of it. "The rest goes to the highest product of attention, with a small constant, and the norm."
    """
    tokens = len(attention)
    recent = list(range(tokens - window, tokens))
    before = {token: attention[token] for token in range(tokens - window)}
    chosen = oracles.best(before, max(0, math.floor(first * slots) - window))
    rest = {token: (attention[token] + epsilon) * norms[token] for token in before if token not in chosen}
    return sorted(recent + chosen + oracles.best(rest, slots - window - len(chosen)))


def shared_budget(scores: list[list[list[float]]], slots: int, floor: int, sinks: int = 0) -> list[list[list[int]]]:
    """What one budget for all layers and heads keeps, `[layer][kv_head]` places: the sinks and the best tokens of each
    head, `floor` in all and at least 1, then the best of all others wherever they are.
    """
    heads = [(layer, head) for layer, found in enumerate(scores) for head in range(len(found))]
    places = {key: kept(scores[key[0]][key[1]], min(slots, max(1, floor, sinks)), sinks) for key in heads}
    rest = {
        (layer, head, token): score
        for layer, head in heads
        for token, score in enumerate(scores[layer][head])
        if token not in places[layer, head]
    }
    ranked = sorted(rest, key=lambda key: -rest[key])
    for layer, head, token in ranked[: slots * len(heads) - sum(map(len, places.values()))]:
        places[layer, head].append(token)
    return [[sorted(places[layer, head]) for head in range(len(found))] for layer, found in enumerate(scores)]


def with_output_norms(
    model: PreTrainedModel, inputs: dict[str, Tensor], scores: list[list[list[float]]], power: float, norm: str = "l2"
) -> list[list[list[float]]]:
    """The scores times the norms of W_O v, read from a stock model and its cache."""
    cache, weighted = prefill(model, inputs).cache, []
    for layer, heads in enumerate(scores):
        attention = model.get_decoder().layers[layer].self_attn
        columns = attention.o_proj.weight.detach().split(attention.head_dim, dim=1)  # one block per query head
        group = len(columns) // len(heads)
        weighted.append([])
        for head, received in enumerate(heads):
            own = list(columns[head * group : (head + 1) * group])
            norms = [output_norm(value, own, norm) for value in cache.layers[layer].values[0, head]]
            weighted[-1].append(weighed(received, norms, power))
    return weighted
