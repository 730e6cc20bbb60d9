"""Every recipe works with tensors on an accelerator, a pretended one, and does there what it does on a CPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from inference import RECIPES, generate_compressed, left_padded
from models import image_inputs, text_inputs, tiny_llama, tiny_qwen_vl
from pretend_device import OnDevice, moved, on_cpu, on_device, pretending
from skewed import skewed
from transformers import PreTrainedModel
from varlen import play_varlen

import kvcomp

BATCH = left_padded([text_inputs(tokens, seed=tokens)["input_ids"] for tokens in (48, 31, 12)])
IMAGES = image_inputs()


@pytest.fixture(scope="module")
def models() -> dict[Callable[[], PreTrainedModel], PreTrainedModel]:
    """The tiny models on the device."""
    return {make: moved(make()) for make in (tiny_llama, tiny_qwen_vl)}


def test_the_pretended_device_refuses_what_a_real_one_refuses():
    with pretending() as device:
        there = torch.arange(3.0, device="cuda")
        for mixed in (
            lambda: there + torch.ones(3),
            lambda: torch.ones(3)[there.long()],
            lambda: there.index_select(0, torch.tensor(0)),
        ):
            with pytest.raises(RuntimeError, match="on the CPU"):
                mixed()
        assert on_cpu(there * torch.tensor(2.0)).tolist() == [0.0, 2.0, 4.0]
        assert there.sum().item() == 3.0
        there[there > 1] = 0.0
    assert (device.waits.total(), device.uploads.total()) == (1, 0)


def check_same(here: PreTrainedModel, there: PreTrainedModel, inputs: Any, strategy: Any, budget: Any = None) -> None:
    """A model on the CPU and itself on the device say the same to rounding, and hold the same slots and bytes."""
    expected, cache = generate_compressed(here, inputs, strategy, budget, new=3)
    with pretending():
        output, mine = generate_compressed(there, on_device(inputs), strategy, budget, new=3)
        slots, bookkeeping = read(mine), [entry for layer in mine.layers for entry in layer.bookkeeping()]
        assert mine.report().allocated_bytes == cache.report().allocated_bytes
    assert torch.equal(on_cpu(output.sequences), expected.sequences)
    for logits, others in zip(output.logits, expected.logits, strict=True):
        assert torch.allclose(on_cpu(logits), others, atol=2e-5 if here.dtype == torch.float32 else 0.05)
    assert all(torch.equal(on_cpu(entry), other) for entry, other in zip(slots, read(cache), strict=True))
    assert all(isinstance(entry, OnDevice) for entry in bookkeeping if entry.dim() > 1)


def read(cache: kvcomp.CompressedCache) -> list[torch.Tensor]:
    """Return indices and counts of all layers."""
    return [entry for layer in cache.layers for entry in (layer.indices, layer.counts)]


@pytest.mark.filterwarnings("ignore::kvcomp.IgnoredSettingWarning")
@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_does_on_the_device_what_it_does_on_a_cpu(recipe, models):
    check_same(tiny_llama(), models[tiny_llama], BATCH, recipe, "0.4 or smallest")


@pytest.mark.parametrize("recipe", ["flowmm", "kvzip", "vl-cache", "expected-attention"])
def test_images_are_on_the_device_too(recipe, models):
    check_same(tiny_qwen_vl(), models[tiny_qwen_vl], IMAGES, recipe, 0.4)


def test_packed_heads_go_through_variable_length_attention(monkeypatch):
    windows = play_varlen(monkeypatch)
    here, there = tiny_llama().bfloat16(), moved(tiny_llama().bfloat16())
    check_same(here, there, text_inputs(60), skewed("snapkv", 0.4))
    assert set(windows) == {(-1, -1)}


def test_what_becomes_of_a_cache_stays_on_the_device(models, tmp_path):
    model = models[tiny_llama]
    with pretending(), kvcomp.compress(model, skewed("snapkv", 0.4)) as cache, torch.no_grad():
        model(**on_device(text_inputs(60)), past_key_values=cache)
        context, before = cache.snapshot(), read(cache)
        decode(model, cache, on_device(torch.tensor([[5]])), 3)
        cache.crop(-1)
        cache.offload(0, only_non_sliding=False)
        cache.restore(context)
        cache.save(tmp_path / "cache.safetensors")
        cache.reorder_cache(on_device(torch.tensor([0])))
        assert all(torch.equal(on_cpu(entry), on_cpu(old)) for entry, old in zip(read(cache), before, strict=True))


# --- what a decoded token waits for ---


def waits_per_token(model: PreTrainedModel, strategy: Any, **settings: Any) -> tuple[float, float]:
    """Return how often a decoded token waited for the device, and how often it brought numbers there."""
    with pretending() as device, kvcomp.compress(model, strategy, **settings) as cache, torch.no_grad():
        token = model(**on_device(text_inputs(60)), past_key_values=cache).logits[:, -1:].argmax(dim=-1)
        token = decode(model, cache, token, 2)  # buffers grow at the first
        before = device.waits.total(), device.uploads.total()
        decode(model, cache, token, 4)
        after = device.waits.total(), device.uploads.total()
    return (after[0] - before[0]) / 4, (after[1] - before[1]) / 4


def decode(model: PreTrainedModel, cache: kvcomp.CompressedCache, token: torch.Tensor, new: int) -> torch.Tensor:
    for _ in range(new):
        token = model(input_ids=token, past_key_values=cache, use_cache=True).logits[:, -1:].argmax(dim=-1)
    return token


@pytest.mark.parametrize("recipe", ["flowmm", "snapkv", "h2o", "d2o", "kivi", "minicache"])
def test_a_decoded_token_waits_for_nothing(recipe, models):
    assert waits_per_token(models[tiny_llama], recipe, budget="0.4 or smallest") == (0, 0)


@pytest.mark.parametrize("strategy", ["flowmm", skewed("snapkv", 0.4)], ids=["flowmm", "heads that differ"])
def test_a_step_over_fixed_slots_waits_for_nothing(strategy, models):
    budget = 0.4 if strategy == "flowmm" else None
    assert waits_per_token(models[tiny_llama], strategy, budget=budget, reserve=12, compiled=True) == (0, 0)


def test_packed_heads_wait_for_nothing_where_the_kernel_takes_them(models, monkeypatch):
    strategy = skewed("snapkv", 0.4)
    layers = len(models[tiny_llama].model.layers)
    assert waits_per_token(models[tiny_llama], strategy) == (0, layers)  # padded in float32, by one tensor of places
    play_varlen(monkeypatch)
    assert waits_per_token(moved(tiny_llama().bfloat16()), strategy) == (0, 0)
