"""A compiled decode step serves all tokens of a request, and says what eager decoding says."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch._dynamo.utils as dynamo_utils
from inference import generate, left_padded
from models import image_inputs, text_inputs, tiny_gemma2, tiny_llama, tiny_qwen_vl
from skewed import skewed
from transformers import CompileConfig, PreTrainedModel
from transformers.generation import GenerationConfig

import kvcomp

BATCH = left_padded([text_inputs(tokens, seed=tokens)["input_ids"] for tokens in (70, 31, 12)])
RECIPES: dict[str, Any] = {
    "flowmm": ("flowmm", 0.4, BATCH),
    "layers that differ": ("pyramidkv", 0.4, text_inputs(60)),
    "heads that differ": (skewed("snapkv", 0.4, "ragged"), None, text_inputs(60)),
    "heads that differ, padded": (skewed("snapkv", 0.4, "dense"), None, BATCH),
    "slots that weigh": (skewed("d2o", 0.4, "ragged", mass_preserving=True), None, BATCH),
    "everything": ("full", None, BATCH),
}


class Graphs:
    """What torch.compile has compiled since the test began."""

    @property
    def count(self) -> int:
        return int(dynamo_utils.counters["stats"]["unique_graphs"])


@pytest.fixture
def graphs() -> Iterator[Graphs]:
    """A fresh compiler."""
    torch._dynamo.reset()
    dynamo_utils.counters.clear()
    yield Graphs()
    torch._dynamo.reset()


def decode(
    model: PreTrainedModel,
    cache: kvcomp.CompressedCache,
    inputs: dict[str, torch.Tensor],
    new: int,
    step: Callable[..., Any] | None = None,
) -> torch.Tensor:
    """Return greedy tokens `(batch, new)`: the prompt by the model, each token by the step."""
    step = model if step is None else step
    mask = inputs["attention_mask"]
    with torch.no_grad():
        tokens = [model(**inputs, past_key_values=cache).logits[:, -1:].argmax(dim=-1)]
        for _ in range(new - 1):
            mask = torch.cat([mask, torch.ones_like(mask[:, :1])], dim=1)
            places = {"position_ids": mask.sum(dim=1, keepdim=True) - 1}
            whole = bool(mask.all())  # a mask that grows would be a new graph each time; generate() pads it
            arguments = model.prepare_inputs_for_generation(
                tokens[-1], past_key_values=cache, attention_mask=None if whole else mask, use_cache=True, **places
            )
            tokens.append(step(**arguments).logits[:, -1:].argmax(dim=-1))
    return torch.cat(tokens, dim=1)


@pytest.mark.parametrize("recipe", RECIPES)
def test_one_graph_decodes_all_tokens_as_eager_decoding_does(recipe, graphs):
    model, (strategy, budget, inputs) = tiny_llama(), RECIPES[recipe]
    with kvcomp.compress(model, strategy, budget=budget) as cache:
        expected = decode(model, cache, inputs, 12)
        report = cache.report()
    step = torch.compile(model, backend="eager", fullgraph=True)
    with kvcomp.compress(model, strategy, budget=budget, reserve=12, compiled=True) as cache:
        assert torch.equal(decode(model, cache, inputs, 12, step), expected)
        assert graphs.count == 1
        mine = cache.report()
    assert [layer.slots for layer in mine.layers] == [layer.slots for layer in report.layers]
    assert mine.allocated_bytes == report.allocated_bytes
    assert [layer.indices.shape for layer in cache.layers] == [
        (*layer.indices.shape[:2], max(int((row >= 0).sum()) for row in layer.indices.flatten(0, 1)))
        for layer in cache.layers
    ]


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["layers that differ", "heads that differ"])
def test_one_graph_serves_five_hundred_tokens(recipe, graphs):
    model, (strategy, budget, inputs) = tiny_llama(), RECIPES[recipe]
    step = torch.compile(model, backend="eager", fullgraph=True)
    with kvcomp.compress(model, strategy, budget=budget, reserve=512, compiled=True) as cache:
        tokens = decode(model, cache, inputs, 512, step)
        assert cache.get_seq_length() == 60 + 511
    assert graphs.count == 1
    with kvcomp.compress(model, strategy, budget=budget) as cache:
        assert torch.equal(decode(model, cache, inputs, 512), tokens)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch's own
@pytest.mark.parametrize("recipe", ["flowmm", "heads that differ"])
def test_inductor_gives_the_same_tokens(recipe, graphs):
    model, (strategy, budget, inputs) = tiny_llama(), RECIPES[recipe]
    with kvcomp.compress(model, strategy, budget=budget) as cache:
        expected = decode(model, cache, inputs, 12)
    step = torch.compile(model, fullgraph=True)
    with kvcomp.compress(model, strategy, budget=budget, reserve=12, compiled=True) as cache:
        assert torch.equal(decode(model, cache, inputs, 12, step), expected)


FAMILIES = {
    "gemma2-eager": (tiny_gemma2, "eager", BATCH),  # its logits are capped
    "qwen2.5-vl": (tiny_qwen_vl, "sdpa", image_inputs()),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_generate_compiles_the_step_by_itself(family, graphs):
    build, attention, inputs = FAMILIES[family]
    model = build()
    model.set_attn_implementation(attention)
    with kvcomp.compress(model, "flowmm", budget=0.4) as cache:
        expected = generate(model, inputs, cache, 10)
    compiler = CompileConfig(backend="eager", fullgraph=True, mode=None)
    compiler._compile_all_devices = True  # what a GPU would do unasked
    settings = GenerationConfig(compile_config=compiler, pad_token_id=0)
    with kvcomp.compress(model, "flowmm", budget=0.4, reserve=10, compiled=True) as cache:
        output = generate(model, inputs, cache, 10, generation_config=settings)
    assert torch.equal(output.sequences, expected.sequences)
    assert all(
        torch.allclose(mine, other, atol=1e-5) for mine, other in zip(output.logits, expected.logits, strict=True)
    )
    assert graphs.count == 1


@pytest.mark.parametrize("store", ["dense", "ragged"])
@pytest.mark.parametrize("turns", ["recompress", "append"])
def test_a_later_turn_goes_on_from_fixed_slots(store, turns):
    strategy = skewed("h2o", 0.4, store, turns=turns)
    model, asked = tiny_llama(), text_inputs(7, seed=5)["input_ids"]

    def two_turns(**settings):
        with kvcomp.compress(model, strategy, **settings) as cache:
            first = generate(model, text_inputs(60), cache, 6).sequences
            turn = {"input_ids": torch.cat([first, asked], dim=1)}
            second = generate(model, turn, cache, 6).sequences
            return second, cache.report().layers, cache.layers[1].indices

    plain, compiled = two_turns(), two_turns(reserve=8, compiled=True)
    assert torch.equal(compiled[0], plain[0])
    assert [layer.slots for layer in compiled[1]] == [layer.slots for layer in plain[1]]
    assert torch.equal(compiled[2], plain[2])


def test_beams_move_slots_and_are_those_of_a_cache_that_grows():
    model = tiny_llama()

    def beams(**settings):
        with kvcomp.compress(model, "flowmm", budget=0.4, **settings) as cache:
            return generate(model, BATCH, cache, 5, num_beams=3, output_logits=False).sequences

    assert torch.equal(beams(reserve=5, compiled=True), beams())


def test_what_is_looked_at_between_tokens_is_up_to_date_and_changes_nothing(graphs):
    model, inputs = tiny_llama(), text_inputs(60)
    with kvcomp.compress(model, "flowmm", budget=0.4, reserve=9, compiled=True) as cache:
        expected = decode(model, cache, inputs, 9)
    step = torch.compile(model, backend="eager", fullgraph=True)
    with kvcomp.compress(model, "flowmm", budget=0.4, reserve=9, compiled=True) as cache:
        lengths = []

        def looked(**arguments):
            output = step(**arguments)
            lengths.append(cache.layers[2].indices.shape[2])
            assert cache.layers[0].keys.shape[2] == lengths[-1]
            assert cache.report().layers[0].slots == (float(lengths[-1]),)
            return output

        assert torch.equal(decode(model, cache, inputs, 9, looked), expected)
    assert lengths == list(range(25, 33))
    assert graphs.count == 1


def test_a_snapshot_of_what_was_compiled_comes_back():
    model, inputs = tiny_llama(), text_inputs(60)
    question = {"input_ids": torch.tensor([[5, 6, 7]])}
    session = kvcomp.attach(model)
    cache = session.cache("flowmm", 0.4, reserve=9, compiled=True)
    decode(model, cache, inputs, 4)
    context = cache.snapshot()
    keys = cache.layers[1].keys.clone()
    answers = []
    for _ in range(2):
        with torch.no_grad():
            answers.append(model(**question, past_key_values=cache).logits)
            model(input_ids=torch.tensor([[8]]), past_key_values=cache)
        cache.restore(context)
        assert torch.equal(cache.layers[1].keys, keys)
    session.detach()
    assert torch.equal(*answers)


def test_more_tokens_than_there_is_room_for_are_an_error():
    model, inputs = tiny_llama(), text_inputs(60)
    with (
        pytest.raises(kvcomp.UnsupportedUseError, match=r"reserve=8, and 4 tokens found no room"),
        kvcomp.compress(model, "snapkv", budget=0.4, reserve=8, compiled=True) as cache,
    ):
        overfill(model, cache, inputs, 4)


def overfill(model, cache, inputs, more: int) -> None:
    """Decode more tokens than fit after the prompt: what was asked for is rounded up."""
    with torch.no_grad():
        model(**inputs, past_key_values=cache)
    decode_more(model, cache, min(layer.fixed.room for layer in cache.layers) + more)


def decode_more(model, cache, tokens: int) -> None:
    with torch.no_grad():
        for _ in range(tokens):
            model(input_ids=torch.tensor([[5]]), past_key_values=cache)


def test_slots_move_again_outside_the_block():
    model, inputs = tiny_llama(), text_inputs(60)
    with kvcomp.compress(model, "snapkv", budget=0.4, reserve=8, compiled=True) as cache:
        decode(model, cache, inputs, 4)
    assert cache.get_seq_length() == 63
    with pytest.raises(kvcomp.UnsupportedUseError, match="inside its `with"):
        decode_more(model, cache, 1)


REFUSED = {
    "kivi": ({"budget": 0.5}, "store 'quantized' rewrites slots"),
    "h2o": ({"budget": 0.5, "trigger": {"every": 4}}, "trigger .* compresses while tokens are decoded"),
    "snapkv": ({"budget": 0.5, "defer": True}, "defer=True compresses at the first decoded token"),
    "flowmm": ({"budget": 0.5, "merger": {"use": "unrotated", "merger": {"use": "mean"}}}, "use turns: append"),
}


@pytest.mark.parametrize("recipe", REFUSED)
def test_what_moves_slots_while_tokens_are_decoded_is_refused(recipe):
    settings, reason = REFUSED[recipe]
    with (
        pytest.raises(kvcomp.UnsupportedUseError, match=reason),
        kvcomp.compress(tiny_llama(), recipe, reserve=8, compiled=True, **settings),
    ):
        pass


def test_compiled_needs_to_know_how_many_tokens():
    with (
        pytest.raises(kvcomp.InputError, match="needs reserve"),
        kvcomp.compress(tiny_llama(), "snapkv", budget=0.5, compiled=True),
    ):
        pass
