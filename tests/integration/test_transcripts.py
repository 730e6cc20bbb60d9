"""A later turn begins with the tokens that the cache has seen, whatever became of it in between."""

import pytest
import torch
from inference import generate, left_padded
from models import image_inputs, text_inputs, tiny_llama, tiny_qwen_vl

import kvcomp
from kvcomp.runtime.cache_argument import CACHE

SAID = 6
SEEN = 20 + SAID - 1  # the last token that is generated has not been fed


def _conversed(session, model, recipe="snapkv", **settings):
    cache = session.cache(recipe, 0.5, **settings)
    return cache, generate(model, text_inputs(20), cache, SAID).sequences


def _replaced(ids, column, row=0):
    changed = ids.clone()
    changed[row, column] = (changed[row, column] + 1) % 80
    return changed


def _then(ids, tokens=4):
    return torch.cat([ids, text_inputs(tokens, seed=3, batch=len(ids))["input_ids"]], dim=1)


@pytest.fixture
def model():
    return tiny_llama()


@pytest.fixture
def session(model):
    session = kvcomp.attach(model)
    yield session
    session.detach()


@pytest.mark.parametrize("column", [0, 7, 19, 20, SEEN - 1])
def test_a_turn_that_rewrites_what_was_seen_is_refused_at_the_token(model, session, column):
    cache, said = _conversed(session, model)
    other = _replaced(said, column)
    given, seen = int(other[0, column]), int(said[0, column])
    message = f"the {SEEN} tokens .* from token {column} on it does not: id {given} was given, .* has seen {seen}"
    with pytest.raises(kvcomp.InputError, match=message):
        cache.next_turn(model, input_ids=_then(other))


def test_what_the_cache_has_not_seen_may_differ(model, session):
    cache, said = _conversed(session, model)
    turn = cache.next_turn(model, input_ids=_then(_replaced(said, SEEN)))
    assert turn[CACHE] is cache


def test_a_cropped_cache_no_longer_knows_what_was_cropped(model, session):
    cache = session.cache("full")
    said = generate(model, text_inputs(20), cache, SAID).sequences
    cache.crop(-3)
    cache.next_turn(model, input_ids=_then(_replaced(said, SEEN - 3)))
    with pytest.raises(kvcomp.InputError, match=f"from token {SEEN - 4} on"):
        cache.next_turn(model, input_ids=_then(_replaced(said, SEEN - 4)))


@pytest.mark.parametrize(
    "take", [lambda cache, rows: cache.reorder_cache(rows), lambda cache, rows: cache.batch_select_indices(rows)]
)
def test_rows_are_known_in_the_order_in_which_they_are_held(model, session, take):
    cache = session.cache("snapkv", 0.5)
    said = generate(model, text_inputs(20, batch=2), cache, SAID).sequences
    assert not torch.equal(said[0], said[1])
    take(cache, torch.tensor([1, 0]))
    cache.next_turn(model, input_ids=_then(said.flip(0)))
    with pytest.raises(kvcomp.InputError, match="from token 0 of row"):
        cache.next_turn(model, input_ids=_then(said))
    with pytest.raises(kvcomp.InputError, match="from token 8 of row 1 on"):
        cache.next_turn(model, input_ids=_then(_replaced(said.flip(0), 8, row=1)))


def test_beams_are_known_as_they_ended(model, session):
    cache = session.cache("snapkv", 0.5)
    settings = {"num_beams": 2, "num_return_sequences": 2, "eos_token_id": None}
    said = generate(model, text_inputs(20), cache, SAID, **settings).sequences
    held = cache.first_layer.transcript.ids
    assert held.shape == (2, SEEN)
    assert {tuple(row) for row in held.tolist()} >= {tuple(said[0, :SEEN].tolist())}


def test_padding_is_not_compared(model, session):
    rows = left_padded([text_inputs(20)["input_ids"], text_inputs(14, seed=1)["input_ids"]])
    cache = session.cache("snapkv", 0.5)
    said = generate(model, rows, cache, SAID).sequences
    turn = _then(said)
    turn[1, :6] = 71  # another padding token than before
    mask = torch.ones_like(turn)
    mask[1, :6] = 0
    cache.next_turn(model, input_ids=turn, attention_mask=mask)
    with pytest.raises(kvcomp.InputError, match="from token 0 of row 1 on"):
        cache.next_turn(model, input_ids=turn)


