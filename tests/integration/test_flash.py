"""On flash attention every recipe keeps and says what it does on sdpa; a stand-in in plain torch takes the place of the
package, and real kernels are tried where there is a GPU.
"""

import pytest
import torch
from flash import install_flash
from inference import COMPRESSING, assert_same_generation, generate, generate_compressed, generate_stock, left_padded
from models import image_inputs, text_inputs, tiny_gemma2, tiny_gemma3n, tiny_llama, tiny_qwen3, tiny_qwen_vl
from skewed import skewed
from transformers import PreTrainedModel

import kvcomp
from kvcomp.testing.envelope import KVCompEngine, Verdict, features_named, run_envelope
from kvcomp.testing.families import FAMILIES

FLASH = "flash_attention_2"
BATCH = left_padded([text_inputs(tokens, seed=tokens)["input_ids"] for tokens in (70, 31, 12)])


@pytest.fixture(autouse=True)
def calls(monkeypatch):
    """What transformers calls of the package."""
    return install_flash(monkeypatch)


def on(model: PreTrainedModel, attention: str) -> PreTrainedModel:
    model.set_attn_implementation(attention)
    return model


def on_sdpa_and_flash(model: PreTrainedModel, inputs, strategy, budget=None, new=4):
    """Return what is generated on sdpa, then on flash attention, each with its cache."""
    reference = generate_compressed(on(model, "sdpa"), inputs, strategy, budget, new=new)
    return reference, generate_compressed(on(model, FLASH), inputs, strategy, budget, new=new)


@pytest.mark.parametrize("recipe", COMPRESSING)
def test_flash_gives_what_sdpa_gives_for_a_padded_batch(recipe, calls):
    assert_same_generation(*on_sdpa_and_flash(tiny_llama(), BATCH, recipe, 0.4))
    assert "sequences" in calls


@pytest.mark.parametrize("recipe", ["flowmm", "snapkv", "kvzip"])
def test_without_padding_attention_runs_over_rows_of_slots(recipe, calls):
    assert_same_generation(*on_sdpa_and_flash(tiny_llama(), text_inputs(60), recipe, 0.4))
    assert set(calls) == {"rows"}


def test_images_are_seen():
    assert_same_generation(*on_sdpa_and_flash(tiny_qwen_vl(), image_inputs(), "flowmm", 0.4))


@pytest.mark.parametrize("store", ["dense", "ragged"])
@pytest.mark.parametrize("mass_preserving", [False, True], ids=["", "mass"])
def test_heads_that_differ_attend_to_their_own_slots(store, mass_preserving, calls):
    model = tiny_qwen3()
    strategy = skewed("flowmm", 0.4, store, mass_preserving=mass_preserving)
    for inputs in (BATCH, text_inputs(60)):
        assert_same_generation(*on_sdpa_and_flash(model, inputs, strategy))
        prefill, new = len(model.model.layers), 4
        by_flash = store == "dense" and not mass_preserving
        assert len(calls) == prefill * (new if by_flash else 1)
        calls.clear()


@pytest.mark.parametrize("store", ["dense", "ragged"])
@pytest.mark.parametrize("mass_preserving", [False, True], ids=["", "mass"])
def test_softcaps_are_those_of_eager_attention(store, mass_preserving):
    model, strategy = tiny_gemma2(), skewed("snapkv", 0.4, store, mass_preserving=mass_preserving)
    reference = generate_compressed(on(model, "eager"), BATCH, strategy)
    assert_same_generation(generate_compressed(on(model, FLASH), BATCH, strategy), reference)


def test_layers_that_share_keys_or_slide_do_as_on_sdpa():
    assert_same_generation(*on_sdpa_and_flash(tiny_gemma3n(), BATCH, "snapkv", 0.4))


@pytest.mark.parametrize("inputs", [text_inputs(60), BATCH], ids=["alone", "batch"])
def test_budget_one_is_the_stock_cache_bit_for_bit(inputs):
    model = on(tiny_llama(), FLASH)
    stock = generate_stock(model, inputs)
    output, _ = generate_compressed(model, inputs, "flowmm", 1.0)
    assert all(map(torch.equal, output.logits, stock.logits))


