"""Packed heads give the tokens and logits of padded ones, and take the bytes of what they hold."""

from __future__ import annotations

import types
from collections.abc import Iterator

import pytest
import torch
from inference import COMPRESSING, generate, generate_compressed, generate_stock, left_padded
from models import TEXT, image_inputs, text_inputs, tiny_gemma2, tiny_llama, tiny_qwen3, tiny_qwen_vl
from skewed import Skewed, skewed
from transformers import GptOssConfig, GptOssForCausalLM, PreTrainedModel

import kvcomp
from kvcomp.core.hookspecs import hookimpl
from kvcomp.core.registry import registry
from kvcomp.runtime.forward import Logits


@pytest.fixture
def allocator() -> Iterator[None]:
    """The tests' allocator, known by name, as a file needs it."""
    plugin = types.ModuleType("skewed_plugin")
    plugin.kvcomp_parts = hookimpl(lambda: [Skewed])
    registry.register(plugin, name="skewed", package="kvcomp-tests")
    yield
    registry.unregister("skewed")


def tiny_gpt_oss() -> PreTrainedModel:
    """Return a GPT-OSS whose heads have sinks, which take probability and have no key."""
    torch.manual_seed(0)
    layers = {"layer_types": ["full_attention"] * 3, "head_dim": 16, "num_local_experts": 2, "num_experts_per_tok": 1}
    model = GptOssForCausalLM(GptOssConfig(**TEXT, **layers)).eval()
    for layer in model.model.layers:
        torch.nn.init.normal_(layer.self_attn.sinks, mean=2.0)
    return model


def batch_of(*lengths: int) -> dict[str, torch.Tensor]:
    return left_padded([text_inputs(tokens, seed=tokens)["input_ids"] for tokens in lengths])


MODELS = {
    "llama": (tiny_llama, "sdpa", text_inputs(70)),
    "llama-eager": (tiny_llama, "eager", text_inputs(70)),
    "qwen3-batch": (tiny_qwen3, "sdpa", batch_of(70, 31, 12)),
    "qwen3-batch-eager": (tiny_qwen3, "eager", batch_of(70, 31, 12)),
    "qwen2.5-vl": (tiny_qwen_vl, "sdpa", image_inputs()),
    "qwen2.5-vl-eager": (tiny_qwen_vl, "eager", image_inputs()),
    "gemma2-softcap": (tiny_gemma2, "eager", text_inputs(70)),
    "gpt-oss-sinks": (tiny_gpt_oss, "eager", text_inputs(70)),
}


def both(model, inputs, recipe="flowmm", budget=0.3, new=8, **overrides):
    """Return output and cache with packed heads, then with padded ones."""
    return [
        generate_compressed(model, inputs, skewed(recipe, budget, store, **overrides), new=new)
        for store in ("ragged", "dense")
    ]


def assert_same_answer(packed, padded):
    assert torch.equal(packed.sequences, padded.sequences)
    for mine, reference in zip(packed.logits, padded.logits, strict=True):
        assert torch.allclose(mine, reference, atol=2e-5)


def assert_same_slots(packed, padded):
    for mine, reference in zip(packed.layers, padded.layers, strict=True):
        assert mine.storage.packed() is not None
        assert torch.equal(mine.indices, reference.indices)
        assert torch.equal(mine.counts, reference.counts)
        assert torch.allclose(mine.keys, reference.keys, atol=1e-5)
        assert torch.allclose(mine.values, reference.values, atol=1e-5)


@pytest.mark.parametrize("mass_preserving", [False, True], ids=["", "mass"])
@pytest.mark.parametrize("family", MODELS)
def test_packed_heads_answer_as_padded_ones(family, mass_preserving):
    build, attention, inputs = MODELS[family]
    model = build()
    model.set_attn_implementation(attention)
    for recipe in ("flowmm", "snapkv", "h2o"):
        mine, reference = both(model, inputs, recipe, mass_preserving=mass_preserving)
        assert_same_answer(mine[0], reference[0])
        assert_same_slots(mine[1], reference[1])


@pytest.mark.parametrize("recipe", COMPRESSING)
def test_every_recipe_can_pack_its_heads(recipe):
    model, inputs = tiny_llama(), text_inputs(70)
    mine, reference = both(model, inputs, recipe, new=4)
    assert_same_answer(mine[0], reference[0])
    assert_same_slots(mine[1], reference[1])


