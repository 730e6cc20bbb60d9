"""A second pass: what it measures is what a stock model shows when the context is appended to itself."""

from __future__ import annotations

import functools

import oracles
import oracles_recon
import pytest
import torch
from inference import generate, left_padded, right_padded
from models import image_inputs, text_inputs, tiny_llama, tiny_qwen3, tiny_qwen_vl

import kvcomp
from kvcomp.testing.families import FAMILIES

MODELS = {
    "llama": (tiny_llama, text_inputs(31)),
    "qwen3": (tiny_qwen3, text_inputs(31)),
    "qwen2.5-vl": (tiny_qwen_vl, image_inputs(images=2, between=4)),
}
NOISE = 2  # sequences that kvcomp-global reads
TAKE_MORE = ("qwen3-vl", "gemma4")  # beside embeddings and positions
ONCE = {
    "whole": {},
    "chunks": {"chunk": 7},
    "overlapping": {"chunk": 11, "overlap": 3},
    "instructed": {"chunk": 16, "overlap": 2, "instruction": [5, 8, 13]},
    "noisy": {"noise": 1},
    "noisy chunks": {"chunk": 11, "overlap": 3, "noise": 2},
}
WAYS = ONCE | {"halving": {"halving": True}, "halving chunks": {"halving": True, "chunk": 9, "overlap": 2}}


def recipe(**scorer) -> dict:
    return {"scorer": {"use": "reconstruction", "overlap": 0, **scorer}, "selector": "top-k", "budget": 0.3}


def prefill(model, inputs, strategy, **settings) -> kvcomp.CompressedCache:
    with kvcomp.compress(model, strategy, **settings) as cache, torch.no_grad():
        model(**inputs, past_key_values=cache)
    return cache


def in_float64(family: str):
    """The model, its attention eager, and its inputs."""
    build, inputs = MODELS[family] if family in MODELS else (FAMILIES[family].model, FAMILIES[family].prompt(0))
    model = build().double()
    model.set_attn_implementation("eager")
    return model, {name: tensor.double() if tensor.is_floating_point() else tensor for name, tensor in inputs.items()}


@functools.cache
def oracle(family: str, way: str):
    settings = {"noise": 0, **ONCE[way], "instruction": tuple(ONCE[way].get("instruction", ()))}
    noise, case = settings.pop("noise"), in_float64(family)
    scores = oracles_recon.reconstruction(*case, **settings)
    if noise:
        others = oracles_recon.reconstruction(*case, noise=noise, chunk=settings.get("chunk", 10**6))
        scores = [oracles_recon.joined(max, *pair) for pair in zip(scores, others, strict=True)]
    return scores


def largest(layer) -> torch.Tensor:
    """The largest attention that each token received in any reading, `(kv_heads, tokens)`."""
    received = torch.stack([*layer.carried.values()]).amax(dim=0)
    return received[0].unflatten(0, (2, -1)).amax(dim=1)


