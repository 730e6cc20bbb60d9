"""What is observed of a real model's attention is what an eager run of it shows."""

import pytest
import torch
from generators import rows_of
from kvcomp_strategies.observations.cross_modal_flow import CrossModalFlow
from models import IMAGE_TOKEN, image_inputs, text_inputs, tiny_llama, tiny_qwen3, tiny_qwen_vl

import kvcomp

MODELS = {
    "llama": (tiny_llama, text_inputs(300)),
    "qwen3": (tiny_qwen3, text_inputs(300)),
    "qwen2.5-vl": (tiny_qwen_vl, image_inputs(images=20)),
}


def _eager_attention(build, inputs) -> tuple[torch.Tensor, ...]:
    model = build()
    model.set_attn_implementation("eager")
    with torch.no_grad():
        return model(**inputs, output_attentions=True).attentions


@pytest.mark.parametrize("family", MODELS)
def test_the_column_sums_of_h2o_are_those_of_an_eager_run(family):
    build, inputs = MODELS[family]
    attentions = _eager_attention(build, inputs)
    model = build()
    with kvcomp.compress(model, "h2o", budget={"tokens": 5000}) as cache, torch.no_grad():
        model(**inputs, past_key_values=cache)
    for layer, attention in zip(cache.layers, attentions, strict=True):
        (sums,) = layer.carried.values()
        assert torch.allclose(sums, attention.sum(dim=2), atol=1e-4)


@pytest.mark.parametrize("images", [3, 20], ids=["short", "long"])
def test_rho_is_equation_6_of_an_eager_run(images):
    inputs = image_inputs(images=images)
    visual = inputs["input_ids"][0] == IMAGE_TOKEN
    crossing = (visual[:, None] != visual[None, :]).float()
    model = tiny_qwen_vl()
    with kvcomp.compress(model, "flowmm", budget=0.3) as cache, torch.no_grad():
        model(**inputs, past_key_values=cache)
    for layer, attention in zip(cache.report().layers, _eager_attention(tiny_qwen_vl, inputs), strict=True):
        rho = ((attention[0] * crossing).sum(dim=(1, 2)) / attention[0].sum(dim=(1, 2))).mean()
        assert layer.rho[0] == pytest.approx(float(rho), abs=1e-5)


def test_a_prompt_without_images_has_no_rho():
    model = tiny_qwen_vl()
    inputs = text_inputs(30) | {"mm_token_type_ids": torch.zeros(1, 30, dtype=torch.int)}
    with kvcomp.compress(model, "flowmm", budget=0.3) as cache, torch.no_grad():
        model(**inputs, past_key_values=cache)
    assert [layer.rho for layer in cache.report().layers] == [(None,)] * 3


def test_sampled_rows_lie_one_in_each_stratum_of_the_rows_own_tokens():
    valid = torch.ones(2, 1000, dtype=torch.bool)
    valid[1, :300] = False
    rows = rows_of(CrossModalFlow(exact=512, strata=128), valid)
    for row, pads, tokens in ((rows[0], 0, 1000), (rows[1], 300, 700)):
        ranks = row[row >= 0] - pads
        edges = torch.arange(129) * tokens // 128
        assert ((ranks >= edges[:-1]) & (ranks < edges[1:])).all()
