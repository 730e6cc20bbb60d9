"""Keys are turned back to what they were before their rotary embedding, in every family, whatever happens between."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from inference import generate, left_padded
from models import (
    image_inputs,
    text_inputs,
    tiny_cohere,
    tiny_glm,
    tiny_llama,
    tiny_phi3,
    tiny_qwen3,
    tiny_qwen_vl,
)
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.models.llama import modeling_llama

import kvcomp
from kvcomp.runtime.rotary import attention_modules

FAMILIES = {
    "llama": (tiny_llama, text_inputs(50)),
    "qwen3": (tiny_qwen3, text_inputs(50)),
    "phi3": (tiny_phi3, text_inputs(50)),
    "glm": (tiny_glm, text_inputs(50)),
    "cohere": (tiny_cohere, text_inputs(50)),
    "qwen2.5-vl": (tiny_qwen_vl, image_inputs()),
}
UNROTATED = kvcomp.strategy("flowmm", 0.4, merger="unrotated", matcher="nearest")


class Recorder(kvcomp.Merger):
    """Drops what does not stay, and keeps the views that it saw."""

    rotary = True
    views: list

    def merge(self, layer, pivots, assignment):
        self.views.append(layer)
        return pivots.gather(layer.keys), pivots.gather(layer.values), pivots.gather(layer.counts)


def recording() -> tuple[kvcomp.Strategy, list[kvcomp.LayerView]]:
    recorder = Recorder.model_construct(views=[])
    return replace(kvcomp.strategy("streaming-llm", 0.5), merger=recorder), recorder.views


def without_rotation(model: PreTrainedModel) -> PreTrainedModel:
    """Return the model with every frequency at zero: its first layer's keys are those before the embedding."""
    for name, buffer in model.get_decoder().named_buffers():
        if "inv_freq" in name:
            buffer.zero_()
    return model


@pytest.mark.parametrize("family", FAMILIES)
def test_keys_turned_back_are_those_before_the_embedding(family: str) -> None:
    build, inputs = FAMILIES[family]
    stock = DynamicCache(config=build().config)
    with torch.no_grad():
        without_rotation(build())(**inputs, past_key_values=stock)
    strategy, views = recording()
    model = build()
    with kvcomp.compress(model, strategy) as cache, torch.no_grad():
        model(**inputs, past_key_values=cache)
    first = views[0]
    assert not torch.allclose(first.keys, stock.layers[0].keys, atol=1e-3)
    torch.testing.assert_close(first.rotary.unrotate(first.keys), stock.layers[0].keys, rtol=0.0, atol=2e-6)
    torch.testing.assert_close(first.rotary.rotate(first.rotary.unrotate(first.keys)), first.keys, rtol=0.0, atol=2e-6)


def test_scaled_rotations_are_undone_with_their_scale() -> None:
    config = tiny_llama().config
    yarn = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 1024}
    config.rope_parameters = yarn
    torch.manual_seed(0)
    model = type(tiny_llama())(config).eval()
    strategy, views = recording()
    with kvcomp.compress(model, strategy) as cache, torch.no_grad():
        model(**text_inputs(50), past_key_values=cache)
    attention = model.model.layers[0].self_attn
    hidden = model.model.layers[0].input_layernorm(model.model.embed_tokens(text_inputs(50)["input_ids"]))
    before = attention.k_proj(hidden).view(1, 50, 2, 16).transpose(1, 2)
    scale = views[0].rotary.cos.square() + views[0].rotary.sin.square()
    assert (scale > 1.1).all()
    torch.testing.assert_close(views[0].rotary.unrotate(views[0].keys), before, rtol=0.0, atol=2e-6)


def test_merging_equal_text_before_its_embedding_keeps_it_whatever_the_positions() -> None:
    """Equal tokens have equal keys before the embedding, so each merged key is its pivot's own."""
    model = tiny_llama()
    prompt = {"input_ids": torch.tensor([[5] * 40])}
    kept = {}
    for merger in ("unrotated", "pivot-mean"):
        with kvcomp.compress(model, "flowmm", 0.3, merger=merger, matcher="nearest") as cache, torch.no_grad():
            model(**prompt, past_key_values=cache)
        kept[merger] = cache.layers[0]
    stock = DynamicCache(config=model.config)
    with torch.no_grad():
        model(**prompt, past_key_values=stock)
    whole = stock.layers[0].keys.gather(2, kept["unrotated"].indices.long()[..., None].expand(-1, -1, -1, 16))
    assert kept["unrotated"].counts.amax() > 1
    torch.testing.assert_close(kept["unrotated"].keys, whole, rtol=0.0, atol=2e-6)
    assert not torch.allclose(kept["pivot-mean"].keys, whole, atol=1e-2)


def expected_rotary(model: PreTrainedModel, indices: Tensor) -> tuple[Tensor, Tensor]:
    angles = indices.clamp(min=0)[..., None].float() * model.model.rotary_emb.inv_freq
    return angles.cos(), angles.sin()


