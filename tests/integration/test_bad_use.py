"""What cannot work is refused with a clear error, and the model is left as it was."""

import pytest
import torch
from inference import generate
from models import image_inputs, text_inputs, tiny_llama, tiny_qwen3, tiny_qwen_vl
from torch import nn
from transformers import (
    AttentionInterface,
    PretrainedConfig,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
)

import kvcomp
from kvcomp.runtime.cache_argument import CACHE


class OwnAttention(PreTrainedModel):
    """A model that caches keys and attends without the AttentionInterface."""

    config_class = PretrainedConfig

    def __init__(self, config):
        super().__init__(config)
        self.project = nn.Linear(8, 8)

    def forward(self, input_ids, past_key_values=None, **kwargs):
        states = self.project(torch.randn(1, 1, input_ids.shape[1], 8))
        keys, values = past_key_values.update(states, states, 0)
        return torch.nn.functional.scaled_dot_product_attention(states, keys, values)


def _implementations(model) -> set[str]:
    return {module.config._attn_implementation for module in model.modules() if hasattr(module, "config")}


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (("flowm",), kvcomp.UnknownNameError, "no recipe named 'flowm'. Did you mean 'flowmm'"),
        (("flowmm", 0), kvcomp.BudgetError, r"ratio in \(0, 1\]"),
        (("flowmm", 1.5), kvcomp.BudgetError, r"ratio in \(0, 1\], got 1.5; write one of: .*tokens: 512"),
        (("flowmm", -0.1), kvcomp.BudgetError, r"ratio in \(0, 1\]"),
        (("flowmm", "lots"), kvcomp.BudgetError, "got 'lots'"),
    ],
    ids=["unknown recipe", "zero", "above one", "negative", "words"],
)
def test_bad_requests_name_the_fault(arguments, error, message):
    model = tiny_llama()
    with pytest.raises(error, match=message), kvcomp.compress(model, *arguments):
        pass
    assert _implementations(model) == {"sdpa"}


def test_a_recipe_with_two_faults_lists_both_with_their_paths():
    with pytest.raises(kvcomp.ConfigError) as caught:
        kvcomp.strategy("flowmm", **{"matcher.quantile": 1.4, "scorer.proxys": 16})
    assert len(caught.value.faults) == 2
    assert "matcher.quantile: " in str(caught.value)
    assert "got 1.4" in str(caught.value)
    assert "scorer.proxys: 'proxy-attention' has no field 'proxys'. Did you mean 'proxies'" in str(caught.value)


def test_a_byte_budget_below_one_slot_per_head_is_refused():
    model, inputs = tiny_llama(), text_inputs(50)
    with (
        pytest.raises(
            kvcomp.BudgetError, match="below one slot per KV head and layer, which takes 768 bytes"
        ) as caught,
        kvcomp.compress(model, "snapkv", budget={"bytes": 100}) as cache,
    ):
        generate(model, inputs, cache)
    assert caught.value.smallest == pytest.approx(1 / 50, abs=1e-6)
    assert _implementations(model) == {"sdpa"}


def test_a_model_that_does_not_use_the_attention_interface_is_refused():
    model = OwnAttention(PretrainedConfig(num_hidden_layers=1, attn_implementation="eager"))
    before = _implementations(model)
    with (
        pytest.raises(kvcomp.UnsupportedModelError, match="AttentionInterface"),
        kvcomp.compress(model, "snapkv", budget=0.5) as cache,
        torch.no_grad(),
    ):
        model(input_ids=torch.ones(1, 9, dtype=torch.long), past_key_values=cache)
    assert _implementations(model) == before


def test_an_encoder_decoder_model_is_refused():
    config = T5Config(d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2, vocab_size=20)
    with pytest.raises(kvcomp.UnsupportedModelError, match="encoder-decoder"):
        kvcomp.attach(T5ForConditionalGeneration(config))


def test_something_that_is_no_transformers_model_is_refused():
    with pytest.raises(kvcomp.UnsupportedModelError, match="PreTrainedModel, got Linear"):
        kvcomp.attach(nn.Linear(2, 2))


def test_an_attention_implementation_that_is_not_served_is_refused():
    model = tiny_llama()
    AttentionInterface.register("someones_own", lambda *args, **kwargs: None)
    model.set_attn_implementation("someones_own")
    with pytest.raises(
        kvcomp.UnsupportedModelError, match=r"one of sdpa, eager, flex_attention, flash_attention_2, got 'someones_own'"
    ):
        kvcomp.attach(model)


def test_gradients_through_a_compressed_cache_are_refused():
    model, inputs = tiny_llama(), text_inputs(20)
    with (
        pytest.raises(kvcomp.UnsupportedUseError, match=r"torch\.no_grad"),
        kvcomp.compress(model, "snapkv", budget=0.5) as cache,
    ):
        model(**inputs, past_key_values=cache)


def test_embeddings_that_hide_the_modalities_are_refused():
    model = tiny_qwen_vl()
    embeddings = model.get_input_embeddings()(image_inputs()["input_ids"])
    with (
        pytest.raises(kvcomp.UnsupportedUseError, match="mm_token_type_ids"),
        kvcomp.compress(model, "flowmm", budget=0.5) as cache,
        torch.no_grad(),
    ):
        model(inputs_embeds=embeddings, past_key_values=cache)