@pytest.mark.parametrize("store", ["dense", "ragged"])
def test_later_turns_and_chunks_are_those_of_sdpa(store):
    model = tiny_llama()
    asked = torch.tensor([[0, 0, 7], [8, 9, 10], [0, 11, 12]])

    def two_turns(attention: str, inputs, more, **settings):
        on(model, attention)
        with kvcomp.compress(model, skewed("flowmm", 0.4, store), defer=True) as cache:
            first = generate(model, inputs, cache, 4, **settings).sequences
            seen = torch.cat([inputs["attention_mask"], torch.ones(len(first), 4, dtype=torch.long)], dim=1)
            turn = {"input_ids": torch.cat([first, more], dim=1)}
            turn["attention_mask"] = torch.cat([seen, (more > 0).long()], dim=1)
            return generate(model, turn, cache, 4), cache

    for inputs, more in ((BATCH, asked), (text_inputs(60), asked[1:2])):
        for settings in ({}, {"prefill_chunk_size": 16}):
            assert_same_generation(*(two_turns(attention, inputs, more, **settings) for attention in (FLASH, "sdpa")))


def test_beams_are_those_of_sdpa():
    model, inputs = tiny_llama(), text_inputs(40)
    answers = []
    for attention in ("sdpa", FLASH):
        with kvcomp.compress(on(model, attention), "snapkv", budget=0.4) as cache:
            answers.append(generate(model, inputs, cache, 6, num_beams=3).sequences)
    assert torch.equal(*answers)


def test_a_mask_that_a_caller_made_is_the_one_of_sdpa():
    model, ids = tiny_llama(), text_inputs(30)["input_ids"]
    blocks = torch.ones(30, 30, dtype=torch.bool).tril()
    blocks[:10, :10] = True  # the first ten see one another
    logits = []
    for attention in ("sdpa", FLASH):
        with kvcomp.compress(on(model, attention), "snapkv", budget=0.4) as cache, torch.no_grad():
            model(ids, attention_mask=blocks[None, None], past_key_values=cache)
            logits.append(model(ids[:, :1], past_key_values=cache).logits)
    assert torch.allclose(*logits, atol=2e-5)


def test_a_cache_of_transformers_works_beside_ours_and_the_model_is_left_as_it_was():
    model = on(tiny_llama(), FLASH)
    stock = generate_stock(model, BATCH)
    session = kvcomp.attach(model)
    assert model.config._attn_implementation == "kvcomp_fa_attention_2"
    beside = generate_stock(model, BATCH)
    session.detach()
    assert all(map(torch.equal, beside.logits, stock.logits))
    assert model.config._attn_implementation == FLASH


def test_an_error_leaves_the_model_as_it_was():
    model = on(tiny_llama(), FLASH)
    with pytest.raises(RuntimeError, match="stop"), kvcomp.compress(model, "snapkv", budget=0.4):
        raise RuntimeError("stop")
    assert model.config._attn_implementation == FLASH


def test_a_compiled_decode_step_is_refused():
    with (
        pytest.raises(kvcomp.UnsupportedUseError, match="sdpa and eager attention, and the model's is 'flash_att"),
        kvcomp.compress(on(tiny_llama(), FLASH), "snapkv", budget=0.4, compiled=True),
    ):
        pass


@pytest.mark.parametrize("family", ["llama", "qwen2.5-vl"])
def test_the_feature_of_the_envelope_is_run_where_there_is_flash_attention(family, monkeypatch):
    features = features_named(["flash-attention-2"])
    (cell,) = run_envelope([KVCompEngine("flowmm")], [FAMILIES[family]], features).cells
    assert (cell.verdict, cell.reason) == (Verdict.GREEN, "")
    monkeypatch.undo()
    (cell,) = run_envelope([KVCompEngine("flowmm")], [FAMILIES[family]], features).cells
    assert cell.verdict is Verdict.DASH
    assert "doesn't seem to be installed" in cell.reason


@pytest.mark.gpu
@pytest.mark.parametrize("recipe", ["flowmm", "snapkv", "ada-kv", "kvzip"])
def test_real_kernels_give_what_sdpa_gives(recipe, monkeypatch):
    monkeypatch.undo()
    (cell,) = run_envelope([KVCompEngine(recipe)], [FAMILIES["llama"]], features_named(["flash-attention-2"])).cells
    assert (cell.verdict, cell.reason) == (Verdict.GREEN, "")
