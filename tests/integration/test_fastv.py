"""FastV on a cache, through a model: full early layers, all text, and the smallest budget that holds them."""

import pytest
import torch
from inference import generate_compressed, generate_stock, kept, quiet_prefill
from models import IMAGE_TOKEN, image_inputs, text_inputs, tiny_llama, tiny_qwen_vl

import kvcomp

INPUTS = image_inputs(images=8, between=1)
TOKENS = INPUTS["input_ids"].shape[1]
TEXT = (INPUTS["input_ids"][0] != IMAGE_TOKEN).nonzero().flatten().tolist()


def smallest(recipe: dict | str, inputs=INPUTS, budget=0.1) -> float:
    with pytest.raises(kvcomp.BudgetError, match=r"^recipe .*: the budget must hold .*never drops") as caught:
        quiet_prefill(tiny_qwen_vl(), inputs, recipe, budget)
    return caught.value.smallest


def fastv(layer: int) -> kvcomp.Strategy:
    return kvcomp.strategy("fastv", **{"scorer.layer": layer})


@pytest.mark.parametrize("layer", [1, 2])
def test_the_smallest_budget_is_accepted_and_keeps_the_full_layers_and_all_text(layer):
    ratio = smallest(fastv(layer))
    slots = -(-(layer * TOKENS + (3 - layer) * len(TEXT)) // 3)
    assert slots / TOKENS <= ratio < slots / TOKENS + 1e-6
    assert smallest(fastv(layer), budget=ratio - 2e-6) == ratio
    cache = quiet_prefill(tiny_qwen_vl(), INPUTS, fastv(layer), ratio)
    assert kept(cache).sum() == 3 * 2 * slots
    for number, held in enumerate(cache.layers):
        indices = held.indices[0, 0]
        assert set(TEXT) <= set(indices.tolist())
        assert (held.indices == indices).all()
        assert number >= layer or indices.tolist() == list(range(TOKENS))


def test_the_recipe_serves_every_prompt_at_its_own_budget():
    held = [
        int(kept(quiet_prefill(tiny_qwen_vl(), INPUTS, "fastv", budget)).sum()) for budget in (None, smallest("fastv"))
    ]
    assert held[0] == held[1] < 3 * 2 * TOKENS
    assert (kept(quiet_prefill(tiny_llama(), text_inputs(30), "fastv", None)) == 30).all()


def test_what_is_too_little_says_for_whom_and_what_to_write():
    ratio = smallest("fastv")
    with pytest.raises(kvcomp.BudgetError) as caught:
        quiet_prefill(tiny_qwen_vl(), INPUTS, "fastv", "2t")
    assert str(caught.value).startswith(
        "recipe 'fastv': the budget must hold what this method never drops, which takes "
    )
    assert str(caught.value).endswith(f"or `--budget {ratio:.6g}`; '2t or smallest' takes that by itself")


def test_the_images_kept_are_those_that_the_early_layer_looks_at():
    model = tiny_qwen_vl()
    model.set_attn_implementation("eager")
    with torch.no_grad():
        attention = model(**INPUTS, output_attentions=True).attentions[0][0, :, -1].mean(dim=0)
    images = [place for place in range(TOKENS) if place not in TEXT]
    cache = quiet_prefill(tiny_qwen_vl(), INPUTS, fastv(1), 0.9)
    for held in cache.layers[1:]:
        seen = [index for index in held.indices[0, 0].tolist() if index in images]
        best = sorted(images, key=lambda place: -float(attention[place]))[: len(seen)]
        assert 0 < len(seen) < len(images)
        assert seen == sorted(best)


def test_a_prompt_without_images_has_nothing_to_drop():
    inputs = text_inputs(30)
    with pytest.raises(kvcomp.BudgetError) as caught:
        quiet_prefill(tiny_llama(), inputs, "fastv", 0.9)
    assert caught.value.smallest == 1.0
    output, _ = generate_compressed(tiny_llama(), inputs, "fastv", 1.0)
    assert torch.equal(output.sequences, generate_stock(tiny_llama(), inputs).sequences)


def test_a_later_turn_goes_by_what_the_early_layer_still_holds():
    model = tiny_qwen_vl()
    follow_up = {"input_ids": text_inputs(9, seed=3)["input_ids"]}
    with kvcomp.compress(model, fastv(1), budget=0.9) as cache, torch.no_grad():
        model(**INPUTS, past_key_values=cache)
        before = [set(layer.indices[0, 0].tolist()) for layer in cache.layers]
        model(**follow_up, past_key_values=cache, mm_token_type_ids=torch.zeros(1, 9, dtype=torch.int))
    assert kept(cache).sum() == 3 * 2 * ((TOKENS + 9) * 9 // 10)
    for layer, held in zip(cache.layers, before, strict=True):
        now = set(layer.indices[0, 0].tolist())
        assert now <= held | set(range(TOKENS, TOKENS + 9))
        assert {*TEXT, *range(TOKENS, TOKENS + 9)} <= now
