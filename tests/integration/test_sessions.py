"""A model is changed only while a session is open, and left as it was."""

import gc
import threading
import weakref

import pytest
import torch
from inference import generate, generate_stock
from models import image_inputs, text_inputs, tiny_llama, tiny_qwen_vl
from transformers import DynamicCache

import kvcomp


def _state(model) -> tuple:
    hooks = [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()]
    return [module.config._attn_implementation for module in model.modules() if hasattr(module, "config")], hooks


@pytest.mark.parametrize("build", [tiny_llama, tiny_qwen_vl])
def test_the_model_is_as_before_after_the_block(build):
    model = build()
    before = _state(model)
    with kvcomp.compress(model, "flowmm", budget=0.5) as cache:
        assert _state(model) != before
        generate(model, text_inputs(20), cache)
    assert _state(model) == before


def test_the_model_is_as_before_after_an_exception():
    model = tiny_llama()
    before = _state(model)
    with pytest.raises(ZeroDivisionError), kvcomp.compress(model, "flowmm"):
        raise ZeroDivisionError
    assert _state(model) == before


def test_sessions_overlap_in_any_order():
    model = tiny_llama()
    before = _state(model)
    first = kvcomp.attach(model)
    second = kvcomp.attach(model)
    first.detach()
    first.detach()
    cache = second.cache("snapkv", budget=0.5)
    generate(model, text_inputs(20), cache, 2)
    assert cache.layers[0].keys.shape[2] == 11
    second.detach()
    assert _state(model) == before


def test_a_stock_cache_works_as_before_while_a_session_is_open():
    model, inputs = tiny_qwen_vl(), image_inputs()
    expected = generate_stock(model, inputs)
    session = kvcomp.attach(model)
    output = generate(model, inputs, DynamicCache(config=model.config))
    session.detach()
    assert torch.equal(output.sequences, expected.sequences)
    assert all(map(torch.equal, output.logits, expected.logits))


def test_requests_in_threads_do_not_meet():
    model = tiny_llama()
    jobs = [("flowmm", 0.3), ("snapkv", 0.2), ("h2o", 0.5), ("random", 0.4)]
    prompts = [text_inputs(40 + 10 * place, seed=place) for place in range(len(jobs))]

    def run(place: int) -> torch.Tensor:
        recipe, budget = jobs[place]
        return generate(model, prompts[place], session.cache(recipe, budget)).sequences

    session = kvcomp.attach(model)
    alone = [run(place) for place in range(len(jobs))]
    together: dict[int, torch.Tensor] = {}
    threads = [threading.Thread(target=lambda p=p: together.__setitem__(p, run(p))) for p in range(len(jobs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    session.detach()
    assert all(torch.equal(together[place], alone[place]) for place in range(len(jobs)))


def test_a_cache_is_readable_after_the_block_and_cannot_be_fed():
    model, inputs = tiny_llama(), text_inputs(30)
    with kvcomp.compress(model, "snapkv", budget=0.5) as cache:
        generate(model, inputs, cache, 1)
    assert cache.layers[0].values.shape == (1, 2, 15, 16)
    assert "snapkv at budget 0.5" in str(cache.report())
    with pytest.raises(kvcomp.UnsupportedUseError, match="inside its `with"), torch.no_grad():
        model(input_ids=inputs["input_ids"][:, :1], past_key_values=cache)


def test_the_full_keys_of_a_layer_are_freed_when_it_is_compressed():
    model, inputs = tiny_llama(), text_inputs(2000)
    with kvcomp.compress(model, "flowmm", budget=0.1) as cache, torch.no_grad():
        model(**inputs, past_key_values=cache)
        assert all(layer.storage.nbytes() == 2 * 2 * 200 * 16 * 4 for layer in cache.layers)


def test_arguments_may_be_positional():
    model, inputs = tiny_qwen_vl(), image_inputs()
    by_name = {"pixel_values": inputs["pixel_values"], "image_grid_thw": inputs["image_grid_thw"]}
    with kvcomp.compress(model, "flowmm", budget=0.3) as cache, torch.no_grad():
        model(inputs["input_ids"], inputs["attention_mask"], None, cache, **by_name)
    assert cache.report().layers[0].rho[0] > 0


@pytest.mark.parametrize("recipe", ["flowmm", "h2o", "full"])
def test_a_dropped_cache_is_freed_at_once(recipe):
    model, inputs = tiny_llama(), text_inputs(60)
    gc.disable()
    try:
        with kvcomp.compress(model, recipe) as cache:
            generate(model, inputs, cache)
        alive = weakref.ref(cache.layers[0])
        del cache
        assert alive() is None
    finally:
        gc.enable()