def test_softcap_and_sinks_matter_to_what_is_compared():
    """The same models without them give other logits, so that the test above sees whether they are there."""
    for build in (tiny_gemma2, tiny_gpt_oss):
        model, inputs = build(), text_inputs(70)
        model.set_attn_implementation("eager")
        with kvcomp.compress(model, skewed("snapkv", 0.3)) as cache, torch.no_grad():
            model(**inputs, past_key_values=cache)
            snapshot = cache.snapshot()
            before = model(input_ids=torch.tensor([[5]]), past_key_values=cache).logits
            cache.restore(snapshot)
            for layer in model.model.layers:
                layer.self_attn.attn_logit_softcapping = None
                layer.self_attn.sinks = torch.nn.Parameter(torch.full((4,), -1e4))
            after = model(input_ids=torch.tensor([[5]]), past_key_values=cache).logits
        assert not torch.allclose(after, before, atol=1e-3)


@pytest.mark.parametrize("turns", ["recompress", "append"])
def test_a_saved_cache_goes_on_as_if_it_had_not_been_saved(turns, tmp_path, allocator):
    model, inputs = tiny_llama(), batch_of(60, 25)
    asked = torch.tensor([[0, 0, 7, 8, 9], [11, 12, 13, 14, 15]])
    with kvcomp.compress(model, skewed("h2o", 0.4, turns=turns)) as cache:
        first = generate(model, inputs, cache, 4).sequences
        mask = torch.cat([inputs["attention_mask"], torch.ones(2, 4, dtype=torch.long), (asked > 0).long()], dim=1)
        turn = {"input_ids": torch.cat([first, asked], dim=1), "attention_mask": mask}
        second = generate(model, turn, cache, 3).sequences
        cache.save(tmp_path / "cache.safetensors")
        loaded = kvcomp.load_cache(tmp_path / "cache.safetensors", model)
        assert loaded.report().layers == cache.report().layers
        assert_same_slots(loaded, cache)
        assert sum(loaded.layers[0].storage.packed().layout.lengths) == int((loaded.layers[0].indices >= 0).sum())
        third = {"input_ids": torch.cat([second, torch.tensor([[5, 6]] * 2)], dim=1)}
        third["attention_mask"] = torch.cat([mask, torch.ones(2, 5, dtype=torch.long)], dim=1)
        assert_same_answer(generate(model, third, loaded), generate(model, third, cache))


