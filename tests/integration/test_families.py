"""Every model family, in the small, through `generate()`."""

from functools import cache

import pytest
import torch
import transformers
from oracles import flow_ratio
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache

import kvcomp
from kvcomp.core.errors import BudgetError, UnsupportedModelError
from kvcomp.core.registry import registry
from kvcomp.core.types import Modality
from kvcomp.runtime.adapter import adapter_for
from kvcomp.testing.families import FAMILIES
from kvcomp.testing.families.family import AUDIO, IMAGE, TEXT, VIDEO

RECIPES = [entry.name for entry in registry.entries("recipe")]
FEW = ("flowmm", "look-m", "ada-kv")
NEW = 4
BATCHES_DIFFER_UPSTREAM = {"molmo2"}
"""With transformers' own cache, a row of a padded batch gets other tokens than it gets alone."""

pytestmark = pytest.mark.filterwarnings("ignore::kvcomp.core.errors.IgnoredSettingWarning")
TURNS_DIFFER_UPSTREAM = {"paligemma"}
"""The tokens of a prompt see one another, so two turns are not one long prompt; they are held against two turns with
transformers' own cache.
"""
CENTRAL = ("llama", "qwen2.5-vl", "internvl", "llava-1.5")
METHODS = ("flowmm", "look-m", "d2o", "kvmerge", "h2o", "snapkv", "streaming-llm", "ada-kv", "pyramidkv")


def marks_of(name):
    missing = pytest.mark.skip(reason=f"transformers {transformers.__version__} does not have the family {name}")
    return [] if FAMILIES[name].available else [missing]


def is_central(name, recipe):
    return name == CENTRAL[0] or (name in CENTRAL and recipe in METHODS)


families = pytest.mark.parametrize("name", [pytest.param(name, marks=marks_of(name)) for name in FAMILIES])


@cache
def tiny(name):
    return FAMILIES[name].model()


def generate(name, inputs, cache=None):
    output = tiny(name).generate(
        **inputs,
        past_key_values=cache,
        do_sample=False,
        max_new_tokens=NEW,
        min_new_tokens=NEW,
        pad_token_id=0,
        output_logits=True,
        return_dict_in_generate=True,
    )
    return output.sequences[:, inputs["input_ids"].shape[1] :], torch.stack(output.logits, dim=1)


def compressed(name, inputs, recipe, budget=0.4):
    """Return tokens, logits and the report, at the budget or the least above it that the recipe can do with."""
    try:
        with kvcomp.compress(tiny(name), recipe, budget=budget) as held:
            tokens, logits = generate(name, inputs, held)
            return tokens, logits, held.report(), budget
    except BudgetError as refused:
        least = refused.smallest
    return compressed(name, inputs, recipe, least)


def rows_of(name):
    return [FAMILIES[name].prompt(seed) for seed in (0, 1)]


def check_rows(name, recipe):
    rows = rows_of(name)
    batch = FAMILIES[name].left_padded(rows)
    budget = max(compressed(name, row, recipe)[3] for row in rows)
    tokens, logits, report, used = compressed(name, batch, recipe, budget)
    for place, row in enumerate(rows):
        alone, alone_logits, _, _ = compressed(name, row, recipe, used)
        if name not in BATCHES_DIFFER_UPSTREAM or place == 0:
            assert tokens[place].tolist() == alone[0].tolist(), recipe
            torch.testing.assert_close(logits[place], alone_logits[0], atol=5e-4, rtol=1e-3)
    return report


def test_there_are_families_enough():
    assert len(FAMILIES) >= 24
    assert sum(bool(family.media) for family in FAMILIES.values()) >= 18


@families
@pytest.mark.floor
def test_a_full_budget_is_stock_to_the_bit(name):
    inputs = FAMILIES[name].prompt(0)
    tokens, logits = generate(name, inputs)
    ours, our_logits, _, _ = compressed(name, inputs, "flowmm", 1.0)
    assert tokens.tolist() == ours.tolist()
    assert torch.equal(logits, our_logits)


@families
@pytest.mark.floor
def test_media_are_told_from_text(name):
    model, family = tiny(name), FAMILIES[name]
    inputs = family.prompt(0)
    found = adapter_for(model.config).modality(inputs)
    if not family.media:
        assert found is None
        return
    ids = inputs["input_ids"]
    for kind, token in ((Modality.IMAGE, IMAGE), (Modality.VIDEO, VIDEO), (Modality.AUDIO, AUDIO)):
        assert torch.equal(found == int(kind), ids == token)
    assert {medium.token for medium in family.media} == set(ids[found != int(Modality.TEXT)].tolist())


