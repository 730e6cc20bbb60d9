"""`mass_preserving`: a slot weighs as much as the tokens that it stands for."""

import torch
from inference import quiet_prefill
from models import tiny_llama

import kvcomp


def test_merging_equal_tokens_changes_nothing_when_mass_is_preserved():
    """Without positions, equal tokens have equal keys and values: merged with their mass, attention is what it was."""
    model = tiny_llama()
    model.model.rotary_emb.inv_freq.zero_()
    prompt = {"input_ids": torch.tensor([[5] * 30])}
    session = kvcomp.attach(model)
    settings = {"scorer": {"use": "position", "sinks": 0}, "matcher": "nearest", "merger": "mean"}
    caches = {
        "full": session.cache("full"),
        "plain": session.cache("snapkv", 0.2, **settings),
        "mass": session.cache("snapkv", 0.2, mass_preserving=True, **settings),
    }
    logits = {}
    for name, cache in caches.items():
        with torch.no_grad():
            model(**prompt, past_key_values=cache)
            logits[name] = model(input_ids=torch.tensor([[7]]), past_key_values=cache).logits[0, -1]
    session.detach()
    assert caches["mass"].layers[0].keys.shape[2] == 7
    assert torch.allclose(logits["mass"], logits["full"], atol=1e-5)
    assert not torch.allclose(logits["plain"], logits["full"], atol=1e-3)


def test_mass_changes_nothing_where_nothing_was_merged():
    model = tiny_llama()
    prompt = {"input_ids": torch.arange(2, 42)[None]}
    plain = quiet_prefill(model, prompt, "snapkv", 0.3)
    mass = quiet_prefill(model, prompt, kvcomp.strategy("snapkv", 0.3, mass_preserving=True), None)
    assert torch.equal(plain.layers[1].keys, mass.layers[1].keys)
    assert mass.strategy.mass_preserving