def test_snapshots_and_files_know_what_they_hold(model, session, tmp_path):
    cache, said = _conversed(session, model)
    held = cache.snapshot()
    cache.save(tmp_path / "cache.safetensors")
    generate(model, {"input_ids": _then(said)}, cache, 3)
    with pytest.raises(kvcomp.InputError, match=f"from token {SEEN + 1} on"):
        cache.next_turn(model, input_ids=_then(_replaced(_then(said), SEEN + 1)))
    cache.restore(held)
    for found in (cache, kvcomp.load_cache(tmp_path / "cache.safetensors", model)):
        found.next_turn(model, input_ids=_then(_replaced(_then(said), SEEN + 1)))
        with pytest.raises(kvcomp.InputError, match="from token 3 on"):
            found.next_turn(model, input_ids=_then(_replaced(said, 3)))


def test_a_cache_that_was_reset_knows_nothing(model, session):
    cache, _ = _conversed(session, model)
    cache.reset()
    generate(model, text_inputs(12, seed=9), cache, 2)
    with pytest.raises(kvcomp.InputError, match=r"the 13 tokens .* from token 0 on"):
        cache.next_turn(model, input_ids=_then(text_inputs(20)["input_ids"]))


def test_tokens_that_came_as_embeddings_may_be_any(model, session):
    ids = text_inputs(20)["input_ids"]
    cache = session.cache("snapkv", 0.5)
    with torch.no_grad():
        model(inputs_embeds=model.get_input_embeddings()(ids), past_key_values=cache)
        model(input_ids=torch.tensor([[5]]), past_key_values=cache)
    turn = torch.cat([ids, torch.tensor([[5]])], dim=1)
    cache.next_turn(model, input_ids=_then(_replaced(turn, 4)))
    with pytest.raises(kvcomp.InputError, match="from token 20 on"):
        cache.next_turn(model, input_ids=_then(_replaced(turn, 20)))


def test_compiled_steps_are_not_known_and_shift_nothing(model, session):
    cache, said = _conversed(session, model, reserve=30, compiled=True)
    turn = _then(said)
    generate(model, {"input_ids": turn}, cache, 3)
    assert cache.first_layer.transcript.ids[0, 20:SEEN].eq(-1).all()
    for column in (3, SEEN + 2):
        with pytest.raises(kvcomp.InputError, match=f"from token {column} on"):
            cache.next_turn(model, input_ids=_then(_replaced(turn, column), 9))
    cache.next_turn(model, input_ids=_then(_replaced(turn, 21), 9))


def test_a_long_answer_is_known_to_its_end(model, session):
    cache = session.cache("snapkv", 0.5)
    said = generate(model, text_inputs(20), cache, 150).sequences
    assert torch.equal(cache.first_layer.transcript.ids, said[:, :-1].int())


def test_another_conversation_with_images_is_refused_before_its_media_are_looked_at():
    model = tiny_qwen_vl()
    inputs = image_inputs(images=2)
    with kvcomp.compress(model, "flowmm", budget=0.5) as cache:
        said = generate(model, inputs, cache, SAID).sequences
        others = image_inputs(images=3, seed=8)
        longer = {**others, "input_ids": _then(others["input_ids"], said.shape[1])}
        longer["mm_token_type_ids"] = torch.zeros_like(longer["input_ids"])
        longer["attention_mask"] = torch.ones_like(longer["input_ids"])
        with pytest.raises(kvcomp.InputError, match="must begin with the"):
            cache.next_turn(model, **longer)


def test_a_mask_may_be_left_out_and_must_be_of_all_tokens(model, session):
    cache, said = _conversed(session, model)
    turn = cache.next_turn(model, input_ids=_then(said), attention_mask=None)
    assert turn["attention_mask"].shape == _then(said).shape
    with pytest.raises(kvcomp.InputError, match=r"mask must be of all tokens, \(1, 30\), got \(1, 5\)"):
        cache.next_turn(model, input_ids=_then(said), attention_mask=torch.ones(1, 5))


def test_what_a_shared_cache_has_read_is_known_to_those_that_take_it_over(model, session):
    shared = session.shared_cache(["snapkv"])
    ids = text_inputs(20)["input_ids"]
    with torch.no_grad():
        model(input_ids=ids, past_key_values=shared)
    cache = session.cache("snapkv", 0.5)
    cache.restore(shared.snapshot())
    cache.next_turn(model, input_ids=_then(ids))
    with pytest.raises(kvcomp.InputError, match="from token 3 on"):
        cache.next_turn(model, input_ids=_then(_replaced(ids, 3)))


def test_embeddings_are_not_held_after_their_forward(model, session):
    cache = session.cache("snapkv", 0.5)
    with torch.no_grad():
        model.model(inputs_embeds=model.get_input_embeddings()(text_inputs(20)["input_ids"]), past_key_values=cache)
    held = [entry for entry in vars(cache).values() if isinstance(entry, torch.Tensor)]
    assert not held
