"""Slots and bytes are exactly what was asked for, and the report says what the storages hold."""

import gc
from fractions import Fraction

import pytest
import torch
from inference import COMPRESSING, generate, kept, left_padded, quiet_prefill
from models import image_inputs, text_inputs, tiny_llama, tiny_qwen3, tiny_qwen_vl

import kvcomp
from kvcomp.core.registry import registry


def stored_slots(cache: kvcomp.CompressedCache) -> int:
    """How many slots are paid for: the store `dense` pads the heads of a layer to the longest."""
    counts = kept(cache)
    dense = cache.strategy.store.use == "dense"
    return int(counts.amax(dim=2).sum() * counts.shape[2] if dense else counts.sum())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("recipe", COMPRESSING)
def test_all_heads_of_all_layers_keep_exactly_the_budget(recipe, dtype):
    model = tiny_llama().to(dtype)
    for tokens in (9, 10, 37, 120):
        for budget in ("0.05", "0.1", "0.2", "0.35", "0.7"):
            cache = quiet_prefill(model, text_inputs(tokens), recipe, budget)
            slots = max(1, int(Fraction(budget) * tokens))
            counts = kept(cache)
            assert counts.sum() == 3 * 2 * slots
            assert counts.min() >= 1
            for layer, held in zip(cache.layers, counts, strict=True):
                assert layer.keys.shape == layer.values.shape == (1, 2, held.max(), 16)
                assert layer.keys.dtype == dtype
                filled = layer.indices >= 0
                assert (filled == (torch.arange(filled.shape[2]) < held[..., None])).all()
                assert ((layer.indices.diff(dim=-1) > 0) | ~filled[..., 1:]).all()
                assert layer.indices.max() < tokens
                assert layer.counts.sum(-1).max() <= tokens * (1 + 1e-5)  # shared tokens count in fractions
            report = cache.report()
            slot_bytes = 2 * 16 * dtype.itemsize
            assert report.allocated_bytes == 3 * 2 * slots * slot_bytes
            assert report.allocated_bytes + report.reserved_bytes <= 1.02 * stored_slots(cache) * slot_bytes
            assert report.full_bytes == 3 * 2 * tokens * 2 * 16 * dtype.itemsize


@pytest.mark.parametrize("recipe", [entry.name for entry in registry.entries("recipe")])
def test_a_recipe_as_it_comes_reads_every_prompt(recipe):
    model = tiny_llama()
    for tokens in (1, 2, 5, 16, 100):
        cache = quiet_prefill(model, text_inputs(tokens), recipe, None)
        assert kept(cache).min() >= 1


@pytest.mark.parametrize("recipe", COMPRESSING)
def test_images_are_budgeted_like_any_token(recipe):
    inputs = image_inputs(images=4)
    tokens = inputs["input_ids"].shape[1]
    cache = quiet_prefill(tiny_qwen_vl(), inputs, recipe, 0.2)
    assert kept(cache).sum() == kept(cache).numel() * (tokens // 5)
    for layer in cache.report().layers:
        assert layer.tokens == (tokens,)
        assert layer.slots[0] + layer.merged[0] + layer.evicted[0] == pytest.approx(tokens)


def test_budgets_in_tokens_and_bytes():
    model, inputs = tiny_qwen3(), text_inputs(100)
    assert quiet_prefill(model, inputs, "snapkv", {"tokens": 25}).layers[0].keys.shape[2] == 25
    slot_bytes = 3 * 2 * 2 * 32 * 4  # layers, KV heads, keys and values, head_dim, float32
    cache = quiet_prefill(model, inputs, "snapkv", {"bytes": 30 * slot_bytes + 17})
    assert cache.layers[0].keys.shape[2] == 30
    assert cache.report().allocated_bytes == 30 * slot_bytes


def _alive() -> dict[int, int]:
    gc.collect()
    plain = (torch.Tensor, torch.nn.Parameter)  # tensors that other tests pretend have no storage to ask
    tensors = [item for item in gc.get_objects() if type(item) in plain]
    return {
        t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors if t.untyped_storage().nbytes()
    }


@pytest.mark.parametrize("new", [1, 6])
@pytest.mark.parametrize("recipe", ["flowmm", "h2o", "random", "ada-kv"])
def test_the_report_accounts_for_every_storage_that_a_request_leaves_alive(recipe, new):
    model, inputs = tiny_llama(), text_inputs(200)
    with kvcomp.compress(model, recipe, budget=0.2) as cache:  # once before: what transformers itself keeps
        generate(model, inputs, cache, new)
    del cache
    before = _alive()
    with kvcomp.compress(model, recipe, budget=0.2) as cache:
        generate(model, inputs, cache, new)
    left = {pointer: size for pointer, size in _alive().items() if pointer not in before}
    report = cache.report()
    assert sum(left.values()) == report.allocated_bytes + report.reserved_bytes + report.bookkeeping_bytes


def test_room_for_decoding_is_reserved_once_where_its_size_is_known():
    model, inputs = tiny_llama(), text_inputs(100)
    with kvcomp.compress(model, "snapkv", budget=0.2, reserve=32) as cache:
        generate(model, inputs, cache, 2)
        pointer = cache.layers[0].keys.data_ptr()
        for token in range(30):
            with torch.no_grad():
                model(input_ids=torch.tensor([[token + 2]]), past_key_values=cache)
        assert cache.layers[0].keys.data_ptr() == pointer
    report = cache.report()
    assert report.reserved_bytes == 3 * 2 * 2 * 16 * 4  # 32 slots were reserved, 31 are filled


def test_appending_copies_each_slot_a_bounded_number_of_times():
    model, inputs = tiny_llama(), text_inputs(100)
    moves = 0
    with kvcomp.compress(model, "snapkv", budget=0.5) as cache, torch.no_grad():
        model(**inputs, past_key_values=cache)
        pointer = cache.layers[0].keys.data_ptr()
        for token in range(150):
            model(input_ids=torch.tensor([[token % 70 + 2]]), past_key_values=cache)
            moves += cache.layers[0].keys.data_ptr() != pointer
            pointer = cache.layers[0].keys.data_ptr()
    assert cache.layers[0].keys.shape[2] == 200
    assert moves <= 8


def test_bookkeeping_is_at_most_five_percent_at_head_dim_128_in_bfloat16():
    config = tiny_llama().config
    config.head_dim = 128
    torch.manual_seed(0)
    model = type(tiny_llama())(config).to(torch.bfloat16).eval()
    report = quiet_prefill(model, text_inputs(400), "flowmm", 0.2).report()
    assert report.bookkeeping_bytes <= 0.05 * report.allocated_bytes


def test_bookkeeping_grows_with_tokens_and_not_with_their_square():
    sizes = []
    for tokens in (100, 200):
        rows = left_padded([text_inputs(length)["input_ids"] for length in (tokens, tokens // 2)])
        sizes.append(quiet_prefill(tiny_llama(), rows, "full", None).report().bookkeeping_bytes)
    assert sizes[1] <= 2.1 * sizes[0]