@families
@pytest.mark.parametrize("recipe", FEW)
def test_a_row_of_a_batch_is_what_it_is_alone(name, recipe):
    report = check_rows(name, recipe)
    kept = [slots for layer in report.layers for slots in layer.slots]
    assert kept
    assert max(kept) < rows_of(name)[0]["input_ids"].shape[1]
    if recipe == "flowmm":
        flows = [rho for layer in report.layers for rho in layer.rho]
        assert all((rho is not None) == bool(FAMILIES[name].media) for rho in flows)
        assert not FAMILIES[name].media or all(0 < rho < 1 for rho in flows)


def test_every_other_modality_is_heterogeneous():
    family = FAMILIES["qwen2.5-omni"]
    inputs = family.prompt(0)
    modality = adapter_for(family.model().config).modality(inputs)[0].tolist()
    assert set(modality) == {int(kind) for kind in Modality}
    model = family.model()
    model.set_attn_implementation("eager")
    with torch.no_grad():
        attentions = model(**inputs, output_attentions=True).attentions
    with kvcomp.compress(tiny(family.name), "flowmm", budget=0.4) as held, torch.no_grad():
        tiny(family.name)(**inputs, past_key_values=held)
    for layer, seen in zip(held.report().layers, attentions, strict=True):
        assert layer.rho[0] == pytest.approx(flow_ratio(list(seen[0]), modality, modality), abs=1e-5)


@families
@pytest.mark.floor
def test_keys_are_turned_back_to_be_merged(name):
    inputs = FAMILIES[name].prompt(0)
    settings = {"merger": {"use": "unrotated", "merger": {"use": "mean"}}, "policy.threshold": 0.0}
    with kvcomp.compress(tiny(name), "flowmm", budget=0.3, **settings) as held:
        generate(name, inputs, held)
    assert sum(layer.merged[0] for layer in held.report().layers) > 0
    assert all(torch.isfinite(held.layers[layer.layer].keys).all() for layer in held.report().layers)


@families
def test_images_and_compression_reach_the_answer(name):
    family, inputs = FAMILIES[name], FAMILIES[name].prompt(0)
    _, logits = generate(name, inputs)
    _, smaller, _, _ = compressed(name, inputs, "recency", 0.2)
    assert not torch.allclose(logits[:, 1:], smaller[:, 1:], atol=1e-3)
    if family.media:
        numbers = {key: -value for key, value in inputs.items() if value.is_floating_point()}
        _, other = generate(name, {**inputs, **numbers})
        assert not torch.allclose(logits, other, atol=1e-4)


@families
def test_a_second_turn_follows_the_first(name):
    family = FAMILIES[name]
    inputs = family.prompt(2, media=False)
    with kvcomp.compress(tiny(name), "snapkv", budget=1.0) as held:
        tokens, _ = generate(name, inputs, held)
        longer = family.longer(inputs, torch.cat([tokens, torch.tensor([[7, 8, 9]])], dim=1))
        turn, logits = generate(name, longer, held)
    stock = DynamicCache(config=tiny(name).config) if name in TURNS_DIFFER_UPSTREAM else None
    if stock is not None:
        generate(name, inputs, stock)
    alone, alone_logits = generate(name, longer, stock)
    assert turn.tolist() == alone.tolist()
    torch.testing.assert_close(logits, alone_logits, atol=5e-4, rtol=1e-3)


def every_pair():
    """Every recipe with every family; those that are tried with each transformers are marked."""
    for name in FAMILIES:
        for recipe in RECIPES:
            when = pytest.mark.floor if is_central(name, recipe) else pytest.mark.slow
            yield pytest.param(recipe, name, marks=[*marks_of(name), when])


@pytest.mark.parametrize(("recipe", "name"), list(every_pair()))
def test_every_recipe_runs_on_every_family(recipe, name):
    check_rows(name, recipe)


LATENT = {
    "kv_lora_rank": 16,
    "q_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 16,
    "first_k_dense_replace": 3,
}
ROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}
REFUSED = {
    "deepseek_v2": ({**TEXT, **LATENT}, "multi-head latent attention"),
    "deepseek_v3": ({**TEXT, **LATENT}, "multi-head latent attention"),
    "mllama": ({"text_config": {**TEXT, **ROPE, "cross_attention_layers": [1]}}, "cross-attention"),
    "falcon": (TEXT, "AttentionInterface"),
    "mamba": ({**TEXT, "state_size": 8}, "no full-attention layer"),
}


@pytest.mark.parametrize(("kind", "settings", "reason"), [(kind, *given) for kind, given in REFUSED.items()])
def test_what_cannot_work_is_refused_with_the_reason(kind, settings, reason):
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **settings)).eval()
    with pytest.raises(UnsupportedModelError, match=reason), kvcomp.compress(model, "snapkv", budget=0.5):
        pass
