"""A cache that is saved, restored, and continued in a later turn is the cache that it was."""

import pytest
import torch
from inference import generate, generate_stock, left_padded
from models import IMAGE_TOKEN, VISION_END, VISION_START, image_inputs, text_inputs, tiny_llama, tiny_qwen_vl

import kvcomp
from kvcomp.runtime.cache_argument import CACHE

QUESTIONS = [text_inputs(tokens, seed=tokens)["input_ids"] for tokens in (5, 9, 3)]


def _ask(model, cache, prompt, question) -> torch.Tensor:
    inputs = {"input_ids": torch.cat([prompt, question], dim=1)}
    return generate(model, inputs, cache, 5).sequences[0, inputs["input_ids"].shape[1] :]


@pytest.mark.parametrize("turns", ["recompress", "append"])
def test_many_questions_against_one_context_are_each_asked_as_the_first(turns):
    model, inputs = tiny_llama(), text_inputs(60)
    session = kvcomp.attach(model)

    def context() -> kvcomp.CompressedCache:
        cache = session.cache("flowmm", 0.3, turns=turns)
        with torch.no_grad():
            model(**inputs, past_key_values=cache)
        return cache

    fresh = [_ask(model, context(), inputs["input_ids"], question) for question in QUESTIONS]
    cache = context()
    snapshot = cache.snapshot()
    report = cache.report()
    for question, expected in zip(QUESTIONS, fresh, strict=True):
        assert torch.equal(_ask(model, cache, inputs["input_ids"], question), expected)
        cache.restore(snapshot)
        assert cache.report() == report
    session.detach()


def test_snapshots_of_two_branches_do_not_overwrite_each_other():
    model, inputs = tiny_llama(), text_inputs(40)
    with kvcomp.compress(model, "snapkv", budget=0.5) as cache, torch.no_grad():
        model(**inputs, past_key_values=cache)
        trunk = cache.snapshot()
        model(input_ids=torch.tensor([[5]]), past_key_values=cache)
        branch = cache.snapshot()
        keys = cache.layers[0].keys.clone()
        cache.restore(trunk)
        model(input_ids=torch.tensor([[6]]), past_key_values=cache)
        assert not torch.equal(cache.layers[0].keys, keys)
        cache.restore(branch)
        assert torch.equal(cache.layers[0].keys, keys)


@pytest.mark.parametrize("recipe", ["flowmm", "h2o", "d2o", "kvmerge", "full"])
def test_a_saved_cache_goes_on_as_if_it_had_not_been_saved(recipe, tmp_path):
    model = tiny_llama()
    rows = left_padded([text_inputs(tokens, seed=tokens)["input_ids"] for tokens in (40, 25)])
    more = text_inputs(7, seed=3, batch=2)["input_ids"]
    with kvcomp.compress(model, recipe, budget=None if recipe == "full" else 0.4) as cache, torch.no_grad():
        first = generate(model, rows, cache, 4).sequences
        cache.save(tmp_path / "cache.safetensors")
        loaded = kvcomp.load_cache(tmp_path / "cache.safetensors", model)
        assert loaded.report().layers == cache.report().layers
        assert loaded.strategy == cache.strategy
        turn = {"input_ids": torch.cat([first, more], dim=1)}
        turn["attention_mask"] = torch.cat([rows["attention_mask"], torch.ones(2, 11, dtype=torch.long)], dim=1)
        assert torch.equal(generate(model, turn, loaded).sequences, generate(model, turn, cache).sequences)


def test_what_cannot_be_saved_or_loaded_says_why(tmp_path):
    model = tiny_llama()
    with kvcomp.compress(model, "snapkv", budget=0.5, defer=True) as cache, torch.no_grad():
        with pytest.raises(kvcomp.UnsupportedUseError, match="empty"):
            cache.save(tmp_path / "cache")
        model(**text_inputs(20), past_key_values=cache)
        with pytest.raises(kvcomp.UnsupportedUseError, match="finish"):
            cache.save(tmp_path / "cache")
    (tmp_path / "words").write_text("not a cache")
    for name in ("words", "nothing"):
        with pytest.raises(kvcomp.InputError, match="readable safetensors file"):
            kvcomp.load_cache(tmp_path / name, model)