@pytest.mark.parametrize("turns", ["recompress", "append"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_later_turns_answer_as_with_padded_heads(attention, turns):
    model = tiny_llama()
    model.set_attn_implementation(attention)
    inputs = batch_of(60, 25)
    asked = torch.tensor([[0, 0, 7, 8, 9], [11, 12, 13, 14, 15]])  # pads in the middle of the first row
    answers, caches = [], []
    for store in ("ragged", "dense"):
        with kvcomp.compress(model, skewed("flowmm", 0.4, store, turns=turns)) as cache:
            first = generate(model, inputs, cache, 4).sequences
            turn = {"input_ids": torch.cat([first, asked], dim=1)}
            mask = torch.cat([inputs["attention_mask"], torch.ones(2, 4, dtype=torch.long), (asked > 0).long()], dim=1)
            answers.append(generate(model, turn | {"attention_mask": mask}, cache, 6))
            caches.append(cache)
    assert_same_answer(*answers)
    assert_same_slots(*caches)


def test_a_later_turn_without_padding_needs_no_mask_to_decode():
    """With `append`, decoding goes over each head's own slots, and answers as with padded heads."""
    model, inputs = tiny_llama(), text_inputs(60)
    answers = []
    for store in ("ragged", "dense"):
        with kvcomp.compress(model, skewed("snapkv", 0.3, store, turns="append")) as cache:
            first = generate(model, inputs, cache, 4).sequences
            turn = {"input_ids": torch.cat([first, torch.tensor([[7, 8, 9]])], dim=1)}
            answers.append(generate(model, turn, cache, 6))
        layer, query = cache.layers[0], torch.zeros(1, 4, 1, 16)
        assert layer.only_causal(None)
        if store == "ragged":
            assert layer.packed("sdpa", query, None, Logits(1.0))[1:] == (None, [None, None])
        else:
            assert layer.slot_mask(None, query, aligned=False) is not None
    assert_same_answer(*answers)


def test_bfloat16_is_near():
    model = tiny_llama().to(torch.bfloat16)
    mine, reference = both(model, text_inputs(70), "snapkv", new=1)
    assert torch.allclose(mine[0].logits[0], reference[0].logits[0], atol=0.05)
    assert mine[1].layers[0].keys.dtype == torch.bfloat16
    with kvcomp.compress(model, skewed("snapkv", 0.3)) as cache, torch.no_grad():
        model(**text_inputs(70), past_key_values=cache)
        packed = model(input_ids=torch.tensor([[5]]), past_key_values=cache).logits
    with kvcomp.compress(model, skewed("snapkv", 0.3, "dense")) as cache, torch.no_grad():
        model(**text_inputs(70), past_key_values=cache)
        padded = model(input_ids=torch.tensor([[5]]), past_key_values=cache).logits
    assert torch.allclose(packed, padded, atol=0.05)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_budget_one_is_the_stock_cache_bit_for_bit(attention):
    model, inputs = tiny_llama(), text_inputs(60)
    model.set_attn_implementation(attention)
    stock = generate_stock(model, inputs)
    output, cache = generate_compressed(model, inputs, skewed("flowmm", 1.0))
    assert torch.equal(output.sequences, stock.sequences)
    assert all(map(torch.equal, output.logits, stock.logits))
    assert torch.equal(cache.layers[1].keys, stock.past_key_values.layers[1].keys)


@pytest.mark.parametrize("inputs", [text_inputs(200), batch_of(200, 90)], ids=["one", "batch"])
def test_heads_that_differ_take_the_bytes_of_what_they_hold(inputs):
    """The padded store takes what the longest head of the longest row takes; the packed one 2 % more at most."""
    model = tiny_llama()
    reports = {}
    for store in ("ragged", "dense"):
        with kvcomp.compress(model, skewed("snapkv", 0.2, store)) as cache, torch.no_grad():
            model(**inputs, past_key_values=cache)
        reports[store] = cache.report()
    tokens = inputs["attention_mask"].sum(dim=1)
    budget = sum(int(count) // 5 for count in tokens) * 3 * 2 * 2 * 16 * 4  # layers, heads, keys and values, float32
    assert reports["ragged"].allocated_bytes == reports["dense"].allocated_bytes == budget
    assert reports["ragged"].reserved_bytes == 0
    assert reports["dense"].reserved_bytes >= 0.4 * budget
    assert reports["ragged"].layers[1].slots == reports["dense"].layers[1].slots


def test_the_sum_over_heads_is_the_budget():
    model, inputs = tiny_llama(), batch_of(200, 90)
    with kvcomp.compress(model, skewed("snapkv", 0.2)) as cache, torch.no_grad():
        model(**inputs, past_key_values=cache)
    for layer in cache.layers:
        held = (layer.indices >= 0).sum(dim=-1)
        assert held.sum(dim=-1).tolist() == [2 * 40, 2 * 18]
        assert sum(layer.storage.packed().layout.lengths) == 2 * 58
    assert (cache.layers[0].indices >= 0).sum(dim=-1).tolist() == [[10, 70], [5, 31]]


def test_decoding_takes_room_once_in_a_while_and_as_reserved():
    model, inputs = tiny_llama(), text_inputs(100)
    with kvcomp.compress(model, skewed("snapkv", 0.2), reserve=32) as cache, torch.no_grad():
        model(**inputs, past_key_values=cache)
        places = set()
        for token in range(32):
            model(input_ids=torch.tensor([[token + 2]]), past_key_values=cache)
            places.add(cache.layers[0].storage.packed().keys.data_ptr())
        assert len(places) == 1
        assert cache.report().reserved_bytes <= 0.02 * cache.report().allocated_bytes
        for token in range(100):
            model(input_ids=torch.tensor([[token % 70 + 2]]), past_key_values=cache)
            places.add(cache.layers[0].storage.packed().keys.data_ptr())
    assert len(places) <= 8
    assert cache.report().layers[0].slots == (20 + 132.0,)


def test_beams_follow_their_rows():
    model, inputs = tiny_llama(), batch_of(50, 20)
    settings = {"num_beams": 3, "num_return_sequences": 2, "output_logits": False}
    mine, reference = (
        generate_compressed(model, inputs, skewed("flowmm", 0.3, store), **settings)[0].sequences
        for store in ("ragged", "dense")
    )
    assert torch.equal(mine, reference)


def test_rows_can_be_selected_and_repeated():
    model = tiny_llama()
    with kvcomp.compress(model, skewed("snapkv", 0.5)) as cache, torch.no_grad():
        model(**batch_of(40, 20), past_key_values=cache)
        indices, keys = cache.layers[0].indices, cache.layers[0].keys
        cache.batch_repeat_interleave(2)
        assert torch.equal(cache.layers[0].indices, indices.repeat_interleave(2, dim=0))
        assert torch.equal(cache.layers[0].keys, keys.repeat_interleave(2, dim=0))
        cache.batch_select_indices(torch.tensor([3]))
    assert torch.equal(cache.layers[0].keys, keys[1:, :, : cache.layers[0].keys.shape[2]])
    assert sum(cache.layers[0].storage.packed().layout.lengths) == 2 * 10
    assert cache.report().layers[0].slots == (10.0,)


def test_a_cropped_cache_goes_on_as_with_padded_heads():
    model, inputs = tiny_llama(), text_inputs(60)
    answers = []
    for store in ("ragged", "dense"):
        with kvcomp.compress(model, skewed("snapkv", 0.3, store)) as cache:
            first = generate(model, inputs, cache, 6).sequences
            cache.crop(-3)
            turn = {"input_ids": torch.cat([first[:, :-4], torch.tensor([[7, 8]])], dim=1)}
            answers.append(generate(model, turn, cache, 5))
    assert_same_answer(*answers)


def test_branches_share_a_snapshot_and_do_not_overwrite_each_other():
    model, inputs = tiny_llama(), text_inputs(60)
    with kvcomp.compress(model, skewed("snapkv", 0.3)) as cache, torch.no_grad():
        model(**inputs, past_key_values=cache)
        trunk, kept = cache.snapshot(), cache.layers[0].keys
        place = cache.layers[0].storage.packed().keys.data_ptr()
        answers = []
        for token in (5, 6, 5):
            answers.append(model(input_ids=torch.tensor([[token]]), past_key_values=cache).logits)
            cache.restore(trunk)
            assert torch.equal(cache.layers[0].keys, kept)
            assert cache.layers[0].storage.packed().keys.data_ptr() == place
    assert torch.equal(answers[0], answers[2])
    assert not torch.equal(answers[0], answers[1])


def test_offloaded_slots_come_back():
    model, inputs = tiny_llama(), text_inputs(60)
    with kvcomp.compress(model, skewed("snapkv", 0.3)) as cache, torch.no_grad():
        model(**inputs, past_key_values=cache)
        kept = cache.layers[0].keys
        cache.layers[0].offload()
        cache.layers[0].prefetch()
        model(input_ids=torch.tensor([[5]]), past_key_values=cache)
    assert torch.equal(cache.layers[0].keys[..., : kept.shape[2], :][:, 1], kept[:, 1])


def test_attention_weights_lie_on_the_slots_that_they_belong_to():
    model, inputs = tiny_llama(), text_inputs(60)
    model.set_attn_implementation("eager")
    weights = []
    for store in ("ragged", "dense"):
        with kvcomp.compress(model, skewed("snapkv", 0.3, store)) as cache, torch.no_grad():
            model(**inputs, past_key_values=cache)
            for token in (5, 6):
                output = model(input_ids=torch.tensor([[token]]), past_key_values=cache, output_attentions=True)
        weights.append(output.attentions)
    for mine, reference in zip(*weights, strict=True):
        assert mine.shape == reference.shape
        assert torch.allclose(mine, reference, atol=1e-5)


def test_bookkeeping_of_heads_that_differ_is_at_most_five_percent():
    config = tiny_llama().config
    config.head_dim = 128
    torch.manual_seed(0)
    model = type(tiny_llama())(config).to(torch.bfloat16).eval()
    with kvcomp.compress(model, skewed("flowmm", 0.2)) as cache, torch.no_grad():
        model(**text_inputs(400), past_key_values=cache)
    report = cache.report()
    assert report.bookkeeping_bytes <= 0.05 * report.allocated_bytes
    assert report.bookkeeping_bytes == _bytes_of(cache)
    held = (cache.layers[0].indices >= 0).sum(dim=-1)
    assert int(held.max()) >= 1.7 * held.double().mean()


def _bytes_of(cache):
    """What the tables take, by hand: index, count, modality and position of every slot, a mask as wide as any, and once
    the ids of all columns.
    """
    slots = sum(int((layer.indices >= 0).sum()) for layer in cache.layers)
    masks = sum(layer.indices.numel() for layer in cache.layers)
    ids = 4 * len(cache.layers[0].indices) * cache.get_seq_length()
    return slots * (4 + 4 + 1 + 4) + masks + ids + 3 * (8 + 4 + 2 * 8)  # of each layer: tokens, rho, ends of two heads
