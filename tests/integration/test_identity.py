"""At budget 1.0 every recipe is transformers' own cache, bit for bit."""

import pytest
import torch
from inference import RECIPES, generate_compressed, generate_stock
from models import image_inputs, text_inputs, tiny_llama, tiny_qwen3, tiny_qwen_vl

pytestmark = pytest.mark.floor
MODELS = {
    "llama": (tiny_llama, text_inputs(60)),
    "qwen3": (tiny_qwen3, text_inputs(60)),
    "qwen2.5-vl": (tiny_qwen_vl, image_inputs()),
}


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", MODELS)
def test_budget_one_gives_the_tokens_and_logits_of_the_stock_cache(family, attention):
    build, inputs = MODELS[family]
    model = build()
    model.set_attn_implementation(attention)
    stock = generate_stock(model, inputs)
    for recipe in RECIPES:
        output, cache = generate_compressed(model, inputs, recipe, 1.0)
        assert torch.equal(output.sequences, stock.sequences), recipe
        assert all(map(torch.equal, output.logits, stock.logits)), recipe
        assert cache.get_seq_length() == stock.past_key_values.get_seq_length()
        assert torch.equal(cache.layers[1].keys, stock.past_key_values.layers[1].keys), recipe


def test_a_prompt_of_one_token_works():
    model = tiny_llama()
    inputs = text_inputs(1)
    output, cache = generate_compressed(model, inputs, "flowmm", 0.2, new=4)
    assert torch.equal(output.sequences, generate_stock(model, inputs, new=4).sequences)
    assert cache.report().layers[0].slots == (4.0,)


def test_bfloat16_is_identical_too():
    model = tiny_llama().to(torch.bfloat16)
    inputs = text_inputs(50)
    stock = generate_stock(model, inputs)
    output, _ = generate_compressed(model, inputs, "snapkv", 1.0)
    assert all(map(torch.equal, output.logits, stock.logits))
