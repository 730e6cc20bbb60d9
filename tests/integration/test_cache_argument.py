"""A cache may be given by every name that the installed transformers takes, and by no other."""

import pytest
import torch
from models import image_inputs, text_inputs, tiny_llama, tiny_qwen_vl
from transformers import LlamaModel

import kvcomp
from kvcomp.runtime.cache_argument import CACHE, OLD

NAMES = sorted({CACHE, OLD})


def by_generate(model, inputs, cache):
    model.generate(**inputs, **cache, max_new_tokens=1, do_sample=False)


def by_forward(model, inputs, cache):
    with torch.no_grad():
        model(**inputs, **cache)


class Renaming(LlamaModel):
    """A text model that takes its cache by a name of its own."""

    def forward(self, input_ids, memory=None, **kwargs):
        return super().forward(input_ids, **{CACHE: memory}, **kwargs)


@pytest.mark.floor
@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("call", [by_generate, by_forward])
def test_the_name_of_this_transformers_warns_of_nothing(call):
    model, inputs = tiny_llama(), text_inputs(30)
    with kvcomp.compress(model, "kvzip", budget=0.5) as cache:  # which feeds the context again by itself
        call(model, inputs, {CACHE: cache})
        longer = {"input_ids": torch.cat([inputs["input_ids"], torch.full((1, 9), 5)], dim=1)}
        model.generate(**cache.next_turn(model, **longer), max_new_tokens=2, do_sample=False)


@pytest.mark.floor
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("call", [by_generate, by_forward])
def test_images_are_told_from_text_whatever_the_name(call, name):
    model, inputs = tiny_qwen_vl(), image_inputs()
    with kvcomp.compress(model, "flowmm", budget=0.5) as cache:
        call(model, inputs, {name: cache})
    assert all(0 < rho < 1 for layer in cache.report().layers for rho in layer.rho)
    assert cache.first_layer.upcoming_positions() is not None


@pytest.mark.floor
def test_a_text_model_that_takes_its_cache_by_another_name_is_refused():
    model = tiny_llama()
    model.model = Renaming(model.config).eval()
    with (
        pytest.raises(kvcomp.UnsupportedUseError, match=f"whose text model takes it as .*{OLD}"),
        kvcomp.compress(model, "snapkv", budget=0.5) as cache,
        torch.no_grad(),
    ):
        model.model(**text_inputs(30), memory=cache)