def check(model: PreTrainedModel, cache: kvcomp.CompressedCache) -> None:
    """The rotation of every slot is that of its logical position, and all layers share one copy."""
    pointers = set()
    for layer in cache.layers:
        assert layer.rotary.columns == layer.seen
        table = layer.all_slots()
        rotary = layer.rotary.at(table.columns)
        for name, expected in zip(("cos", "sin"), expected_rotary(model, table.indices), strict=True):
            difference = (getattr(rotary, name) - expected).abs().amax(dim=-1)
            assert difference.masked_fill(~table.valid, 0.0).max() <= 1e-5
        pointers |= {tensor.data_ptr() for tensor in layer.rotary.tensors()}
    assert len(pointers) == len(cache.layers[0].rotary.tensors())


CHANGES: dict[str, Callable[[kvcomp.CompressedCache], None]] = {
    "nothing": lambda cache: None,
    "crop into the tail": lambda cache: cache.crop(-2),
    "crop into the prompt": lambda cache: cache.crop(-20),
    "beams": lambda cache: cache.reorder_cache(torch.tensor([1, 1])),
    "repeat": lambda cache: cache.batch_repeat_interleave(2),
    "select": lambda cache: cache.batch_select_indices(torch.tensor([1])),
    "snapshot": lambda cache: cache.restore(cache.snapshot()),
}


PADS = {"beams": [18, 18], "repeat": [0, 0, 18, 18], "select": [18]}  # of each row then; [0, 18] before


@pytest.mark.parametrize("change", CHANGES)
def test_rotations_follow_their_slots(change: str) -> None:
    model = tiny_llama()
    rows = left_padded([text_inputs(tokens, seed=tokens)["input_ids"] for tokens in (50, 32)])
    with kvcomp.compress(model, UNROTATED) as cache:
        generate(model, rows, cache, 5)
        check(model, cache)
        CHANGES[change](cache)
        check(model, cache)
        pads = PADS.get(change, [0, 18])
        batch = len(pads)
        mask = torch.ones(batch, cache.get_seq_length() + 7, dtype=torch.long)
        for row, width in enumerate(pads):
            mask[row, :width] = 0
        ids, positions = text_inputs(7, batch=batch)["input_ids"], mask.cumsum(dim=1)[:, -7:] - 1
        with torch.no_grad():
            model(input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=cache)
        check(model, cache)


def test_a_saved_cache_goes_on_with_its_rotations(tmp_path: Path) -> None:
    model, more = tiny_llama(), text_inputs(9, seed=2)["input_ids"]
    with kvcomp.compress(model, UNROTATED) as cache, torch.no_grad():
        model(**text_inputs(40), past_key_values=cache)
        cache.save(tmp_path / "cache.safetensors")
        model(input_ids=more, past_key_values=cache)
    again = kvcomp.load_cache(tmp_path / "cache.safetensors", model)
    session = kvcomp.attach(model)
    with torch.no_grad():
        model(input_ids=more, past_key_values=again)
    session.detach()
    check(model, again)
    for one, other in zip(cache.layers, again.layers, strict=True):
        assert torch.equal(one.keys, other.keys)


def test_hooks_are_there_only_for_strategies_that_look_and_go_with_the_session() -> None:
    model = tiny_llama()
    modules = list(attention_modules(model.model))
    assert len(modules) == 3
    with kvcomp.compress(model, "flowmm", 0.4) as cache, torch.no_grad():
        model(**text_inputs(20), past_key_values=cache)
        assert not any(module._forward_pre_hooks for module in modules)
        assert cache.layers[0].rotary is None
    with kvcomp.compress(model, UNROTATED) as cache, torch.no_grad():
        model(**text_inputs(20), past_key_values=cache)
        assert all(len(module._forward_pre_hooks) == 1 for module in modules)
    assert not any(module._forward_pre_hooks for module in modules)


def test_rotations_are_let_go_where_nothing_is_compressed_again() -> None:
    model = tiny_llama()
    with kvcomp.compress(model, UNROTATED, turns="append") as cache:
        generate(model, text_inputs(40), cache, 4)
    assert all(layer.rotary is None for layer in cache.layers)


def test_a_rotation_that_is_not_known_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    known = modeling_llama.apply_rotary_pos_emb
    monkeypatch.setattr(modeling_llama, "apply_rotary_pos_emb", lambda q, k, cos, sin: known(q, k, cos, -sin))
    model = tiny_llama()
    session = kvcomp.attach(model)
    with torch.no_grad(), pytest.raises(kvcomp.UnsupportedModelError, match="rotates keys in a way that kvcomp cannot"):
        model(**text_inputs(40), past_key_values=session.cache(UNROTATED))
    session.detach()


def test_a_layer_that_does_not_rotate_merges_keys_as_they_are() -> None:
    model = tiny_llama()
    model.model.layers[0].self_attn.use_rope = False
    strategy, views = recording()
    with kvcomp.compress(model, strategy) as cache, torch.no_grad():
        model(**text_inputs(40), past_key_values=cache)
    assert [view.rotary.cos.shape[-1] for view in views] == [0, 8, 8]
    assert torch.equal(views[0].rotary.unrotate(views[0].keys), views[0].keys)
