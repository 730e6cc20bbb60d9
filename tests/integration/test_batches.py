"""A row of a batch gives what it gives alone."""

import pytest
import torch
from inference import COMPRESSING, generate_compressed, generate_stock, left_padded
from models import text_inputs, tiny_llama

import kvcomp

LENGTHS = (90, 37, 12)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("recipe", COMPRESSING)
def test_left_padded_rows_keep_and_say_what_they_do_alone(recipe, attention):
    model = tiny_llama()
    model.set_attn_implementation(attention)
    rows = [text_inputs(tokens, seed=tokens)["input_ids"] for tokens in LENGTHS]
    batch, together = generate_compressed(model, left_padded(rows), recipe, 0.3)
    for place, row in enumerate(rows):
        single = {"input_ids": row, "attention_mask": torch.ones_like(row)}
        output, alone = generate_compressed(model, single, recipe, 0.3)
        assert torch.equal(batch.sequences[place, max(LENGTHS) :], output.sequences[0, row.shape[1] :])
        for layer, reference in zip(together.layers, alone.layers, strict=True):
            for head in range(2):
                kept, alone_kept = layer.indices[place, head], reference.indices[0, head]
                assert kept[kept >= 0].tolist() == alone_kept[alone_kept >= 0].tolist()
        mine, reference = together.report().layers[0], alone.report().layers[0]
        assert (mine.slots[place], mine.merged[place]) == (reference.slots[0], reference.merged[0])


def test_beams_and_samples_at_budget_one_are_those_of_the_stock_cache():
    model, inputs = tiny_llama(), text_inputs(40)
    settings = {"num_beams": 3, "num_return_sequences": 2, "output_logits": False}
    stock = generate_stock(model, inputs, **settings)
    assert torch.equal(generate_compressed(model, inputs, "flowmm", 1.0, **settings)[0].sequences, stock.sequences)
    settings = {"do_sample": True, "num_return_sequences": 4, "output_logits": False}
    torch.manual_seed(1)
    stock = generate_stock(model, inputs, **settings)
    torch.manual_seed(1)
    assert torch.equal(generate_compressed(model, inputs, "h2o", 1.0, **settings)[0].sequences, stock.sequences)


def test_beams_of_a_padded_batch_are_those_of_each_row():
    model = tiny_llama()
    rows = [text_inputs(tokens, seed=tokens)["input_ids"] for tokens in (50, 20)]
    settings = {"num_beams": 3, "output_logits": False}
    together = generate_compressed(model, left_padded(rows), "flowmm", 0.3, **settings)[0].sequences
    for place, row in enumerate(rows):
        alone = generate_compressed(model, {"input_ids": row}, "flowmm", 0.3, **settings)[0].sequences
        assert torch.equal(together[place, 50:], alone[0, row.shape[1] :])


def test_rows_can_be_selected_and_repeated():
    model = tiny_llama()
    rows = [text_inputs(tokens, seed=tokens)["input_ids"] for tokens in (40, 20)]
    with kvcomp.compress(model, "snapkv", budget=0.5) as cache, torch.no_grad():
        model(**left_padded(rows), past_key_values=cache)
    indices, counts = cache.layers[0].indices, cache.layers[0].counts
    cache.batch_repeat_interleave(2)
    assert torch.equal(cache.layers[0].indices, indices.repeat_interleave(2, dim=0))
    cache.batch_select_indices(torch.tensor([3]))
    assert torch.equal(cache.layers[0].counts, counts[1:, :, :10])
    assert cache.report().layers[0].tokens == (20,)
