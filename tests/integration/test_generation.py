"""Beams, samples, crops and rows that are picked, over every way in which a layer is stored."""

import functools

import pytest
import torch
from conversations import check_row, feed, row
from inference import generate, generate_stock, left_padded
from models import text_inputs, tiny_llama

import kvcomp

STORED = {
    "dense": ("flowmm", 0.3, {}),
    "ragged": ("ada-kv", 0.3, {}),
    "ragged after a second pass": ("kvzip", 0.4, {}),
    "quantized": ("kivi", 0.95, {}),
    "two precisions": ("mikv", 0.95, {}),
    "pairs of layers": ("minicache", 0.95, {}),
    "at every token": ("h2o", {"tokens": 12}, {"trigger": "over-budget"}),
    "remembering": ("d2o", 0.3, {"trigger": {"every": 2}, "mass_preserving": True}),
}
EXACT = [name for name in STORED if name.startswith(("dense", "ragged"))]  # a crop leaves what stays as it is
PROMPTS = [text_inputs(tokens, seed=tokens)["input_ids"] for tokens in (50, 20)]


@functools.cache
def model():
    return tiny_llama()


def cached(name: str):
    recipe, budget, overrides = STORED[name]
    return kvcomp.compress(model(), recipe, budget=budget, **overrides)


@torch.no_grad()
def said_alone(name: str, prompt: torch.Tensor, said: torch.Tensor) -> torch.Tensor:
    """The logits `(tokens, vocabulary)` that each token of a continuation was chosen by, fed one by one to a cache of
    its own.
    """
    with cached(name) as cache:
        logits = [model()(input_ids=prompt, past_key_values=cache).logits[0, -1]]
        for token in said[:-1]:
            logits.append(model()(input_ids=token.view(1, 1), past_key_values=cache).logits[0, -1])
    return torch.stack(logits)


@pytest.mark.parametrize("name", STORED)
def test_beams_score_what_each_continuation_scores_alone(name):
    """Whatever beams were dropped and doubled on the way, each cache row must be that of its own tokens."""
    settings = {"num_beams": 3, "num_return_sequences": 2, "length_penalty": 0.0, "output_scores": True}
    with cached(name) as cache:
        output = generate(model(), left_padded(PROMPTS), cache, 5, output_logits=False, **settings)
    for place, sequence in enumerate(output.sequences):
        said = sequence[PROMPTS[0].shape[1] :]
        chosen_by = said_alone(name, PROMPTS[place // 2], said).log_softmax(dim=-1)
        score = chosen_by.gather(1, said[:, None]).sum()
        assert output.sequences_scores[place].item() == pytest.approx(score.item(), abs=2e-3)


@pytest.mark.parametrize("name", STORED)
def test_samples_are_drawn_from_what_each_continuation_says_alone(name):
    torch.manual_seed(3)
    with cached(name) as cache:
        output = generate(model(), left_padded(PROMPTS), cache, 4, do_sample=True, num_return_sequences=2)
    logits = torch.stack(output.logits, dim=1)  # (batch * 2, tokens, vocabulary)
    assert len({tuple(sequence.tolist()) for sequence in output.sequences}) == 4
    for place, sequence in enumerate(output.sequences):
        expected = said_alone(name, PROMPTS[place // 2], sequence[PROMPTS[0].shape[1] :])
        torch.testing.assert_close(logits[place], expected, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize(
    ("name", "deferred"), [(name, False) for name in STORED] + [("dense", True), ("ragged after a second pass", True)]
)
def test_picked_and_repeated_rows_go_on_as_they_would_alone(name, deferred):
    rows = [row(40, 1, 1, seed=1), row(26, 1, 1, seed=2), row(13, 1, 1, seed=3)]
    recipe, budget, overrides = STORED[name]
    session = kvcomp.attach(model())
    caches = [session.cache(recipe, budget, defer=deferred, **overrides) for _ in range(4)]
    with torch.no_grad():
        for cache, members in zip(caches, (rows, *([one] for one in rows)), strict=True):
            feed(model(), cache, members, range(0, 2 - deferred))
        together, *alone = caches
        together.batch_repeat_interleave(2)  # 0 0 1 1 2 2
        together.reorder_cache(torch.tensor([5, 4, 0, 1, 3, 2]))  # 2 2 0 0 1 1
        together.batch_select_indices(torch.tensor([3, 4, 1]))  # 0 1 2
        logits = feed(model(), together, rows, range(2 - deferred, 3))
        for place, (cache, one) in enumerate(zip(alone, rows, strict=True)):
            for seen, expected in zip(logits, feed(model(), cache, [one], range(2 - deferred, 3)), strict=True):
                torch.testing.assert_close(seen[place], expected[0], atol=1e-3, rtol=1e-3)
            check_row(together, place, cache, near=1e-3)
    session.detach()


@pytest.mark.parametrize("sign", ["tokens to remove", "length that stays"])
@pytest.mark.parametrize("name", EXACT)
def test_a_crop_takes_back_decoded_tokens(name, sign):
    """Transformers 5.17 and later give how many go, older ones how many stay."""
    rows = [row(40, 1, 1, 1, seed=1), row(22, 1, 1, 1, seed=2)]
    with cached(name) as cache, torch.no_grad():
        first = feed(model(), cache, rows)
        keys = cache.layers[1].keys.clone()
        cache.crop(-2 if sign == "tokens to remove" else cache.get_seq_length() - 2)
        assert cache.report().layers[0].tokens == (41, 23)
        again = feed(model(), cache, rows, range(2, 4))
    for before, after in zip(first[2:], again, strict=True):
        torch.testing.assert_close(after, before, atol=1e-5, rtol=1e-5)
    assert torch.equal(cache.layers[1].keys, keys)


DRAFTS = {
    "assisted": lambda: {"assistant_model": tiny_llama(seed=1)},
    "prompt lookup": lambda: {"prompt_lookup_num_tokens": 3},
}


@pytest.mark.parametrize("budget", [0.3, {"tokens": 500}], ids=str)
@pytest.mark.parametrize("drafts", DRAFTS)
def test_drafts_are_refused_before_the_model_is_run(drafts, budget):
    fed: list[int] = []
    handle = model().register_forward_pre_hook(lambda *_: fed.append(1))
    try:
        with (
            pytest.raises(kvcomp.UnsupportedUseError, match="without assistant_model and prompt_lookup_num_tokens"),
            kvcomp.compress(model(), "h2o", budget=budget) as cache,
        ):
            generate(model(), text_inputs(40), cache, **DRAFTS[drafts]())
    finally:
        handle.remove()
    assert not fed
    assert not cache.used


@pytest.mark.parametrize("drafts", DRAFTS)
def test_drafts_may_be_taken_back_where_nothing_is_compressed(drafts):
    inputs = {"input_ids": torch.tensor([[5, 6, 7, 8] * 10])}
    with kvcomp.compress(model(), "flowmm", budget=1.0) as cache:
        output = generate(model(), inputs, cache, **DRAFTS[drafts]())
    assert torch.equal(output.sequences, generate_stock(model(), inputs).sequences)