def _second_turn(first: torch.Tensor, inputs: dict[str, torch.Tensor], image: bool) -> dict[str, torch.Tensor]:
    """Return the whole conversation after a first turn, with one more image or none."""
    more = [7, 8, VISION_START, *[IMAGE_TOKEN] * 4, VISION_END, 9] if image else [7, 8, 9]
    ids = torch.cat([first, torch.tensor([more])], dim=1)
    turn = {**inputs, "input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if image:
        pixels = torch.randn(16, inputs["pixel_values"].shape[1], generator=torch.Generator().manual_seed(9))
        turn["pixel_values"] = torch.cat([inputs["pixel_values"], pixels])
        turn["image_grid_thw"] = torch.cat([inputs["image_grid_thw"], torch.tensor([[1, 4, 4]])])
    return turn | {"mm_token_type_ids": (ids == IMAGE_TOKEN).int()}


@pytest.mark.parametrize("image", [False, True], ids=["text", "new image"])
def test_a_later_turn_continues_from_its_own_positions_with_other_requests_between(image):
    model, inputs = tiny_qwen_vl(), image_inputs()
    session = kvcomp.attach(model)
    cache, other = session.cache("flowmm", 1.0), session.cache("flowmm", 1.0)
    first = generate(model, inputs, cache, 4).sequences
    generate(model, image_inputs(images=6, seed=4), other, 4)  # leaves its own rope_deltas on the model
    turn = _second_turn(first, inputs, image)
    arguments = cache.next_turn(model, **turn)
    assert ("pixel_values" in arguments) == image
    output = model.generate(**arguments, max_new_tokens=6, do_sample=False)
    session.detach()
    assert torch.equal(output, generate_stock(model, turn, 6).sequences)


def test_a_turn_that_adds_nothing_is_refused():
    model, inputs = tiny_llama(), text_inputs(20)
    with kvcomp.compress(model, "snapkv", budget=0.5) as cache:
        said = generate(model, inputs, cache, 3).sequences
        with pytest.raises(kvcomp.InputError, match="whole conversation, more than the 22 tokens"):
            cache.next_turn(model, **inputs)
        turn = cache.next_turn(model, input_ids=torch.cat([said, torch.tensor([[7, 8]])], dim=1))
    assert turn[CACHE] is cache
    assert "position_ids" not in turn


def test_a_snapshot_in_another_cache_shares_no_room():
    model, inputs = tiny_llama(), text_inputs(40)
    session = kvcomp.attach(model)
    first, second = session.cache("snapkv", 0.5), session.cache("snapkv", 0.5)
    token = {"input_ids": torch.tensor([[5]])}
    with torch.no_grad():
        model(**inputs, past_key_values=first)
        model(**token, past_key_values=first)
        second.restore(first.snapshot())
        model(input_ids=torch.tensor([[6]]), past_key_values=first)
        keys = first.layers[0].keys.clone()
        model(input_ids=torch.tensor([[7]]), past_key_values=second)
    session.detach()
    assert torch.equal(first.layers[0].keys, keys)
    assert torch.equal(second.layers[0].keys[:, :, :-1], keys[:, :, :-1])


def test_images_of_earlier_turns_do_not_stop_a_batch_from_going_on():
    model, inputs = tiny_qwen_vl(), image_inputs()
    twice = {name: torch.cat([value, value]) for name, value in inputs.items()}
    session = kvcomp.attach(model)
    cache = session.cache("flowmm", 1.0)
    first = generate(model, twice, cache, 4).sequences
    ids = torch.cat([first, torch.tensor([[7, 8, 9]] * 2)], dim=1)
    turn = twice | {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    turn["mm_token_type_ids"] = (ids == IMAGE_TOKEN).int()
    output = model.generate(**cache.next_turn(model, **turn), max_new_tokens=5, do_sample=False)
    session.detach()
    assert torch.equal(output, generate_stock(model, turn, 5).sequences)


@pytest.mark.parametrize("recipe", ["flowmm", "full"])
@pytest.mark.parametrize("images", [0, 3])
def test_a_plain_second_turn_of_a_multimodal_model_is_that_of_the_stock_cache(recipe, images):
    model = tiny_qwen_vl()
    inputs = image_inputs(images=images) if images else text_inputs(20)
    with kvcomp.compress(model, recipe, budget=1.0) as cache:
        first = generate(model, inputs, cache, 4).sequences
        turn = {"input_ids": torch.cat([first, torch.tensor([[7, 8, 9]])], dim=1)}
        output = generate(model, turn, cache, 4).sequences
    stock = generate_stock(model, inputs, 4)
    assert torch.equal(output, generate(model, turn, stock.past_key_values, 4).sequences)


def test_a_new_image_needs_no_token_types():
    model, inputs = tiny_qwen_vl(), image_inputs()
    session = kvcomp.attach(model)
    cache = session.cache("flowmm", 1.0)
    turn = _second_turn(generate(model, inputs, cache, 4).sequences, inputs, image=True)
    bare = {name: value for name, value in turn.items() if name != "mm_token_type_ids"}
    with_types, without = cache.next_turn(model, **turn), cache.next_turn(model, **bare)
    session.detach()
    assert torch.equal(with_types["position_ids"], without["position_ids"])


def test_a_snapshot_of_another_strategy_is_refused():
    model, inputs = tiny_llama(), text_inputs(20)
    session = kvcomp.attach(model)
    first, second = session.cache("snapkv", 0.5), session.cache("h2o", 0.5)
    generate(model, inputs, first, 2)
    with pytest.raises(kvcomp.UnsupportedUseError, match=r"'snapkv' at 0\.5, and this one has 'h2o'"):
        second.restore(first.snapshot())
    session.detach()


def test_positions_after_a_crop_across_images_are_those_of_the_shorter_prompt():
    model, inputs = tiny_qwen_vl(), image_inputs(images=2)
    tokens = inputs["input_ids"].shape[1]
    with kvcomp.compress(model, "flowmm", budget=1.0) as cache, torch.no_grad():
        model(**inputs, past_key_values=cache)
        cache.crop(-7)  # the last text and the image's end marker stay away, the images themselves are before
        turn = cache.next_turn(model, input_ids=torch.cat([inputs["input_ids"][:, :-7], torch.tensor([[7, 8]])], dim=1))
    whole = model.model.get_rope_index(
        **{name: inputs[name] for name in ("input_ids", "image_grid_thw", "mm_token_type_ids")}
    )[0]
    assert turn["position_ids"][:, 0, tokens - 7].tolist() == [int(whole[:, 0, : tokens - 7].max()) + 1] * 3
