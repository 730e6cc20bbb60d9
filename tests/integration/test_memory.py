"""What a matcher remembers from one compression to the next: D2O's running threshold."""

import pytest
import torch
from inference import left_padded
from models import text_inputs, tiny_llama

import kvcomp

D2O = {"allocator": "uniform"}


def _rows():
    return left_padded([text_inputs(tokens, seed=tokens)["input_ids"] for tokens in (50, 31)])


def _turn(model, cache, inputs):
    with torch.no_grad():
        model(**inputs, past_key_values=cache)
    return [layer.memory for layer in cache.layers]


def _next(inputs, tokens=12, seed=7):
    more = text_inputs(tokens, seed=seed, batch=2)["input_ids"]
    mask = torch.cat([inputs["attention_mask"], torch.ones_like(more)], dim=1)
    return {"input_ids": more, "attention_mask": mask}


def _two_turns(model, beta):
    inputs = _rows()
    with kvcomp.compress(model, "d2o", budget=0.4, **D2O, **{"matcher.beta": beta}) as cache:
        return _turn(model, cache, inputs), _turn(model, cache, _next(inputs))


def test_the_threshold_is_a_running_mean_of_each_layer_and_row():
    model = tiny_llama()
    first, latest = _two_turns(model, 1.0)  # which forgets: the mean of the latest compression
    same, mixed = _two_turns(model, 0.7)
    for one, other, now, running in zip(first, same, latest, mixed, strict=True):
        assert one.shape == (2,)
        assert torch.equal(one, other)
        assert bool((now != one).all())
        torch.testing.assert_close(running, 0.7 * now + 0.3 * one)


def test_rows_of_a_batch_remember_what_they_would_alone():
    model, inputs = tiny_llama(), _rows()
    with kvcomp.compress(model, "d2o", budget=0.4, **D2O) as cache:
        together = _turn(model, cache, inputs)
    for row in range(2):
        held = inputs["attention_mask"][row].bool()
        with kvcomp.compress(model, "d2o", budget=0.4, **D2O) as cache:
            alone = _turn(model, cache, {"input_ids": inputs["input_ids"][row, held][None]})
        for one, other in zip(together, alone, strict=True):
            torch.testing.assert_close(one[row : row + 1], other)


@pytest.mark.parametrize("way", ["snapshot", "file"])
def test_a_cache_that_comes_back_remembers(way, tmp_path):
    model, inputs = tiny_llama(), _rows()
    with kvcomp.compress(model, "d2o", budget=0.4, **D2O) as cache:
        _turn(model, cache, inputs)
        snapshot = cache.snapshot()
        cache.save(tmp_path / "cache.safetensors")
        expected = _turn(model, cache, _next(inputs))
        if way == "snapshot":
            cache.restore(snapshot)
        else:
            cache = kvcomp.load_cache(tmp_path / "cache.safetensors", model)
        assert all(map(torch.equal, _turn(model, cache, _next(inputs)), expected))


def test_memory_goes_with_its_row_and_ends_with_the_request():
    model, inputs = tiny_llama(), _rows()
    with kvcomp.compress(model, "d2o", budget=0.4, **D2O) as cache:
        before = _turn(model, cache, inputs)
        cache.reorder_cache(torch.tensor([1, 0]))
        for layer, memory in zip(cache.layers, before, strict=True):
            assert torch.equal(layer.memory, memory.flip(0))
        cache.reset()
        assert all(layer.memory is None for layer in cache.layers)
        assert all(map(torch.equal, _turn(model, cache, inputs), before))