def assert_received(layer, expected: list[list[float]]) -> None:
    torch.testing.assert_close(largest(layer), torch.tensor(expected), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("way", ONCE)
@pytest.mark.parametrize("family", MODELS)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_scores_and_kept_indices_are_those_of_the_oracle(family, attention, way):
    build, inputs = MODELS[family]
    model = build()
    model.set_attn_implementation(attention)
    whole = prefill(model, inputs, recipe(**WAYS[way]), budget={"tokens": 5000})
    cache = prefill(model, inputs, recipe(**WAYS[way]))
    scores = oracle(family, way)
    slots = oracles.num_slots("0.3", inputs["input_ids"].shape[1])
    for layer, everything, expected in zip(cache.layers, whole.layers, scores, strict=True):
        assert_received(everything, expected)
        for head in range(2):
            assert layer.indices[0, head].tolist() == oracles_recon.kept(expected[head], slots)


@pytest.mark.parametrize(
    ("family", "way"), [(family, way) for family in TAKE_MORE for way in ("whole", "overlapping", "noisy chunks")]
)
def test_what_a_model_takes_beside_embeddings_is_fed_again(family, way):
    model, inputs = FAMILIES[family].model(), FAMILIES[family].prompt(0)
    cache = prefill(model, inputs, recipe(**ONCE[way]), budget={"tokens": 5000})
    expected = oracle(family, way)
    for number, layer in cache.compressed_layers.items():
        assert_received(layer, expected[number])


def test_an_instruction_is_text_and_brings_no_features():
    model, inputs = FAMILIES["qwen3-vl"].model(), FAMILIES["qwen3-vl"].prompt(0)
    cache = prefill(model, inputs, recipe(**ONCE["instructed"]), budget={"tokens": 5000})
    for layer, expected in zip(cache.layers, oracle("qwen3-vl", "instructed"), strict=True):
        assert_received(layer, expected)
    gemma, inputs = FAMILIES["gemma4"].model(), FAMILIES["gemma4"].prompt(0)
    with pytest.raises(kvcomp.UnsupportedUseError, match="leave out the scorer's instruction"):
        prefill(gemma, inputs, recipe(**ONCE["instructed"]))


@pytest.mark.parametrize("family", TAKE_MORE)
def test_what_was_fed_in_two_forwards_is_fed_again_as_one(family):
    """The second turn has no picture: its tokens have no features, and it may be computed from other inputs."""
    model, inputs = FAMILIES[family].model(), FAMILIES[family].prompt(0)
    more, kept = torch.tensor([[7, 8, 9, 10]]), []
    for turns in (1, 2):
        with kvcomp.compress(model, recipe(), defer=True) as cache, torch.no_grad():
            if turns == 1:
                model(**FAMILIES[family].longer(inputs, more), past_key_values=cache)
            else:
                model(**inputs, past_key_values=cache)
                model(input_ids=more, past_key_values=cache)
            cache.finish()
        kept.append([layer.indices for layer in cache.compressed_layers.values()])
    assert all(map(torch.equal, *kept))


def test_sinks_are_kept_in_the_budget():
    build, inputs = MODELS["llama"]
    cache = prefill(build(), inputs, recipe(sinks=4))
    for layer, expected in zip(cache.layers, oracle("llama", "whole"), strict=True):
        for head in range(2):
            assert layer.indices[0, head].tolist() == oracles_recon.kept(expected[head], 9, sinks=4)


@pytest.mark.parametrize("budget", ["0.1", "0.4"])
@pytest.mark.parametrize("family", MODELS)
def test_kvcomp_global_keeps_the_best_of_all_layers_and_heads(family, budget):
    build, inputs = MODELS[family]
    cache = prefill(build(), inputs, "kvcomp-global", budget=budget)
    slots = oracles.num_slots(budget, inputs["input_ids"].shape[1])
    case = in_float64(family)
    context, noise = (
        torch.tensor(oracles_recon.reconstruction(*case, squares=True, noise=count)) for count in (0, NOISE)
    )
    expected = oracles_recon.shared_budget((context + noise / NOISE).tolist(), slots, floor=slots // 10)
    assert_kept(cache, expected)
    assert cache.report().allocated_bytes == sum(len(kept) for heads in expected for kept in heads) * (
        2 * cache.layers[0].keys.shape[3] * 4
    )


@pytest.mark.parametrize("family", MODELS)
def test_reconstruction_may_be_weighed_by_what_a_token_adds_to_the_output(family):
    build, inputs = MODELS[family]
    scorer = {"use": "value-norm", "scorer": {"use": "reconstruction", "overlap": 0}, "power": 0.5}
    cache = prefill(build(), inputs, "kvcomp-global", budget=0.4, scorer=scorer)
    scores = oracles_recon.with_output_norms(*in_float64(family), oracle(family, "whole"), power=0.5)
    slots = oracles.num_slots("0.4", inputs["input_ids"].shape[1])
    assert_kept(cache, oracles_recon.shared_budget(scores, slots, floor=slots // 10))


def assert_kept(cache: kvcomp.CompressedCache, expected: list[list[list[int]]]) -> None:
    for layer, heads in zip(cache.layers, expected, strict=True):
        for head, kept in enumerate(heads):
            held = layer.indices[0, head]
            assert held[held >= 0].tolist() == kept


@pytest.mark.parametrize("family", MODELS)
def test_flowmm_may_share_its_budget_among_layers_and_heads(family):
    build, inputs = MODELS[family]
    model, slots = build(), oracles.num_slots("0.4", inputs["input_ids"].shape[1])
    with kvcomp.compress(model, "flowmm", budget=0.4, allocator={"use": "global", "floor": 0.2}) as cache:
        generate(model, inputs, cache, 3)
    lengths = [int((layer.indices[0, head] >= 0).sum()) - 2 for layer in cache.layers for head in range(2)]
    assert sum(lengths) == slots * len(lengths)
    assert len(set(lengths)) > 1
    assert any(layer.merged[0] > 0 for layer in cache.report().layers)


@pytest.mark.parametrize("family", MODELS)
def test_what_goes_is_merged_and_weighs_what_it_stands_for(family):
    build, inputs = MODELS[family]
    model, tokens = build(), inputs["input_ids"].shape[1]
    with kvcomp.compress(model, "kvcomp-global-merge", budget=0.3, **{"matcher.floor": -1.0}) as cache:
        assert cache.strategy.mass_preserving
        generate(model, inputs, cache, 3)
    for layer in cache.report().layers:
        assert layer.evicted == (0,)
        assert layer.slots[0] + layer.merged[0] == tokens + 2


@pytest.mark.parametrize("family", MODELS)
def test_halving_reconstructs_from_what_is_left(family):
    build, inputs = MODELS[family]
    cache = prefill(build(), inputs, recipe(halving=True), budget=0.15)
    slots = oracles.num_slots("0.15", inputs["input_ids"].shape[1])
    for layer, heads in zip(cache.layers, oracles_recon.halved(*in_float64(family), slots), strict=True):
        assert layer.indices[0].tolist() == heads


@pytest.mark.parametrize("pad", [left_padded, right_padded])
@pytest.mark.parametrize("way", WAYS)
def test_a_padded_row_keeps_what_it_keeps_alone(way, pad):
    model = tiny_llama()
    rows = [text_inputs(tokens, seed=tokens)["input_ids"] for tokens in (40, 23, 6)]
    together = prefill(model, pad(rows), recipe(**WAYS[way]))
    for place, row in enumerate(rows):
        alone = prefill(model, {"input_ids": row}, recipe(**WAYS[way]))
        for layer, reference in zip(together.layers, alone.layers, strict=True):
            kept = layer.indices[place]
            assert kept[kept >= 0].tolist() == reference.indices.flatten().tolist()


def test_a_padded_row_of_images_keeps_what_it_keeps_alone():
    model, long, short = tiny_qwen_vl(), image_inputs(images=3), image_inputs(images=1, seed=1)
    width, pads = long["input_ids"].shape[1], long["input_ids"].shape[1] - short["input_ids"].shape[1]
    batch = left_padded([long["input_ids"], short["input_ids"]])
    types = torch.nn.functional.pad(short["mm_token_type_ids"], (pads, 0))
    batch |= {name: torch.cat([long[name], short[name]]) for name in ("pixel_values", "image_grid_thw")}
    batch |= {"mm_token_type_ids": torch.cat([long["mm_token_type_ids"], types])}
    together = prefill(model, batch, recipe(chunk=9, overlap=2))
    for place, row in enumerate((long, short)):
        alone = prefill(model, row, recipe(chunk=9, overlap=2))
        for layer, reference in zip(together.layers, alone.layers, strict=True):
            kept = layer.indices[place]
            assert kept[kept >= 0].tolist() == reference.indices.flatten().tolist()
    assert width > short["input_ids"].shape[1]


@pytest.mark.parametrize("family", MODELS)
@pytest.mark.parametrize("size", [7, 13, 16])
def test_deferred_chunks_give_what_one_chunk_gives(family, size):
    build, inputs = MODELS[family]
    model, tokens = build(), inputs["input_ids"].shape[1]
    whole = prefill(model, inputs, recipe(chunk=12))
    given = oracles_recon.prefill(model, inputs)

    def types(start):
        seen = inputs.get("mm_token_type_ids")
        return {} if seen is None else {"mm_token_type_ids": seen[:, start : start + size]}

    with kvcomp.compress(model, recipe(chunk=12), defer=True) as cache, torch.no_grad():
        for start in range(0, tokens, size):
            positions = given.positions[:, start : start + size]
            piece = given.embeddings[:, start : start + size]
            model(
                inputs_embeds=piece,
                position_ids=positions[:, None] if len(positions) > 1 else positions,
                past_key_values=cache,
                **types(start),
            )
            assert cache.layers[0].keys.shape[2] == min(tokens, start + size)
        cache.finish()
    for layer, reference in zip(cache.layers, whole.layers, strict=True):
        assert torch.equal(layer.indices, reference.indices)


class Calls:
    """How many tokens each forward of the text model is given."""

    def __init__(self, model):
        self.tokens = []
        model.get_decoder().register_forward_pre_hook(self._note, with_kwargs=True)

    def _note(self, module, args, kwargs):
        given = kwargs.get("input_ids") if kwargs.get("inputs_embeds") is None else kwargs["inputs_embeds"]
        self.tokens.append(given.shape[1])


def test_it_costs_one_more_prefill_and_none_where_everything_stays():
    model, inputs = tiny_llama(), text_inputs(40)
    calls = Calls(model)
    with kvcomp.compress(model, recipe(chunk=16, overlap=4)) as cache:
        generate(model, inputs, cache, 4)
    assert calls.tokens == [40, 16, 20, 12, 1, 1, 1]
    calls.tokens.clear()
    with kvcomp.compress(model, recipe(chunk=16, overlap=4, noise=1)) as cache:
        generate(model, inputs, cache, 2)
    assert calls.tokens == [40, 16, 20, 12, 16, 16, 8, 1]
    calls.tokens.clear()
    with kvcomp.compress(model, recipe(), budget=1.0) as cache:
        generate(model, inputs, cache, 3)
    assert calls.tokens == [40, 1, 1]


def test_no_two_sequences_of_noise_are_alike():
    model, read = tiny_llama(), []
    decoder = model.get_decoder()
    decoder.register_forward_pre_hook(lambda module, args, given: read.append(given["input_ids"]), with_kwargs=True)
    prefill(model, text_inputs(40), recipe(chunk=20, noise=3))
    noise = read[3:]  # after the prompt, and its two chunks
    assert len({tuple(ids[0].tolist()) for ids in noise}) == len(noise) == 6


def test_a_deferred_cache_is_compressed_before_the_first_decoded_token():
    model, inputs = tiny_llama(), text_inputs(40)
    calls = Calls(model)
    with kvcomp.compress(model, recipe(), defer=True) as cache:
        deferred = generate(model, inputs, cache, 4)
    assert sorted(calls.tokens) == [1, 1, 1, 40, 40]
    with kvcomp.compress(model, recipe()) as cache:
        assert torch.equal(generate(model, inputs, cache, 4).sequences, deferred.sequences)


@pytest.mark.parametrize("family", MODELS)
def test_the_cache_and_the_model_are_left_as_they_were(family):
    build, inputs = MODELS[family]
    model, stock = build(), oracles_recon.prefill(build(), inputs).cache
    hooks = [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()]
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    cache = prefill(model, inputs, recipe(chunk=8))
    assert [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()] == hooks
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert cache.get_seq_length() == inputs["input_ids"].shape[1]
    for layer, reference in zip(cache.layers, stock.layers, strict=True):
        for head in range(2):
            kept = layer.indices[0, head].long()
            assert torch.equal(layer.keys[0, head], reference.keys[0, head, kept])
            assert torch.equal(layer.values[0, head], reference.values[0, head, kept])
    if family == "qwen2.5-vl":
        again = build()
        oracles_recon.prefill(again, inputs)
        assert torch.equal(model.model.rope_deltas, again.model.rope_deltas)


@pytest.mark.parametrize("family", MODELS)
def test_a_question_that_comes_later_is_appended_whole(family):
    build, inputs = MODELS[family]
    model, tokens = build(), inputs["input_ids"].shape[1]
    later = torch.cat([inputs["input_ids"], text_inputs(6, seed=4)["input_ids"]], dim=1)
    with kvcomp.compress(model, recipe() | {"turns": "append"}) as cache, torch.no_grad():
        model(**inputs, past_key_values=cache)
        context = cache.layers[1].indices.clone()
        calls = Calls(model)
        whole = {**inputs, "input_ids": later, "attention_mask": torch.ones_like(later)}
        whole.pop("mm_token_type_ids", None)
        model.generate(**cache.next_turn(model, **whole), max_new_tokens=3, do_sample=False)
    assert calls.tokens == [6, 1, 1]
    assert torch.equal(cache.layers[1].indices[..., : context.shape[2]], context)
    assert cache.layers[1].indices[0, 0, context.shape[2] :].tolist() == list(range(tokens, tokens + 8))


def test_a_later_turn_repeats_what_is_new_and_remembers_the_rest():
    model = tiny_llama()
    first, second = text_inputs(40)["input_ids"], text_inputs(20, seed=1)["input_ids"]
    calls = Calls(model)
    with kvcomp.compress(model, recipe()) as cache, torch.no_grad():
        model(input_ids=first, past_key_values=cache)
        before = cache.layers[0].indices.clone()
        (largest,) = cache.layers[0].carried.values()
        largest = largest.clone()
        model(input_ids=second, past_key_values=cache)
    assert calls.tokens == [40, 40, 20, 20]
    assert cache.layers[0].keys.shape[2] == 18
    (now,) = cache.layers[0].carried.values()
    for head in range(4):
        then = dict(zip(before[0, head // 2].tolist(), largest[0, head].tolist(), strict=True))
        for index, value in zip(cache.layers[0].indices[0, head // 2].tolist(), now[0, head].tolist(), strict=True):
            assert value >= then.get(index, 0.0)


def test_layers_that_are_not_compressed_see_the_repetition_only_while_it_lasts():
    config = tiny_qwen3().config
    config.layer_types = ["full_attention", "sliding_attention", "full_attention"]
    config.use_sliding_window, config.sliding_window = True, 8
    torch.manual_seed(0)
    model, inputs = type(tiny_qwen3())(config).eval(), text_inputs(40)
    stock = oracles_recon.prefill(model, inputs).cache
    cache = prefill(model, inputs, recipe(chunk=9))
    assert cache.report().untouched == (1,)
    assert torch.equal(cache.layers[1].keys, stock.layers[1].keys)
    assert cache.layers[1].get_seq_length() == 40


def test_a_snapshot_of_a_deferred_cache_can_be_finished():
    model, inputs = tiny_llama(), text_inputs(40)
    with kvcomp.compress(model, recipe(), defer=True) as cache, torch.no_grad():
        model(**inputs, past_key_values=cache)
        waiting = cache.snapshot()
        cache.finish()
        expected = cache.layers[2].indices.clone()
        cache.restore(waiting)
        assert cache.layers[2].keys.shape[2] == 40
        cache.finish()
    assert torch.equal(cache.layers[2].indices, expected)


def test_a_cache_that_was_reset_is_as_new():
    model = tiny_llama()
    with kvcomp.compress(model, recipe(), defer=True) as cache, torch.no_grad():
        model(**text_inputs(25, seed=3), past_key_values=cache)
        cache.reset()
        model(**text_inputs(40), past_key_values=cache)
        cache.finish()
    assert torch.equal(cache.layers[1].indices, prefill(model, text_inputs(40), recipe()).layers[1].indices)


def test_finishing_after_the_block_is_refused():
    model = tiny_llama()
    cache = prefill(model, text_inputs(40), recipe(), defer=True)
    with pytest.raises(kvcomp.UnsupportedUseError, match="can only be fed inside"):
        cache.finish()


def test_a_text_model_that_takes_more_than_embeddings_is_refused():
    model = tiny_llama()
    with (
        kvcomp.compress(model, recipe()) as cache,
        torch.no_grad(),
        pytest.raises(kvcomp.UnsupportedUseError, match="takes something_else as well"),
    ):
        model.get_decoder()(**text_inputs(40), past_key_values=cache, something_else=[torch.zeros(1, 64)])


def test_beams_start_from_the_compressed_cache():
    model, inputs = tiny_llama(), text_inputs(40)
    settings = {"num_beams": 3, "output_logits": False}
    rows = left_padded([inputs["input_ids"], text_inputs(17, seed=2)["input_ids"]])
    with kvcomp.compress(model, recipe()) as cache:
        alone = generate(model, inputs, cache, 5, **settings).sequences
    with kvcomp.compress(model, recipe()) as cache:
        together = generate(model, rows, cache, 5, **settings).sequences
    assert torch.equal(together[0], alone[0])
