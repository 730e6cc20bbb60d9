"""Later turns, chunks, deferred compression, and a cache that is cropped."""

import pytest
import torch
from inference import COMPRESSING, RECIPES, generate, generate_stock, kept, left_padded
from models import text_inputs, tiny_llama

import kvcomp


def _two_turns(model, recipe, budget, **overrides):
    prompt = text_inputs(60)["input_ids"]
    with kvcomp.compress(model, recipe, budget=budget, **overrides) as cache:
        first = generate(model, {"input_ids": prompt}, cache, 6).sequences
        everything = torch.cat([first, text_inputs(9, seed=5)["input_ids"]], dim=1)
        second = generate(model, {"input_ids": everything}, cache, 6).sequences
    return everything, second, cache


@pytest.mark.parametrize("recipe", RECIPES)
def test_two_turns_at_budget_one_are_one_run(recipe):
    model = tiny_llama()
    everything, second, _ = _two_turns(model, recipe, 1.0)
    assert torch.equal(second, generate_stock(model, {"input_ids": everything}, 6).sequences)


@pytest.mark.parametrize("recipe", COMPRESSING)
def test_the_budget_of_a_later_turn_is_of_all_tokens_seen(recipe):
    _, _, cache = _two_turns(tiny_llama(), recipe, 0.4)
    counts = kept(cache)
    # the second turn was compressed at 75 tokens, 5 more were decoded
    assert counts.sum() == counts.numel() * (75 * 2 // 5 + 5)
    for layer in cache.layers:
        indices = layer.indices[0, 0]
        assert indices[indices >= 0][-5:].tolist() == [75, 76, 77, 78, 79]
    for report in cache.report().layers:
        assert report.tokens == (80,)  # 60 + 6 + 9 + 6, the last one never fed
        assert sum(report.slots + report.merged + report.evicted) == pytest.approx(80)


def test_turns_append_leaves_later_turns_uncompressed():
    _, _, cache = _two_turns(tiny_llama(), "snapkv", 0.4, turns="append")
    assert cache.report().layers[0].slots == (24 + 20,)
    assert cache.report().turns == "append"


@pytest.mark.parametrize("recipe", COMPRESSING)
def test_deferred_chunks_are_one_chunk(recipe):
    model, inputs = tiny_llama(), text_inputs(60)
    with kvcomp.compress(model, recipe, budget=0.3) as whole:
        reference = generate(model, inputs, whole).sequences
    with kvcomp.compress(model, recipe, budget=0.3, defer=True) as chunked:
        output = generate(model, inputs, chunked, prefill_chunk_size=16).sequences
    assert torch.equal(output, reference)
    assert torch.equal(chunked.layers[2].indices, whole.layers[2].indices)


@pytest.mark.parametrize("recipe", COMPRESSING)
def test_chunks_keep_as_many_slots_as_one_chunk(recipe):
    """The first two chunks hold nothing but padding of the shorter row."""
    model, inputs = tiny_llama(), left_padded([text_inputs(tokens)["input_ids"] for tokens in (70, 23)])
    with kvcomp.compress(model, recipe, budget=0.3) as whole:
        generate(model, inputs, whole)
    with kvcomp.compress(model, recipe, budget=0.3) as chunked:
        generate(model, inputs, chunked, prefill_chunk_size=20)
    assert kept(chunked).sum(dim=(0, 2)).tolist() == kept(whole).sum(dim=(0, 2)).tolist()
    if recipe == "streaming-llm":
        # the shorter row's first tokens had so few slots that not all sinks stayed
        assert torch.equal(chunked.layers[0].indices[0], whole.layers[0].indices[0])


def test_finish_compresses_what_was_deferred():
    model, inputs = tiny_llama(), text_inputs(60)
    with kvcomp.compress(model, "flowmm", budget=0.2, defer=True) as cache, torch.no_grad():
        model(**inputs, past_key_values=cache)
        assert cache.layers[0].keys.shape[2] == 60
        cache.finish()
        assert cache.layers[0].keys.shape[2] == 12


def test_accumulated_attention_goes_on_in_the_next_turn():
    model = tiny_llama()
    ids = text_inputs(40)["input_ids"]
    with kvcomp.compress(model, "h2o", budget={"tokens": 60}) as cache, torch.no_grad():
        model(input_ids=ids[:, :25], past_key_values=cache)
        model(input_ids=ids[:, 25:], past_key_values=cache)
    carried = next(iter(cache.layers[0].carried.values()))
    with kvcomp.compress(model, "h2o", budget={"tokens": 60}) as whole, torch.no_grad():
        model(input_ids=ids, past_key_values=whole)
    assert torch.allclose(carried, next(iter(whole.layers[0].carried.values())), atol=1e-5)


@pytest.mark.parametrize("target", [62, 30])
def test_crop_removes_the_last_columns(target):
    model = tiny_llama()
    with kvcomp.compress(model, "snapkv", budget=0.5) as cache:
        generate(model, text_inputs(60), cache, 6)
        kept = cache.layers[0].indices.clone()
        cache.crop(target - cache.get_seq_length())
        assert cache.get_seq_length() == target
        for head in range(2):
            left = cache.layers[0].indices[0, head]
            assert left[left >= 0].tolist() == [index for index in kept[0, head].tolist() if index < target]
        with torch.no_grad():
            model(input_ids=torch.tensor([[5]]), past_key_values=cache)
    assert cache.layers[0].indices.amax() == target


def test_reset_makes_a_cache_new():
    model, inputs = tiny_llama(), text_inputs(50)
    with kvcomp.compress(model, "flowmm", budget=0.3) as cache:
        first = generate(model, inputs, cache).sequences
        cache.reset()
        assert cache.get_seq_length() == 0
        assert torch.equal(generate(model, inputs, cache).sequences, first)


def test_crop_keeps_what_was_decoded_in_rows_that_hold_fewer_slots():
    model = tiny_llama()
    rows = left_padded([text_inputs(tokens, seed=tokens)["input_ids"] for tokens in (50, 20)])
    with kvcomp.compress(model, "streaming-llm", budget=0.2) as cache:
        generate(model, rows, cache, 6)
        assert cache.layers[0].indices[1, 0].tolist()[:9] == [16, 17, 18, 19, 20, 21, 22, 23, 24]
        cache.crop(-1)
    assert cache.layers[0].indices[1, 0].tolist()[:8] == [16, 17, 18, 19, 20, 21, 22, 23]
    assert cache.layers[0].indices[0, 0].tolist()[-5:] == [49, 50, 51, 52, 53]


def test_empty_slots_stand_at_the_end_of_a_row_and_are_zero():
    model = tiny_llama()
    rows = left_padded([text_inputs(tokens, seed=tokens)["input_ids"] for tokens in (50, 20)])
    with kvcomp.compress(model, "h2o", budget=0.2) as cache:
        generate(model, rows, cache, 5)
    layer = cache.layers[0]
    assert layer.indices[1].ge(0).sum(-1).tolist() == [8, 8]
    assert (layer.indices[1, :, 8:] == -1).all()
    assert not layer.keys[1, :, 8:].any()
    assert not layer.counts[1, :, 8:].any()


def test_sums_of_cropped_tokens_are_forgotten():
    model, ids = tiny_llama(), text_inputs(60)["input_ids"]
    with kvcomp.compress(model, "h2o", budget=0.5) as cache, torch.no_grad():
        model(input_ids=ids, past_key_values=cache)
        model(input_ids=ids[:, :1], past_key_values=cache)
        cache.crop(-21)
        (sums,) = cache.layers[0].carried.values()
    assert sums.shape[2] == cache.layers[0].keys.shape[2]


def test_a_cache_that_waits_to_be_compressed_is_not_cropped():
    model = tiny_llama()
    with kvcomp.compress(model, "snapkv", budget=0.3, defer=True) as cache, torch.no_grad():
        model(**text_inputs(40), past_key_values=cache)
        with pytest.raises(kvcomp.UnsupportedUseError, match=r"cache\.finish"):
            cache.crop(-5)
        cache.batch_repeat_interleave(2)  # compresses first
    assert cache.layers[0].keys.shape[:3] == (2, 2, 12)


def test_beams_of_a_deferred_prompt_are_those_of_one_that_was_not():
    model, inputs = tiny_llama(), text_inputs(40)
    settings = {"num_beams": 3, "output_logits": False}
    with kvcomp.compress(model, "h2o", budget=0.35) as cache:
        expected = generate(model, inputs, cache, **settings).sequences
    with kvcomp.compress(model, "h2o", budget=0.35, defer=True) as cache:
        assert torch.equal(generate(model, inputs, cache, **settings).sequences, expected)


def test_a_cache_may_leave_inference_mode():
    model, inputs = tiny_llama(), text_inputs(30)
    with kvcomp.compress(model, "snapkv", budget=0.5) as cache:
        with torch.inference_mode():
            model(**inputs, past_key_values=cache)
            model(input_ids=inputs["input_ids"][:, :1], past_key_values=cache)
        with torch.no_grad():
            model(input_ids=inputs["input_ids"][:, :1], past_key_values=cache)
    assert cache.layers[0].keys.shape[2] == 17


def test_a_padded_cache_that_keeps_everything_goes_on_after_a_crop():
    model = tiny_llama()
    rows = left_padded([text_inputs(tokens, seed=tokens)["input_ids"] for tokens in (20, 12)])
    with kvcomp.compress(model, "full") as cache:
        said = generate(model, rows, cache, 3).sequences
        cache.crop(-1)
        more = torch.cat([said[:, :-2], text_inputs(4, seed=1, batch=2)["input_ids"]], dim=1)
        mask = torch.cat([rows["attention_mask"], torch.ones(2, 5, dtype=torch.long)], dim=1)
        output = generate(model, {"input_ids": more, "attention_mask": mask}, cache, 3)
    stock = generate_stock(model, {"input_ids": more, "attention_mask": mask}, 3)
    assert torch.allclose(output.logits[0], stock.logits[0], atol=1e-5)


def test_room_is_reserved_after_the_last_chunk_too():
    model, inputs = tiny_llama(), text_inputs(60)
    with kvcomp.compress(model, "snapkv", budget=0.25, reserve=100) as cache:
        generate(model, inputs, cache, 2, prefill_chunk_size=20)
    assert cache.report().reserved_bytes == 3 * 2 * 2 * 16 * 4 * 99


def test_rho_of_the_first_turn_stays_where_later_ones_are_appended():
    _, _, cache = _two_turns(tiny_llama(), "flowmm", 0.4, turns="append")
    assert cache.layers[0].rho is not None


def test_a_row_of_padding_alone_does_no_harm():
    model = tiny_llama()
    rows = left_padded([text_inputs(20)["input_ids"], text_inputs(1)["input_ids"]])
    rows["attention_mask"][1] = 0
    with kvcomp.compress(model, "h2o", budget=0.5) as cache, torch.no_grad():
        model(**rows, past_key_values=cache)
    assert cache.report().layers[0].slots == (10.0, 0.0)
