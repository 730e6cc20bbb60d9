"""A model is changed only while a session is open, and left as it was."""

import gc
import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from inference import generate, generate_stock
from models import image_inputs, text_inputs, tiny_llama, tiny_qwen_vl
from transformers import DynamicCache, StoppingCriteriaList

import kvcomp


def left(model) -> dict:
    """What a user could find changed on a model, by the names of its modules."""
    found: dict = {"config": model.config.to_dict(), "generation": model.generation_config.to_dict()}
    for name, module in model.named_modules():
        for attribute, value in vars(module).items():
            if attribute.endswith("_hooks") or "_hooks_" in attribute:
                value = len(value)
            elif isinstance(value, torch.Tensor):  # Qwen's rope_deltas
                value = value.tolist()
            elif attribute in ("_parameters", "_buffers"):
                value = {key: None if held is None else (held.data_ptr(), held._version) for key, held in value.items()}
            elif attribute == "_modules":
                value = {key: id(held) for key, held in value.items()}
            elif hasattr(value, "_attn_implementation"):
                value = (id(value), dict(vars(value)) | dict.fromkeys(value.sub_configs))
            found[f"{name}.{attribute}"] = value
        found[f"{name}.class"] = (type(module), module.training, module.forward.__func__)
    return found


class Stop(Exception):
    """What a user's own code raises."""


@contextmanager
def broken(model, error: type[BaseException], at: int) -> Iterator[None]:
    """Raise in the attention of the second layer, at the given forward."""
    calls: list[int] = []

    def count(*_: object) -> None:
        calls.append(1)
        if len(calls) == at:
            raise error

    handle = model.get_decoder().layers[1].self_attn.register_forward_pre_hook(count)
    try:
        yield
    finally:
        handle.remove()


def plainly(model, inputs, cache) -> None:
    generate(model, inputs, cache, 4)


def stopped(model, inputs, cache) -> None:
    """An error between two tokens, outside the model."""

    def stop(ids, scores, **_):
        raise Stop

    with pytest.raises(Stop):
        generate(model, inputs, cache, 4, stopping_criteria=StoppingCriteriaList([stop]))


def broken_in_the_prompt(model, inputs, cache) -> None:
    with broken(model, Stop, at=1), pytest.raises(Stop):
        generate(model, inputs, cache, 4)


def interrupted_while_decoding(model, inputs, cache) -> None:
    with broken(model, KeyboardInterrupt, at=3), pytest.raises(KeyboardInterrupt):
        generate(model, inputs, cache, 4)


WAYS = [plainly, stopped, broken_in_the_prompt, interrupted_while_decoding]
TURNED = {"merger": {"use": "unrotated", "merger": "mean"}}  # watches every attention module


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
@pytest.mark.parametrize(("recipe", "overrides"), [("flowmm", TURNED), ("kvzip", {})], ids=["rotary", "second pass"])
@pytest.mark.parametrize("build", [tiny_llama, tiny_qwen_vl])
def test_a_model_is_left_as_a_stock_generate_leaves_it(build, recipe, overrides, way):
    model, inputs = build(), text_inputs(30) if build is tiny_llama else image_inputs()
    way(model, inputs, DynamicCache(config=model.config))
    stock = left(model)
    for _ in range(2):
        with kvcomp.compress(model, recipe, budget=0.4, **overrides) as cache:
            way(model, inputs, cache)
            assert left(model) != stock
        assert left(model) == stock
    assert torch.equal(generate(model, inputs, DynamicCache(config=model.config)).sequences, said(build, inputs))


def said(build, inputs) -> torch.Tensor:
    """What a model says that never was in a block."""
    return generate_stock(build(), inputs).sequences


def test_the_model_is_as_before_after_an_exception_of_the_block():
    model = tiny_qwen_vl()
    before = left(model)
    with pytest.raises(ZeroDivisionError), kvcomp.compress(model, "flowmm"):
        raise ZeroDivisionError
    with pytest.raises(kvcomp.BudgetError), kvcomp.compress(model, "flowmm", budget={"bytes": 1}) as cache:
        generate(model, text_inputs(20), cache)
    with pytest.raises(kvcomp.UnknownNameError), kvcomp.compress(model, "flowm"):
        pass
    with pytest.raises(kvcomp.InputError), kvcomp.compress(model, "flowmm", reserve=0):
        pass
    assert left(model)["config"] == before["config"]
    model.model.rope_deltas = None  # generate() left it there
    assert left(model) == before


def test_blocks_nest_and_an_error_inside_ends_only_the_inner():
    model, inputs = tiny_llama(), text_inputs(30)
    before = left(model)
    with kvcomp.compress(model, "snapkv", budget=0.5) as alone:
        expected = generate(model, inputs, alone).sequences
    with kvcomp.compress(model, "snapkv", budget=0.5) as outer:
        with kvcomp.compress(model, "kvzip", budget=0.3) as inner:
            generate(model, inputs, inner, 3)
        with pytest.raises(Stop), kvcomp.compress(model, "flowmm", budget=0.3):
            raise Stop
        assert torch.equal(generate(model, inputs, outer).sequences, expected)
    assert left(model) == before


@pytest.mark.parametrize("recipe", ["flowmm", "ada-kv", "kvzip", "minicache", "pyramidkv"])
@pytest.mark.parametrize("tokens", [1, 7], ids=["decoding", "a second turn"])
def test_a_cache_whose_forward_did_not_end_is_refused_until_it_is_restored(recipe, tokens):
    model, inputs, more = tiny_llama(), text_inputs(30), text_inputs(tokens, seed=5)["input_ids"]
    budget = 0.95 if recipe == "minicache" else 0.4
    with kvcomp.compress(model, recipe, budget=budget) as cache, torch.no_grad():
        model(**inputs, past_key_values=cache)
        snapshot = cache.snapshot()
        expected = model(input_ids=more, past_key_values=cache).logits
        cache.restore(snapshot)
        with broken(model, KeyboardInterrupt, at=1), pytest.raises(KeyboardInterrupt):
            model(**text_inputs(9, seed=6) | {"attention_mask": None}, past_key_values=cache)
        uses = (
            lambda: model(input_ids=more, past_key_values=cache),
            cache.snapshot,
            lambda: cache.save("never-written"),
        )
        for use in uses:
            with pytest.raises(kvcomp.UnsupportedUseError, match=r"did not end.* restore a snapshot, or use a new"):
                use()
        cache.restore(snapshot)
        assert torch.equal(model(input_ids=more, past_key_values=cache).logits, expected)
        cache.reset()
        assert model(**inputs, past_key_values=cache).logits.isfinite().all()


def test_a_part_of_an_attached_model_is_refused():
    model = tiny_llama()
    before, session = left(model), kvcomp.attach(model)
    with pytest.raises(kvcomp.UnsupportedUseError, match="attached once"):
        kvcomp.attach(model.model)
    session.detach()
    kvcomp.attach(model.model).detach()
    assert left(model) == before


def test_sessions_overlap_in_any_order():
    model = tiny_llama()
    before = left(model)
    first = kvcomp.attach(model)
    second = kvcomp.attach(model)
    first.detach()
    first.detach()
    cache = second.cache("snapkv", budget=0.5)
    generate(model, text_inputs(20), cache, 2)
    assert cache.layers[0].keys.shape[2] == 11
    second.detach()
    assert left(model) == before


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