def test_a_cache_that_is_never_used_warns():
    with (
        pytest.warns(kvcomp.UnusedCacheWarning, match=rf"generate\(\.\.\., {CACHE}=cache\)"),
        kvcomp.compress(tiny_llama(), "flowmm"),
    ):
        pass


def test_a_budget_that_is_ignored_warns():
    model = tiny_llama()
    with (
        pytest.warns(kvcomp.IgnoredSettingWarning, match="'full' has no selector"),
        kvcomp.compress(model, "full", budget=0.2) as cache,
    ):
        generate(model, text_inputs(20), cache)
    assert cache.layers[0].keys.shape[2] == 27


def test_assisted_decoding_is_refused_before_the_first_token():
    model = tiny_llama()
    prompt = {"input_ids": torch.tensor([[5, 6, 7, 8] * 10])}
    with (
        pytest.raises(kvcomp.UnsupportedUseError, match="prompt-lookup decoding"),
        kvcomp.compress(model, "h2o", budget=0.3) as cache,
    ):
        model.generate(**prompt, past_key_values=cache, max_new_tokens=8, do_sample=False, prompt_lookup_num_tokens=3)


def test_another_shorter_prompt_is_refused():
    model = tiny_llama()
    with kvcomp.compress(model, "snapkv", budget=0.5) as cache:
        generate(model, text_inputs(40), cache)
        with pytest.raises(kvcomp.UnsupportedUseError, match="belongs to one conversation"):
            generate(model, text_inputs(30), cache)


def test_a_cache_of_another_model_is_refused():
    model, other = tiny_llama(), tiny_llama(seed=1)
    with (
        pytest.raises(kvcomp.UnsupportedUseError, match="works with the model that it was made for"),
        kvcomp.compress(model, "h2o", budget=0.3) as cache,
    ):
        generate(other, text_inputs(30), cache)


def test_the_inner_part_of_a_multimodal_model_is_refused():
    model, inputs = tiny_qwen_vl(), image_inputs()
    with (
        pytest.raises(kvcomp.UnsupportedUseError, match="call the whole model"),
        kvcomp.compress(model, "flowmm", budget=0.5) as cache,
        torch.no_grad(),
    ):
        model.model(**inputs, past_key_values=cache)


def test_the_inner_part_of_a_text_model_works():
    model = tiny_llama()
    with kvcomp.compress(model, "flowmm", budget=0.5) as cache, torch.no_grad():
        model.model(**text_inputs(30), past_key_values=cache)
    assert cache.layers[0].keys.shape[2] == 15


def test_a_file_of_another_model_is_refused(tmp_path):
    model = tiny_llama()
    with kvcomp.compress(model, "snapkv", budget=0.5) as cache:
        generate(model, text_inputs(20), cache)
    cache.save(tmp_path / "cache.safetensors")
    with pytest.raises(kvcomp.InputError, match="the model that made it"):
        kvcomp.load_cache(tmp_path / "cache.safetensors", tiny_qwen3())


@pytest.mark.parametrize("reserve", [0, -5, 10.5])
def test_a_reserve_that_is_no_number_of_slots_is_refused(reserve):
    model = tiny_llama()
    with (
        pytest.raises(kvcomp.InputError, match="reserve must be a whole number"),
        kvcomp.compress(model, "h2o", reserve=reserve),
    ):
        pass
    assert _implementations(model) == {"sdpa"}


def test_nothing_is_no_model():
    with pytest.raises(kvcomp.UnsupportedModelError, match="got NoneType"):
        kvcomp.attach(None)


def test_a_prompt_no_longer_than_what_the_cache_has_seen_is_said_to_be_another():
    model = tiny_llama()
    with kvcomp.compress(model, "snapkv", budget=0.5) as cache, torch.no_grad():
        generate(model, text_inputs(30), cache)
        with pytest.raises(
            kvcomp.UnsupportedUseError, match=r"no token beyond the \d+ that the cache has seen; .* use a new one"
        ):
            generate(model, text_inputs(12, seed=1), cache)


@pytest.mark.parametrize("way", ["forward", "generate"])
@pytest.mark.parametrize("build", [tiny_llama, tiny_qwen_vl])
def test_an_empty_prompt_is_refused(build, way):
    model = build()
    inputs = {"input_ids": torch.zeros(1, 0, dtype=torch.long), "attention_mask": torch.zeros(1, 0, dtype=torch.long)}
    with (
        pytest.raises(kvcomp.InputError, match=r"at least one token, got inputs of shape \(1, 0\)"),
        kvcomp.compress(model, "snapkv", budget=0.5) as cache,
        torch.no_grad(),
    ):
        model(**inputs, past_key_values=cache) if way == "forward" else generate(model, inputs, cache)
    assert not cache.used
    assert _implementations(model) == {"sdpa"}


def test_a_batch_that_changes_its_size_is_refused_and_may_go_on_as_it_was():
    model = tiny_llama()
    with kvcomp.compress(model, "snapkv", budget=0.5) as cache, torch.no_grad():
        model(**text_inputs(20, batch=2), past_key_values=cache)
        for rows in (1, 3):
            with pytest.raises(kvcomp.UnsupportedUseError, match=f"holds 2 rows, and {rows} were given; call cache"):
                model(input_ids=torch.full((rows, 1), 5), past_key_values=cache)
        cache.batch_select_indices(torch.tensor([1]))
        model(input_ids=torch.tensor([[5]]), past_key_values=cache)
    assert cache.report().layers[0].tokens == (21,)
