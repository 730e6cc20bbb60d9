"""Triggers: budgets that hold while tokens are decoded, whatever else happens to the cache; and what cannot be."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from inference import COMPRESSING, RECIPES, generate, generate_stock, left_padded
from models import image_inputs, text_inputs, tiny_llama, tiny_qwen_vl
from torch import Tensor
from transformers import PreTrainedModel, StoppingCriteria, StoppingCriteriaList

import kvcomp
from kvcomp.core.trigger import Trigger

TRIGGERS = ["over-budget", {"every": 5}]


def one_layer() -> PreTrainedModel:
    config = tiny_llama().config
    config.num_hidden_layers = 1
    torch.manual_seed(0)
    return type(tiny_llama())(config).eval()


class Watch(StoppingCriteria):
    """Notes what a cache holds after every token, and stops nothing."""

    def __init__(self, cache: kvcomp.CompressedCache) -> None:
        self.cache, self.slots, self.bytes = cache, [], []

    def __call__(self, ids: Tensor, scores: Tensor, **kwargs: object) -> Tensor:
        self.slots.append(self.cache.layers[-1].storage.read()[0].shape[2])
        self.bytes.append(sum(layer.storage.nbytes() for layer in self.cache.layers))
        return torch.zeros(len(ids), dtype=torch.bool)


@pytest.mark.parametrize(("recipe", "budget", "slots"), [("h2o", {"tokens": 40}, 40), ("streaming-llm", 0.5, 30)])
def test_a_generation_of_two_thousand_tokens_stays_inside_its_budget(recipe: str, budget: object, slots: int) -> None:
    model, inputs = one_layer(), text_inputs(60)
    with kvcomp.compress(model, recipe, budget=budget, trigger="over-budget") as cache:
        watch = Watch(cache)
        generate(model, inputs, cache, 2000, output_logits=False, stopping_criteria=StoppingCriteriaList([watch]))
    assert len(watch.slots) == 2000
    assert max(watch.slots) == slots
    slot_bytes = 2 * 2 * 16 * 4  # KV heads, keys and values, head_dim, float32
    assert max(watch.bytes) <= (slots + 16) * slot_bytes
    report = cache.report()
    assert report.allocated_bytes == slots * slot_bytes
    assert report.layers[0].tokens == (60 + 1999,)
    assert cache.layers[0].indices[0, 0, -1] == 60 + 1998
    assert report.trigger == "over-budget"


def refused(recipe: str) -> bool:
    parts = [part for whole in kvcomp.strategy(recipe).parts for part in (*whole.family(), *whole.observations())]
    return any(part.prefill_only for part in parts)


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_decodes_under_a_trigger_unless_a_part_says_why_it_cannot(recipe: str) -> None:
    if refused(recipe):
        with pytest.raises(kvcomp.ConfigError, match="cannot compress again while tokens are decoded: "):
            kvcomp.strategy(recipe, trigger="over-budget")
    else:
        assert kvcomp.strategy(recipe, trigger="over-budget").trigger.over_budget


@pytest.mark.parametrize("trigger", TRIGGERS, ids=str)
@pytest.mark.parametrize("recipe", [recipe for recipe in COMPRESSING if not refused(recipe)])
def test_every_recipe_that_can_decodes_within_its_budget(recipe: str, trigger: object) -> None:
    model, strategy = tiny_llama(), kvcomp.strategy(recipe, 0.4, trigger=trigger)
    rows = left_padded([text_inputs(tokens, seed=tokens)["input_ids"] for tokens in (50, 30)])
    with kvcomp.compress(model, strategy) as cache:
        generate(model, rows, cache, 17)
    layers = cache.report().layers
    most = (20, 12) if trigger == "over-budget" else (65 * 2 // 5 + 1, 45 * 2 // 5 + 1)  # 65 tokens, then one more
    for row, slots in enumerate(most):
        assert sum(layer.slots[row] for layer in layers) <= len(layers) * slots
    for layer in layers:
        assert layer.tokens == (66, 46)
        total = [sum(parts) for parts in zip(layer.slots, layer.merged, layer.evicted, strict=True)]
        assert total == pytest.approx([66, 46])
    assert (cache.layers[0].indices[:, :, -1] >= 0).any()


def test_many_roundings_of_merged_counts_never_say_that_less_than_nothing_was_evicted() -> None:
    """CaM shares every token that leaves in equal parts, which float32 does not hold exactly."""
    model = tiny_llama()
    with kvcomp.compress(model, "cam", budget=0.5, trigger="over-budget") as cache:
        generate(model, text_inputs(60), cache, 120)
    for layer in cache.report().layers:
        assert layer.evicted[0] >= 0
        assert layer.slots[0] + layer.merged[0] + layer.evicted[0] == pytest.approx(layer.tokens[0])


@pytest.mark.parametrize("trigger", TRIGGERS, ids=str)
@pytest.mark.parametrize("recipe", ["flowmm", "h2o", "streaming-llm"])
def test_a_budget_of_one_is_the_stock_cache_under_any_trigger(recipe: str, trigger: object) -> None:
    model, inputs = tiny_llama(), text_inputs(30)
    with kvcomp.compress(model, recipe, budget=1.0, trigger=trigger) as cache:
        output = generate(model, inputs, cache, 15)
    stock = generate_stock(model, inputs, 15)
    assert torch.equal(output.sequences, stock.sequences)
    assert all(map(torch.equal, output.logits, stock.logits))


@pytest.mark.parametrize("trigger", TRIGGERS, ids=str)
def test_images_and_their_positions_go_on_while_tokens_are_decoded(trigger: object) -> None:
    model, inputs = tiny_qwen_vl(), image_inputs()
    merger = {"use": "unrotated", "merger": {"use": "mean"}}
    with kvcomp.compress(model, "flowmm", budget=0.4, trigger=trigger, merger=merger) as cache:
        generate(model, inputs, cache, 20)
    stock = generate_stock(model, inputs, 20).past_key_values
    tokens = inputs["input_ids"].shape[1]
    for layer in cache.layers:
        assert layer.seen == stock.get_seq_length() == tokens + 19
        assert layer.rotary.columns == layer.seen
        assert layer.table.positions.shape[0] == 3
        expected = tokens - 3 * 2 + torch.arange(19)  # an image of 2 x 2 takes two positions for its four tokens
        recent = layer.all_slots().positions[:, 0, 0, -3:]
        assert torch.equal(recent, expected[-3:].expand(3, -1).int())


class Ragged(kvcomp.BudgetAllocator, use="ragged-for-tests"):
    """Heads take turns in keeping more than their share; rows differ as well."""

    def allocate(self, slots: Tensor, layers: Sequence, scores: Sequence) -> Tensor:
        batch, kv_heads, _ = layers[0].shape
        more = torch.stack([(slots // 3) * (-1) ** head for head in range(kv_heads)], dim=-1)
        held = torch.stack([layer.valid.sum(dim=-1) for layer in layers])
        return (slots[:, None] + more).clamp(min=1).expand(len(layers), batch, kv_heads).minimum(held)


class Deep(kvcomp.BudgetAllocator, use="deep-for-tests"):
    """Later layers keep more; known only after the last layer."""

    scope = "model"

    def allocate(self, slots: Tensor, layers: Sequence, scores: Sequence) -> Tensor:
        step = slots // (2 * len(layers))
        shares = torch.stack([slots + (2 * number - len(layers) + 1) * step for number in range(len(layers))])
        return shares[..., None].expand(-1, -1, layers[0].shape[1])


@pytest.mark.parametrize("mass_preserving", [False, True], ids=["plain", "mass"])
@pytest.mark.parametrize("trigger", ["over-budget", {"every": 4}], ids=str)
def test_packed_heads_are_compressed_again_as_padded_ones(trigger: object, mass_preserving: bool) -> None:
    model, overrides = tiny_llama(), {"trigger": trigger, "mass_preserving": mass_preserving}
    rows = left_padded([text_inputs(tokens, seed=tokens)["input_ids"] for tokens in (50, 30)])
    found = {}
    for store in ("ragged", "dense"):
        with kvcomp.compress(
            model, "ada-kv", budget=0.4, store=store, matcher="nearest", merger="mean", **overrides
        ) as cache:
            found[store] = generate(model, rows, cache, 17), cache
    (output, packed), (expected, padded) = found["ragged"], found["dense"]
    assert torch.equal(output.sequences, expected.sequences)
    assert torch.allclose(torch.stack(output.logits), torch.stack(expected.logits), atol=1e-4)
    for layer, other in zip(packed.layers, padded.layers, strict=True):
        assert layer.storage.packed() is not None
        assert torch.equal(layer.indices, other.indices)
        assert torch.allclose(layer.keys, other.keys, atol=1e-5)
    assert any((layer.indices < 0).any() for layer in packed.layers)  # heads differ
    slots = sum(int((layer.indices >= 0).sum()) for layer in packed.layers)
    assert packed.report().allocated_bytes == slots * 2 * 16 * 4


@pytest.mark.parametrize("trigger", TRIGGERS, ids=str)
@pytest.mark.parametrize("allocator", [Ragged(), Deep()], ids=lambda part: part.use)
@pytest.mark.parametrize("recipe", ["h2o", "flowmm-no-gate", "streaming-llm"])
def test_budgets_of_heads_and_layers_hold_while_tokens_are_decoded(
    recipe: str, allocator: kvcomp.BudgetAllocator, trigger: object
) -> None:
    model = tiny_llama()
    rows = left_padded([text_inputs(tokens, seed=tokens)["input_ids"] for tokens in (60, 36)])
    strategy = replace(kvcomp.strategy(recipe, 0.5, trigger=trigger), allocator=allocator)
    alone = []
    with kvcomp.compress(model, strategy) as cache:
        generate(model, rows, cache, 21)
    for row in (0, 1):
        ids = rows["input_ids"][row : row + 1, rows["attention_mask"][row].argmax() :]
        with kvcomp.compress(model, strategy) as own:
            generate(model, {"input_ids": ids}, own, 21)
        alone.append(own)
    filled = [layer.indices.ge(0).sum(dim=-1) for layer in cache.layers]
    if trigger == "over-budget":
        assert sum(int(layer.sum()) for layer in filled) == 3 * 2 * (30 + 18)
    else:
        assert sum(int(layer.sum()) for layer in filled) == 3 * 2 * (40 + 28)  # compressed with the last token
    assert len({tuple(layer.flatten().tolist()) for layer in filled}) == (1 if allocator.use == Ragged.use else 3)
    for row, own in enumerate(alone):
        for layer, lone in zip(cache.layers, own.layers, strict=True):
            for together, single in zip(layer.indices[row], lone.indices[0], strict=True):
                assert together[together >= 0].tolist() == single[single >= 0].tolist()


def decode(model: PreTrainedModel, cache: kvcomp.CompressedCache, tokens: Sequence[int], batch: int = 1) -> None:
    with torch.no_grad():
        for token in tokens:
            model(input_ids=torch.full((batch, 1), token), past_key_values=cache)


def same(one: kvcomp.CompressedCache, other: kvcomp.CompressedCache, rows: slice = slice(None)) -> None:
    for first, second in zip(one.layers, other.layers, strict=True):
        assert torch.equal(first.indices[rows], second.indices)
        torch.testing.assert_close(first.keys[rows], second.keys)


METHODS = {"h2o": {}, "snapkv": {"scorer.window": 8}, "flowmm": {"merger": "unrotated"}}
AFTER: dict[str, Callable[[kvcomp.CompressedCache, Path], None]] = {
    "snapshot": lambda cache, path: cache.restore(cache.snapshot()),
    "beams": lambda cache, path: cache.reorder_cache(torch.tensor([0])),
    "repeat": lambda cache, path: cache.batch_repeat_interleave(1),
    "select": lambda cache, path: cache.batch_select_indices(torch.tensor([0])),
}


@pytest.mark.parametrize("trigger", ["over-budget", {"every": 6}], ids=str)
@pytest.mark.parametrize("recipe", METHODS)
def test_what_happens_to_a_cache_between_two_tokens_changes_nothing(
    recipe: str, trigger: object, tmp_path: Path
) -> None:
    """Three tokens after a compression at most: queries wait to be looked at."""
    model, inputs = tiny_llama(), text_inputs(40)
    session = kvcomp.attach(model)

    def begun() -> kvcomp.CompressedCache:
        cache = session.cache(recipe, 0.4, trigger=trigger, **METHODS[recipe])
        with torch.no_grad():
            model(**inputs, past_key_values=cache)
        decode(model, cache, range(2, 11))
        return cache

    expected = begun()
    decode(model, expected, range(11, 20))
    for change in AFTER.values():
        cache = begun()
        change(cache, tmp_path)
        decode(model, cache, range(11, 20))
        same(cache, expected)
    cache = begun()
    snapshot = cache.snapshot()
    decode(model, cache, range(30, 37))
    cache.restore(snapshot)
    cache.save(tmp_path / "cache.safetensors")
    loaded = kvcomp.load_cache(tmp_path / "cache.safetensors", model)
    assert loaded.report().bookkeeping_bytes <= cache.report().bookkeeping_bytes + 4096
    for again in (cache, loaded):
        decode(model, again, range(11, 20))
        same(again, expected)
    session.detach()


def test_rows_of_beams_keep_their_queries() -> None:
    model, inputs = tiny_llama(), text_inputs(40)
    with kvcomp.compress(model, "h2o", budget=0.4, trigger={"every": 6}) as cache, torch.no_grad():
        model(**inputs, past_key_values=cache)
        cache.batch_repeat_interleave(2)
        model(input_ids=torch.tensor([[5], [6]]), past_key_values=cache)
        cache.reorder_cache(torch.tensor([1, 1]))
        decode(model, cache, range(2, 9), batch=2)
    with kvcomp.compress(model, "h2o", budget=0.4, trigger={"every": 6}) as alone, torch.no_grad():
        model(**inputs, past_key_values=alone)
        decode(model, alone, [6, *range(2, 9)])
    same(cache, alone, slice(1, 2))
    same(cache, alone, slice(0, 1))


def test_queries_of_cropped_tokens_are_forgotten() -> None:
    model, inputs = tiny_llama(), text_inputs(40)
    with kvcomp.compress(model, "h2o", budget=0.4, trigger={"every": 50}) as cache, torch.no_grad():
        model(**inputs, past_key_values=cache)
        decode(model, cache, [5, 6, 70, 71, 72])
        cache.crop(-3)
        assert (len(cache.layers[0].log.decoded), cache.layers[0].steps) == (2, 2)
        model(input_ids=torch.tensor([[7, 8, 9]]), past_key_values=cache)
    with kvcomp.compress(model, "h2o", budget=0.4, trigger={"every": 50}) as straight, torch.no_grad():
        model(**inputs, past_key_values=straight)
        decode(model, straight, [5, 6])
        model(input_ids=torch.tensor([[7, 8, 9]]), past_key_values=straight)
    same(cache, straight)


def test_decoded_queries_are_let_go_where_only_their_sums_are_read() -> None:
    model = one_layer()
    with kvcomp.compress(model, "h2o", budget={"tokens": 400}, trigger="over-budget") as cache, torch.no_grad():
        model(**text_inputs(20), past_key_values=cache)
        decode(model, cache, range(2, 77))
        assert len(cache.layers[0].log.decoded) < 33
    with kvcomp.compress(model, "h2o", budget={"tokens": 400}) as whole, torch.no_grad():
        model(
            input_ids=torch.cat([text_inputs(20)["input_ids"], torch.arange(2, 66)[None]], dim=1), past_key_values=whole
        )
    (sums,), (expected,) = cache.layers[0].carried.values(), whole.layers[0].carried.values()
    assert sums.shape[2] == 84
    torch.testing.assert_close(sums, expected, rtol=0.0, atol=1e-5)


def test_decoding_costs_nothing_where_nothing_is_compressed_then(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_llama()
    with kvcomp.compress(model, "h2o", budget=0.4) as cache, torch.no_grad():
        model(**text_inputs(30), past_key_values=cache)
        for layer in cache.layers:
            monkeypatch.setattr(layer, "attended", None)
        decode(model, cache, [5, 6])
    assert cache.layers[0].log.tensors() == []
    assert cache.layers[0].tail == 2


def test_deferred_chunks_of_a_later_turn_are_scored_with_their_mass() -> None:
    model = tiny_llama()
    first, more = text_inputs(50)["input_ids"], text_inputs(24, seed=3)["input_ids"]
    kept = []
    for widths in ([24], [11, 13]):
        settings = {"matcher": "nearest", "merger": "mean", "mass_preserving": True, "defer": True}
        with kvcomp.compress(model, "h2o", budget=0.3, **settings) as cache, torch.no_grad():
            model(input_ids=first, past_key_values=cache)
            cache.finish()
            for piece in more.split(widths, dim=1):
                model(input_ids=piece, past_key_values=cache)
            cache.finish()
        kept.append(cache)
    (sums,), (expected,) = (cache.layers[0].carried.values() for cache in kept)
    torch.testing.assert_close(sums, expected, rtol=0.0, atol=1e-5)
    same(*kept)


def test_a_trigger_without_a_selector_is_ignored_with_a_warning() -> None:
    model = tiny_llama()
    ignored = pytest.warns(kvcomp.IgnoredSettingWarning, match="ignores the trigger over-budget")
    with ignored, kvcomp.compress(model, "full", trigger="over-budget") as cache:
        generate(model, text_inputs(20), cache, 4)
    assert cache.layers[0].keys.shape[2] == 23


def test_the_default_is_the_end_of_the_prefill() -> None:
    assert kvcomp.strategy("h2o").trigger == Trigger()
    assert kvcomp.strategy("h2o").dump()["trigger"] == "prefill-end"


def test_a_cache_that_compresses_at_every_token_can_be_cropped() -> None:
    model, inputs = tiny_llama(), text_inputs(40)
    with kvcomp.compress(model, "streaming-llm", budget=0.5, trigger="over-budget") as cache, torch.no_grad():
        model(**inputs, past_key_values=cache)
        with pytest.raises(kvcomp.UnsupportedUseError, match="right after they were compressed"):
            cache.crop(-1)
        decode(model, cache, [5, 6, 7])
        cache.crop(-2)
        assert cache.layers[0].indices[0, 0, -2:].tolist() == [39, 40]
        decode(model, cache, [8, 9, 10])
    assert cache.layers[0].indices[0, 0].tolist() == [0, 1, 2, 3, *range(28, 44)]


SHARED_BY_PROMPT = ["d2o", "meda", "vl-cache", "prefixkv"]


def shares(recipe: str, trigger: object, new: int) -> list[tuple[int, ...]]:
    """Return what each layer holds after the prompt, and after each decoded token."""
    model, held = tiny_llama(), []
    for number, layer in enumerate(model.model.layers):
        layer.self_attn.q_proj.weight.data *= 40 * 4**number  # attention is more peaked in later layers
    with kvcomp.compress(model, recipe, budget=0.3, trigger=trigger) as cache, torch.no_grad():
        ids = text_inputs(80)["input_ids"]
        for _ in range(new + 1):
            ids = model(input_ids=ids, past_key_values=cache).logits[:, -1:].argmax(dim=-1)
            held.append(tuple(layer.slots[0] for layer in cache.report().layers))
    return held


@pytest.mark.parametrize("recipe", SHARED_BY_PROMPT)
def test_what_a_layer_was_given_for_the_prompt_stays_its_own_while_tokens_are_decoded(recipe: str) -> None:
    first, *later = shares(recipe, "over-budget", 40)
    assert len(set(first)) > 1
    assert set(later) == {first}


@pytest.mark.parametrize("recipe", SHARED_BY_PROMPT)
def test_a_budget_that_grows_is_shared_as_that_of_the_prompt_was(recipe: str) -> None:
    first, *later = shares(recipe, {"every": 5}, 200)
    compressed = later[4::5]
    for times, held in enumerate(compressed, start=1):
        total = len(first) * ((80 + 5 * times) * 3 // 10)
        assert sum(held) == total
        exact = [total * slots / sum(first) for slots in first]
        assert (
            max(abs(slots - quota) for slots, quota in zip(held, exact, strict=True)) < 2
        )  # what is protected is kept


@pytest.mark.parametrize("trigger", ["over-budget", {"every": 5}], ids=str)
def test_layers_that_keep_everything_do_so_while_tokens_are_decoded(trigger: object) -> None:
    model, ids = tiny_llama(), text_inputs(60)["input_ids"]
    allocator = {"use": "variance", "skip_layers": [1]}
    with kvcomp.compress(model, "d2o", budget=0.6, trigger=trigger, allocator=allocator) as cache, torch.no_grad():
        for tokens in range(60, 81):
            ids = model(input_ids=ids, past_key_values=cache).logits[:, -1:].argmax(dim=-1)
            assert cache.report().layers[1].slots == (tokens,)
    assert cache.report().layers[0].slots[0] < 40


def test_shares_come_back_with_snapshots_and_files_and_in_the_order_of_rows(tmp_path: Path) -> None:
    model = tiny_llama()
    session = kvcomp.attach(model)
    cache = session.cache("meda", 0.4, trigger="over-budget")
    generate(model, text_inputs(50, batch=2), cache, 3)
    granted, snapshot = [layer.granted for layer in cache.layers], cache.snapshot()
    assert torch.stack(granted).sum(dim=0).tolist() == [[60, 60]] * 2  # three layers of 20 slots
    cache.save(tmp_path / "cache.safetensors")
    cache.batch_select_indices(torch.tensor([1]))
    assert all(torch.equal(layer.granted, held[1:]) for layer, held in zip(cache.layers, granted, strict=True))
    cache.restore(snapshot)
    for found in (cache, kvcomp.load_cache(tmp_path / "cache.safetensors", model)):
        assert all(torch.equal(layer.granted, held) for layer, held in zip(found.layers, granted, strict=True))
    session.detach()
