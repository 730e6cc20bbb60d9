"""Recipes that hold every token in fewer bytes, and quantized stores under recipes that evict."""

import kvcomp_strategies.stores.quantized as quantized
import pytest
import torch
from inference import COMPRESSING, SHRINKING, generate, generate_compressed, generate_stock, left_padded, quiet_prefill
from kvcomp_strategies.cutting import AHEAD
from kvcomp_strategies.quantization import CHANNELS, TOKENS
from models import image_inputs, text_inputs, tiny_llama, tiny_qwen_vl

import kvcomp

TIGHT = 1.01  # a budget just above the smallest


def smallest(recipe: str, tokens: int, dtype: torch.dtype = torch.float32) -> float:
    """The smallest ratio of a recipe for a tiny Llama, as its error says."""
    with pytest.raises(kvcomp.BudgetError, match="the smallest budget is") as caught:
        quiet_prefill(tiny_llama().to(dtype), text_inputs(tokens), recipe, 0.01)
    assert caught.value.smallest is not None
    return caught.value.smallest


def test_the_recipes_that_keep_every_token() -> None:
    assert set(SHRINKING) >= {"gear", "kivi", "mikv", "minicache"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("recipe", SHRINKING)
def test_bytes_are_within_two_percent_of_the_budget_and_never_above(recipe, dtype):
    model, inputs = tiny_llama().to(dtype), text_inputs(200)
    least = smallest(recipe, 200, dtype)
    for budget in (least, least + 0.3 * (1 - least), 0.9):
        report = quiet_prefill(model, inputs, recipe, budget).report()
        assert report.allocated_bytes <= budget * report.full_bytes
        assert report.allocated_bytes >= (budget - 0.02) * report.full_bytes
        assert report.reserved_bytes == 0
        assert all(layer.slots == (200.0,) and layer.evicted == (0.0,) for layer in report.layers)


@pytest.mark.parametrize("tokens", [1, 2, 31, 120])
@pytest.mark.parametrize("recipe", SHRINKING)
def test_the_smallest_budget_is_accepted_and_a_little_less_is_not(recipe, tokens):
    least = smallest(recipe, tokens)
    assert round(least, 6) == least
    report = quiet_prefill(tiny_llama(), text_inputs(tokens), recipe, least).report()
    assert report.allocated_bytes <= least * report.full_bytes
    with pytest.raises(kvcomp.BudgetError):
        quiet_prefill(tiny_llama(), text_inputs(tokens), recipe, f"{least - 1e-6:.6f}")


@pytest.mark.parametrize("recipe", SHRINKING)
def test_budgets_in_bytes_and_tokens_are_bytes_too(recipe):
    model, inputs = tiny_llama(), text_inputs(150)
    full = quiet_prefill(model, inputs, "full", None).report().full_bytes
    for budget, limit in (({"bytes": int(0.87 * full)}, int(0.87 * full)), ({"tokens": 130}, 130 * full // 150)):
        taken = quiet_prefill(model, inputs, recipe, budget).report().allocated_bytes
        assert 0.98 * limit <= taken <= limit


@pytest.mark.parametrize("recipe", SHRINKING)
def test_a_row_in_a_padded_batch_is_what_it_is_alone(recipe):
    model, lengths = tiny_llama(), (70, 33, 110)
    rows = [text_inputs(length, seed=length) for length in lengths]
    budget = min(TIGHT * max(smallest(recipe, length) for length in lengths), 0.99)
    output, cache = generate_compressed(model, left_padded([row["input_ids"] for row in rows]), recipe, budget, new=40)
    alone = [generate_compressed(model, row, recipe, budget, new=40) for row in rows]
    for place, (single, _) in enumerate(alone):
        assert torch.equal(output.sequences[place, 110:], single.sequences[0, lengths[place] :])
    taken = [lone.report().allocated_bytes for _, lone in alone]
    assert cache.report().allocated_bytes == pytest.approx(sum(taken), rel=0.02)  # tiers are packed to whole bytes
    assert cache.report().allocated_bytes <= sum(taken)


@pytest.mark.parametrize("recipe", SHRINKING)
def test_decoding_goes_on_within_reach_of_the_stock_cache(recipe):
    model, inputs = tiny_qwen_vl(), image_inputs(images=6)
    stock = generate_stock(model, inputs, 60)
    output, cache = generate_compressed(model, inputs, recipe, 0.9, new=60)
    assert cache.get_seq_length() == stock.past_key_values.get_seq_length()
    assert cache.layers[0].indices[0, 0].tolist() == list(range(cache.get_seq_length()))
    first, other = output.logits[0], stock.logits[0]
    assert torch.allclose(first, other, atol=1e-4)  # the prefill attends in full precision


@pytest.mark.parametrize("recipe", SHRINKING)
def test_chunks_that_are_deferred_are_one_prompt(recipe):
    model, ids = tiny_llama(), text_inputs(90)["input_ids"]
    whole = quiet_prefill(model, {"input_ids": ids}, recipe, 0.9)
    with kvcomp.compress(model, recipe, budget=0.9, defer=True) as cache, torch.no_grad():
        for start in range(0, 90, 20):
            model(input_ids=ids[:, start : start + 20], past_key_values=cache)
        cache.finish()
    assert cache.report().allocated_bytes == whole.report().allocated_bytes
    for one, other in zip(cache.layers, whole.layers, strict=True):
        assert torch.allclose(one.keys, other.keys, atol=1e-5)


@pytest.mark.parametrize("recipe", SHRINKING)
def test_saved_restored_reordered_and_moved_caches_hold_the_same_codes(recipe, tmp_path):
    model = tiny_llama()
    rows = left_padded([text_inputs(tokens, seed=tokens)["input_ids"] for tokens in (90, 60)])
    with kvcomp.compress(model, recipe, budget=0.9) as cache, torch.no_grad():
        first = generate(model, rows, cache, 70).sequences
        cache.save(tmp_path / "cache.safetensors")
        loaded = kvcomp.load_cache(tmp_path / "cache.safetensors", model)
        assert loaded.report().layers == cache.report().layers
        snapshot, report = cache.snapshot(), cache.report()
        keys = [layer.keys for layer in cache.layers]
        turn = {"input_ids": torch.cat([first, text_inputs(5, batch=2)["input_ids"]], dim=1)}
        turn["attention_mask"] = torch.cat([rows["attention_mask"], torch.ones(2, 75, dtype=torch.long)], dim=1)
        assert torch.equal(generate(model, turn, loaded, 40).sequences, generate(model, turn, cache, 40).sequences)
        cache.restore(snapshot)
        assert cache.report() == report
        for layer in cache.layers:
            layer.offload()
            layer.prefetch()
        cache.batch_repeat_interleave(2)
        cache.reorder_cache(torch.tensor([2, 1]))
        for layer, before in zip(cache.layers, keys, strict=True):
            assert torch.equal(layer.keys, before[[1, 0]])
        assert cache.report().allocated_bytes == report.allocated_bytes


@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("recipe", SHRINKING)
def test_a_crop_leaves_the_codes_of_what_stays_alone(recipe, rows):
    model = tiny_llama()
    inputs = left_padded([text_inputs(tokens, seed=tokens)["input_ids"] for tokens in (90, 60)[:rows]])
    with kvcomp.compress(model, recipe, budget=0.9) as cache, torch.no_grad():
        generate(model, inputs, cache, 8)
        indices = [layer.indices for layer in cache.layers]
        before = [numbers[:, :, :-3] for layer in cache.layers for numbers in layer.storage.read()]
        report = cache.report()
        cache.crop(-3)
        after = [numbers for layer in cache.layers for numbers in layer.storage.read()]
        assert all(torch.equal(*pair) for pair in zip(before, after, strict=True))
        assert cache.get_seq_length() == 94
        assert cache.report().allocated_bytes < report.allocated_bytes
        for token in (5, 9, 33):
            model(input_ids=torch.full((rows, 1), token), past_key_values=cache)
        assert all(torch.equal(layer.indices, held) for layer, held in zip(cache.layers, indices, strict=True))


@pytest.mark.parametrize("recipe", SHRINKING)
def test_a_crop_into_codes_is_refused_and_changes_nothing(recipe):
    model = tiny_llama()
    with kvcomp.compress(model, recipe, budget=0.8) as cache:
        generate(model, text_inputs(120), cache, 50)
        report = cache.report()
        with pytest.raises(kvcomp.UnsupportedUseError, match="were to be removed: slots that stay would be coded anew"):
            cache.crop(-160)
    assert cache.report() == report
    assert cache.get_seq_length() == 169


def test_a_cache_that_was_not_coded_yet_can_be_cropped_anywhere():
    model, inputs = tiny_llama(), text_inputs(60)
    with kvcomp.compress(model, "kivi", budget=1.0) as cache:
        generate(model, inputs, cache, 5)
        cache.crop(-30)
        again = generate(model, {"input_ids": inputs["input_ids"][:, :40]}, cache, 5)
    whole = generate_stock(model, {"input_ids": inputs["input_ids"][:, :40]}, 5)
    torch.testing.assert_close(torch.stack(again.logits), torch.stack(whole.logits), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", ["llama", "qwen2.5-vl"])
@pytest.mark.parametrize("recipe", COMPRESSING)
def test_any_recipe_can_be_quantized_after_merging(recipe, family):
    model, inputs = (tiny_llama(), text_inputs(80)) if family == "llama" else (tiny_qwen_vl(), image_inputs(images=6))
    store = {"use": "quantized", "bits": 2, "group": 8, "residual": 16}
    dense = quiet_prefill(model, inputs, recipe, 0.5)
    with kvcomp.compress(model, recipe, budget=0.5, store=store) as cache:
        with torch.no_grad():
            model(**inputs, past_key_values=cache)
        by_hand = 0
        for layer, before in zip(cache.layers, dense.layers, strict=True):
            assert torch.equal(layer.indices, before.indices)
            assert (layer.keys - before.keys).abs().max() <= 0.5 * (before.keys.amax() - before.keys.amin())
            for slots in (before.indices >= 0).sum(dim=-1).flatten().tolist():
                coded, old = slots - slots % 16, max(slots - 16, 0)
                by_hand += coded * 4 + 2 * coded // 8 * 16 * 4 + (slots - coded) * 16 * 4  # codes, scales, as they are
                by_hand += old * 4 + 2 * old * 2 * 4 + (slots - old) * 16 * 4
        report = cache.report()
        assert report.allocated_bytes == by_hand
        assert report.reserved_bytes == 0
    output, cache = generate_compressed(model, inputs, kvcomp.strategy(recipe, 0.5, store=store), new=40)
    assert all(logits.isfinite().all() for logits in output.logits)
    assert cache.report().allocated_bytes < 0.5 * cache.report().full_bytes


@pytest.mark.parametrize("recipe", COMPRESSING)
def test_a_quantized_store_with_bits_is_quantized_at_budget_one(recipe):
    model, inputs = tiny_llama(), text_inputs(64)
    report = quiet_prefill(model, inputs, kvcomp.strategy(recipe, store={"use": "quantized", "bits": 8}), 1.0).report()
    assert report.allocated_bytes < 0.8 * report.full_bytes
    assert report.layers[0].slots == (64.0,)


@pytest.mark.parametrize("budget", [0.03, 0.1, 0.2, 0.6, {"bytes": 20000}])
def test_a_recipe_can_evict_down_to_the_bytes(budget):
    strategy = kvcomp.strategy("kivi", budget, scorer="received-attention", selector="top-k", **{"store.evict": True})
    report = quiet_prefill(tiny_llama(), text_inputs(300), strategy, None).report()
    limit = budget["bytes"] if isinstance(budget, dict) else budget * report.full_bytes
    assert 0.98 * limit <= report.allocated_bytes <= limit
    evicted = report.layers[0].evicted[0] > 0
    assert evicted == (limit < 0.19 * report.full_bytes)


def test_an_eviction_method_and_a_quantizer_meet_at_equal_memory():
    model, inputs = tiny_llama(), text_inputs(256)
    taken = {
        recipe: quiet_prefill(model, inputs, recipe, {"bytes": 100_000}).report().allocated_bytes
        for recipe in ("h2o", "kivi", "mikv")
    }
    assert all(98_000 <= size <= 100_000 for size in taken.values()), taken


def test_one_decoded_step_codes_blocks_and_not_the_whole_cache(monkeypatch):
    model, coded = tiny_llama(), []
    original = quantized.Coded.of
    monkeypatch.setattr(
        quantized.Coded,
        "of",
        lambda numbers, *how: coded.append((how[0].axis, numbers.shape[1])) or original(numbers, *how),
    )
    with kvcomp.compress(model, "kivi", budget=0.3) as cache:
        generate(model, text_inputs(200), cache, 60)
    prompt = [size for _, size in coded if size > 32]
    assert len(prompt) == 6  # keys and values of three layers
    decoded = [(axis, size) for axis, size in coded if size <= 32]
    assert {size for axis, size in decoded if axis == TOKENS} == {32}
    assert 1 < max(size for axis, size in decoded if axis == CHANNELS) <= AHEAD
    assert 3 * 58 <= sum(size for axis, size in decoded if axis == CHANNELS) < 3 * (58 + AHEAD)  # each value once


BAD = {
    "no bits": ({"store": "quantized"}, "told how precise it is .* or told to evict"),
    "pairs": ({"store": "layer-paired"}, "it works without a selector only: leave selector and scorer out"),
    "nothing to evict by": (
        {"selector": None, "scorer": None, "store": {"use": "quantized", "evict": True}},
        "needs a scorer and a selector",
    ),
    "no scores": ({"scorer": None, "store": {"use": "mixed", "bits": 2}}, "store: 'mixed' needs scores"),
    "odd residual": ({"store": {"use": "quantized", "bits": 2, "residual": 40}}, "multiple of group"),
}


@pytest.mark.parametrize("case", BAD)
def test_impossible_stores_are_refused_when_built(case):
    overrides, message = BAD[case]
    with pytest.raises(kvcomp.ConfigError, match=message):
        kvcomp.strategy("h2o", **overrides)


@pytest.mark.parametrize("allocator", ["variance", "entropy", "sparsity", "protected-first", "global"])
@pytest.mark.parametrize("recipe", SHRINKING)
def test_an_allocator_has_nothing_to_share_out_where_every_token_stays(recipe, allocator):
    model, inputs = tiny_llama(), text_inputs(64)
    plain, other = (
        quiet_prefill(model, inputs, kvcomp.strategy(recipe, 0.9, allocator=name), None)
        for name in ("uniform", allocator)
    )
    assert other.report().allocated_bytes == plain.report().allocated_bytes
    assert all(torch.equal(a.keys, b.keys) for a, b in zip(other.layers, plain.layers, strict=True))


@pytest.mark.parametrize("recipe", SHRINKING)
def test_a_merger_has_nothing_to_merge_where_every_token_stays(recipe):
    model = tiny_llama()
    rows = left_padded([text_inputs(tokens, seed=tokens)["input_ids"] for tokens in (40, 64)])
    merger = {"use": "unrotated", "merger": "mean"}
    plain, other = (
        quiet_prefill(model, rows, kvcomp.strategy(recipe, 0.9, merger=name), None) for name in ("drop", merger)
    )
    assert [layer.merged for layer in other.report().layers] == [(0.0, 0.0)] * 3
    assert all(torch.equal(a.keys, b.keys) for a, b in zip(other.layers, plain.layers, strict=True))
