"""`mass_preserving`: duplicates merged into one slot, with their number in its logit, attend as if they were all there.

One layer and no positions (frequencies of zero), so that equal tokens have equal keys and values wherever they stand.
Every run of 2 * distinct - 1 tokens holds all distinct ones, since tokens come in permutations of them: whatever is
merged finds its equal among the latest.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from inference import left_padded
from models import tiny_llama
from torch import Tensor
from transformers import PreTrainedModel

import kvcomp

MERGERS = ["mean", "pivot-mean", {"use": "unrotated", "merger": {"use": "mean"}}]
TRIGGERS = ["prefill-end", "over-budget", {"every": 4}]
METHOD = {"scorer": {"use": "position", "sinks": 0}, "selector": "top-k", "matcher": "nearest"}


def one_layer(implementation: str = "sdpa") -> PreTrainedModel:
    config = tiny_llama().config
    config.num_hidden_layers = 1
    torch.manual_seed(0)
    model = type(tiny_llama())(config).eval()
    model.model.rotary_emb.inv_freq.zero_()
    model.set_attn_implementation(implementation)
    return model


def permutations(distinct: int, tokens: int, seed: int) -> Tensor:
    """Return `(1, tokens)`: whole permutations of the distinct tokens, cut at the front."""
    generator = torch.Generator().manual_seed(seed)
    blocks = [torch.randperm(distinct, generator=generator) + 2 for _ in range(-(-tokens // distinct))]
    return torch.cat(blocks)[-tokens:][None]


def feed(model: PreTrainedModel, cache: kvcomp.CompressedCache, pieces: list[dict[str, Tensor]]) -> list[Tensor]:
    """Return the logits of the last token of every piece, one forward each."""
    with torch.no_grad():
        return [model(**piece, past_key_values=cache).logits[:, -1] for piece in pieces]


def pieces_of(inputs: dict[str, Tensor], widths: list[int]) -> list[dict[str, Tensor]]:
    """Return the forwards that feed so many tokens each, padding in the first."""
    ends = torch.tensor(widths).cumsum(0).tolist()
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    return [
        {"input_ids": ids[:, end - width : end], "attention_mask": mask[:, :end]}
        for end, width in zip(ends, widths, strict=True)
    ]


def check(
    model: PreTrainedModel, pieces: list[dict[str, Tensor]], slots: int, **overrides: object
) -> kvcomp.CompressedCache:
    session = kvcomp.attach(model)
    full = feed(model, session.cache("full"), pieces)
    method = {**METHOD, "budget": {"tokens": slots}, "mass_preserving": True} | overrides
    cache = session.cache(method)
    merged = feed(model, cache, pieces)
    session.detach()
    assert cache.report().layers[0].merged[0] > 0
    for after, before in zip(merged, full, strict=True):
        torch.testing.assert_close(after, before, rtol=0.0, atol=1e-5)
    return cache


@pytest.mark.parametrize("merger", MERGERS, ids=str)
@pytest.mark.parametrize("trigger", TRIGGERS, ids=str)
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@given(
    distinct=st.integers(1, 6),
    lengths=st.lists(st.integers(24, 60), min_size=1, max_size=3),
    turn=st.integers(0, 12),
    seed=st.integers(0, 999),
)
def test_duplicates_merged_with_their_mass_attend_as_if_they_were_all_there(
    merger: object, trigger: object, implementation: str, distinct: int, lengths: list[int], turn: int, seed: int
) -> None:
    """A batch of prompts, nine decoded tokens, a longer turn, and two more tokens."""
    tail = permutations(distinct, turn + 11, seed).expand(len(lengths), -1)
    prompts = left_padded([permutations(distinct, tokens, seed + place) for place, tokens in enumerate(lengths)])
    inputs = {
        "input_ids": torch.cat([prompts["input_ids"], tail], dim=1),
        "attention_mask": torch.cat([prompts["attention_mask"], torch.ones_like(tail)], dim=1),
    }
    widths = [max(lengths), *[1] * 9, *([turn] if turn else []), 1, 1]
    slots = 3 * distinct
    cache = check(one_layer(implementation), pieces_of(inputs, widths), slots, merger=merger, trigger=trigger)
    waiting = {"prefill-end": 12, "over-budget": 0}.get(str(trigger), 3)
    assert cache.layers[0].keys.shape[2] <= slots + waiting
