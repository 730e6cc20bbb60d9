"""Every recipe in the precisions that models are run in."""

from functools import cache

import pytest
import torch
from inference import COMPRESSING, RECIPES, generate_compressed, generate_stock, left_padded
from models import image_inputs, text_inputs, tiny_llama, tiny_qwen_vl

import kvcomp

HALF = [torch.bfloat16, torch.float16]
BATCH = left_padded([text_inputs(tokens, seed=tokens)["input_ids"] for tokens in (60, 25)])
BY_PLACE = ["recency", "random", "streaming-llm"]  # what they keep does not depend on what the model computes


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_budget_one_is_the_stock_cache_bit_for_bit(dtype):
    model, inputs = tiny_llama().to(dtype), text_inputs(50)
    stock = generate_stock(model, inputs, new=2)
    for recipe in RECIPES:
        output, held = generate_compressed(model, inputs, recipe, 1.0, new=2)
        assert all(map(torch.equal, output.logits, stock.logits)), recipe
        assert held.layers[0].keys.dtype == dtype


@cache
def in_single_precision(recipe):
    return generate_compressed(tiny_llama(), BATCH, recipe, 0.4, new=2)[1]


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("recipe", COMPRESSING)
def test_half_precision_gives_finite_slots_as_many_as_single_precision(recipe, dtype):
    single = in_single_precision(recipe)
    output, half = generate_compressed(tiny_llama().to(dtype), BATCH, recipe, 0.4, new=2)
    assert all(torch.isfinite(logits).all() for logits in output.logits)
    held = [sum(layer.slots[row] for layer in half.report().layers) for row in (0, 1)]
    assert held == pytest.approx([sum(layer.slots[row] for layer in single.report().layers) for row in (0, 1)])
    for layer, other in zip(half.layers, single.layers, strict=True):
        assert layer.keys.dtype == layer.values.dtype == dtype
        assert torch.isfinite(layer.keys).all()
        assert torch.isfinite(layer.values).all()
        if recipe in BY_PLACE:
            assert torch.equal(layer.indices, other.indices)


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_images_are_compressed_in_half_precision(attention, dtype):
    model = tiny_qwen_vl().to(dtype)
    model.set_attn_implementation(attention)
    inputs = image_inputs()
    inputs["pixel_values"] = inputs["pixel_values"].to(dtype)
    output, cache = generate_compressed(model, inputs, "flowmm", 0.4)
    assert all(torch.isfinite(logits).all() for logits in output.logits)
    assert cache.report().layers[0].slots == (pytest.approx(int(0.4 * inputs["input_ids"].shape[1]) + 7),)


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("store", ["dense", "ragged"])
def test_fixed_slots_decode_in_half_precision(store, dtype):
    model, inputs = tiny_llama().to(dtype), text_inputs(50)
    with kvcomp.compress(model, "ada-kv", budget=0.4, store=store, reserve=6, compiled=True) as cache:
        output = model.generate(
            **inputs,
            past_key_values=cache,
            max_new_tokens=6,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
        )
    expected, _ = generate_compressed(model, inputs, "ada-kv", 0.4, new=6)
    for logits, others in zip(output.logits, expected.logits, strict=True):
        assert torch.allclose(logits, others, atol=2e-2)
