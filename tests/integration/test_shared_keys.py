"""Layers that attend to the keys of an earlier layer, as in Gemma 3n, see what that layer sees."""

import pytest
import torch
from inference import generate, generate_compressed, generate_stock, left_padded
from models import text_inputs, tiny_gemma3n
from transformers import DynamicCache

import kvcomp

RECIPES = ["flowmm", "ada-kv", "kvzip", "h2o", "pyramidkv"]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("recipe", RECIPES)
def test_the_prompt_is_not_changed_by_its_compression(recipe, attention):
    model, inputs = tiny_gemma3n(), text_inputs(50)
    model.set_attn_implementation(attention)
    stock = generate_stock(model, inputs)
    assert torch.equal(generate_compressed(model, inputs, recipe, 1.0)[0].sequences, stock.sequences)
    output, cache = generate_compressed(model, inputs, recipe, 0.4)
    torch.testing.assert_close(output.logits[0], stock.logits[0], atol=1e-5, rtol=1e-5)
    assert list(cache.compressed_layers) == [1, 3]  # the sliding ones are left alone, the last two hold nothing
    assert cache.report().untouched == (0, 2, 4, 5)
    assert sum(layer.slots[0] for layer in cache.report().layers) == 2 * (20 + 7)


@pytest.mark.parametrize("trigger", ["prefill-end", "over-budget"])
@pytest.mark.parametrize("recipe", ["flowmm", "h2o"])
def test_a_row_of_a_batch_says_what_it_says_alone(recipe, trigger):
    model, rows = tiny_gemma3n(), [text_inputs(tokens, seed=tokens)["input_ids"] for tokens in (40, 14)]
    strategy = kvcomp.strategy(recipe, 0.4, trigger=trigger)
    together = generate_compressed(model, left_padded(rows), strategy)[0].sequences
    for place, row in enumerate(rows):
        alone = generate_compressed(model, {"input_ids": row}, strategy)[0].sequences
        assert torch.equal(together[place, 40:], alone[0, row.shape[1] :])


def test_decoded_tokens_of_all_layers_see_the_slots_that_are_held():
    """With the evicted tokens masked away, an uncompressed cache says the same."""
    model, ids = tiny_gemma3n(), text_inputs(40)["input_ids"]
    with kvcomp.compress(model, "streaming-llm", budget=0.5) as cache, torch.no_grad():
        model(input_ids=ids, past_key_values=cache)
        said = model(input_ids=torch.tensor([[5]]), past_key_values=cache).logits[0, -1]
    held = cache.layers[1].indices[0, 0].tolist()
    stock = DynamicCache(config=model.config)
    with torch.no_grad():
        model(input_ids=ids, past_key_values=stock)
        visible = torch.tensor([place in held for place in range(41)]).view(1, 1, 1, 41)
        window = torch.arange(41).view(1, 1, 1, 41) > 40 - 16
        width = stock.layers[0].keys.shape[2] + 1
        masks = {"full_attention": visible, "sliding_attention": window[..., -width:]}
        expected = model(input_ids=torch.tensor([[5]]), attention_mask=masks, past_key_values=stock).logits[0, -1]
    torch.testing.assert_close(said, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("recipe", ["flowmm", "ada-kv"])
def test_a_second_turn_goes_on(recipe):
    model, ids = tiny_gemma3n(), text_inputs(40)["input_ids"]
    with kvcomp.compress(model, recipe, budget=0.4) as cache:
        first = generate(model, {"input_ids": ids}, cache, 4).sequences
        turn = {"input_ids": torch.cat([first, text_inputs(9, seed=5)["input_ids"]], dim=1)}
        said = generate(model, turn, cache, 4)
    assert cache.report().layers[0].tokens == (40 + 4 + 9 + 3,)
    assert all(logits.isfinite().all() for logits in said.logits)
