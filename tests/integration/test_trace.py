"""A watcher sees every compression and changes nothing; a trace agrees with what the cache holds."""

import pytest
import torch
from inference import FIRM, RECIPES, STRATEGIES, generate, left_padded
from models import image_inputs, text_inputs, tiny_llama, tiny_qwen_vl

import kvcomp


def homes_of(trace: kvcomp.Trace, cache: kvcomp.CompressedCache, layer: int, tokens: int) -> torch.Tensor:
    found = trace.of(layer, tokens)
    if found is not None:
        return found
    return torch.arange(tokens).expand(*cache.layers[layer].indices.shape[:2], -1)


def check(trace: kvcomp.Trace, cache: kvcomp.CompressedCache, tokens: int) -> None:
    """The first tokens of every row and head: those at home are the slots, and the counts tell what was merged."""
    for layer, (held, entry) in enumerate(zip(cache.layers, cache.report().layers, strict=True)):
        homes, places = homes_of(trace, cache, layer, tokens), torch.arange(tokens)
        for row, heads in enumerate(homes):
            kept = [place[place == places[: len(place)]].tolist() for place in heads]
            assert kept == [line[(line >= 0) & (line < tokens)].tolist() for line in held.indices[row]]
            gone = (heads == -1).sum(dim=-1).double().mean().item() - (tokens - entry.tokens[row])
            assert gone == pytest.approx(entry.evicted[row], abs=1e-5)


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_trace_of_a_prompt_agrees_with_the_slots_of_every_head(recipe):
    model, inputs, trace = tiny_qwen_vl(), image_inputs(3, 8), kvcomp.Trace()
    budget = 0.95 if recipe in FIRM else 0.4 if STRATEGIES[recipe].selector else 1.0  # stores that cannot go lower
    with torch.no_grad(), kvcomp.compress(model, recipe, budget=budget, watcher=trace) as cache:
        model(**inputs, past_key_values=cache)
    tokens = inputs["input_ids"].shape[1]
    check(trace, cache, tokens)


def test_a_padded_batch_is_traced_by_position_in_each_row():
    rows = [text_inputs(tokens, seed=tokens)["input_ids"] for tokens in (30, 21)]
    model, trace = tiny_llama(), kvcomp.Trace()
    with torch.no_grad(), kvcomp.compress(model, "d2o", budget=0.4, watcher=trace) as cache:
        model(**left_padded(rows), past_key_values=cache)
    check(trace, cache, 30)
    assert (trace.homes[0][1, :, 21:] == -1).all()


def test_tokens_are_followed_through_compressions_while_decoding():
    model, inputs, trace = tiny_llama(), text_inputs(30), kvcomp.Trace()
    settings = {"trigger": {"every": 3}}
    with kvcomp.compress(model, "d2o", budget=0.4, watcher=trace, **settings) as cache:
        generate(model, inputs, cache, new=11)
    check(trace, cache, 40)
    assert cache.layers[0].compressions > 2


def test_a_watcher_changes_nothing_and_is_told_once_a_layer():
    class Count:
        def __init__(self):
            self.layers = []

        def compressed(self, layer, plan):
            self.layers.append(layer.layer)

    model, inputs, count = tiny_qwen_vl(), image_inputs(), Count()
    with kvcomp.compress(model, "flowmm", budget=0.4) as cache:
        expected = generate(model, inputs, cache)
    session = kvcomp.attach(model)
    watched = session.cache("flowmm", budget=0.4, watcher=count)
    output = generate(model, inputs, watched)
    session.detach()
    assert torch.equal(output.sequences, expected.sequences)
    assert all(map(torch.equal, output.logits, expected.logits))
    assert count.layers == [0, 1, 2]
