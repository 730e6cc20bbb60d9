"""On flex attention every recipe keeps and says what it does on sdpa; run uncompiled, as flex may be on a CPU."""

from collections.abc import Iterator

import pytest
import torch
from inference import COMPRESSING, assert_same_generation, generate, generate_compressed, generate_stock, left_padded
from models import text_inputs, tiny_gemma2, tiny_llama, tiny_qwen3
from skewed import skewed
from transformers import PreTrainedModel

import kvcomp

pytestmark = [
    pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # of torch, and of transformers' use of it
]
BATCH = left_padded([text_inputs(tokens, seed=tokens)["input_ids"] for tokens in (70, 31, 12)])


@pytest.fixture(autouse=True)
def uncompiled() -> Iterator[None]:
    """transformers compiles flex attention, which takes minutes on a CPU."""
    with torch.compiler.set_stance("force_eager"):
        yield


def on(model: PreTrainedModel, attention: str) -> PreTrainedModel:
    model.set_attn_implementation(attention)
    return model


@pytest.mark.parametrize("recipe", COMPRESSING)
def test_flex_gives_what_sdpa_gives_for_a_padded_batch(recipe):
    model, budget = tiny_llama(), 0.4
    reference = generate_compressed(on(model, "sdpa"), BATCH, recipe, budget, new=4)
    assert_same_generation(generate_compressed(on(model, "flex_attention"), BATCH, recipe, budget, new=4), reference)


@pytest.mark.parametrize("store", ["dense", "ragged"])
@pytest.mark.parametrize("mass_preserving", [False, True], ids=["", "mass"])
def test_heads_that_differ_attend_to_their_own_slots(store, mass_preserving):
    model = tiny_qwen3()
    strategy = skewed("flowmm", 0.4, store, mass_preserving=mass_preserving)
    for inputs in (BATCH, text_inputs(60)):
        reference = generate_compressed(on(model, "sdpa"), inputs, strategy)
        assert_same_generation(generate_compressed(on(model, "flex_attention"), inputs, strategy), reference)


@pytest.mark.parametrize("store", ["dense", "ragged"])
def test_softcaps_are_those_of_eager_attention(store):
    model, strategy = tiny_gemma2(), skewed("snapkv", 0.4, store)
    reference = generate_compressed(on(model, "eager"), BATCH, strategy)
    assert_same_generation(generate_compressed(on(model, "flex_attention"), BATCH, strategy), reference)


def test_budget_one_is_the_stock_cache_bit_for_bit():
    model, inputs = on(tiny_llama(), "flex_attention"), text_inputs(60)
    stock = generate_stock(model, inputs)
    output, _ = generate_compressed(model, inputs, "flowmm", 1.0)
    assert all(map(torch.equal, output.logits, stock.logits))


def test_a_later_turn_of_a_padded_batch_is_that_of_sdpa():
    model = tiny_llama()
    asked = torch.tensor([[0, 0, 7], [8, 9, 10], [0, 11, 12]])

    def two_turns(attention: str):
        on(model, attention)
        with kvcomp.compress(model, "flowmm", budget=0.4) as cache:
            first = generate(model, BATCH, cache, 4).sequences
            turn = {"input_ids": torch.cat([first, asked], dim=1)}
            seen = torch.cat([BATCH["attention_mask"], torch.ones(3, 4, dtype=torch.long)], dim=1)
            turn["attention_mask"] = torch.cat([seen, (asked > 0).long()], dim=1)
            return generate(model, turn, cache, 4), cache

    assert_same_generation(two_turns("flex_attention"), two_turns("sdpa"))


def test_a_cache_of_transformers_works_beside_ours():
    model = on(tiny_llama(), "flex_attention")
    stock = generate_stock(model, BATCH)
    session = kvcomp.attach(model)
    beside = generate_stock(model, BATCH)
    session.detach()
    assert all(map(torch.equal, beside.logits, stock.logits))
    assert model.config._attn_implementation == "flex_attention"
