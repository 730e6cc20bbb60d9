"""A row of a batch gives what it gives alone."""

import pytest
import torch
from conversations import check_row, check_rows, converse, row
from inference import FIRM, RECIPES, STRATEGIES, generate_compressed, generate_stock, left_padded
from models import text_inputs, tiny_llama, tiny_qwen_vl

import kvcomp

LENGTHS = (90, 37, 12)
TEXT = [row(60, 1, 1, 11, 1, seed=1), row(27, 1, 1, 4, 1, seed=2), row(9, 1, 1, 7, 1, seed=3)]
PICTURES = [row("9i5i7", 1, "4i3", 1, seed=1), row("5i8", 1, 6, 1, seed=2), row("3i2i2", 1, 3, 1, seed=3)]
LARGE = {"full": None, "fastv": 0.97, "gear": 0.95, "kivi": 0.95, "mikv": 0.95, "minicache": 0.95}
COMPOSED = {
    "h2o, ragged": ("h2o", 0.3, {"allocator": "ada-heads", "store": "ragged"}),
    "flowmm, coded": ("flowmm", 0.3, {"store": {"use": "quantized", "bits": 4, "group": 16, "residual": 16}}),
    "d2o, mass": ("d2o", 0.3, {"mass_preserving": True}),
    "kvzip, appended": ("kvzip", 0.4, {"turns": "append"}),
}
CASES = {name: (name, LARGE.get(name, 0.3), {}) for name in RECIPES} | COMPOSED
TRIGGERS = {"over-budget": "over-budget", "every": {"every": 2}}


def recompresses(name: str) -> bool:
    """Whether a case can be compressed while tokens are decoded."""
    recipe, budget, overrides = CASES[name]
    if STRATEGIES[recipe].selector is None or recipe in FIRM or "turns" in overrides:
        return False
    try:
        return kvcomp.strategy(recipe, budget, **overrides, trigger="over-budget").recompresses
    except kvcomp.ConfigError:
        return False


def codes(name: str) -> bool:
    """Whether a case holds rounded numbers, where a rounding may tip."""
    recipe, budget, overrides = CASES[name]
    return kvcomp.strategy(recipe, budget, **overrides).store.shrinks


@pytest.mark.parametrize("name", CASES)
def test_rows_of_text_in_two_turns_are_what_they_are_alone(name):
    """Rows of very different lengths, padded before their prompt and before their second turn."""
    recipe, budget, overrides = CASES[name]
    budget = 1.0 if recipe == "fastv" else budget  # it drops images only
    cache = check_rows(tiny_llama(), TEXT, recipe, budget, near=0.05 if codes(name) else 1e-4, **overrides)
    assert [tuple(layer.tokens) for layer in cache.report().layers] == [(74, 34, 19)] * 3  # no pad is counted


@pytest.mark.parametrize("name", CASES)
def test_rows_with_pictures_in_both_turns_are_what_they_are_alone(name):
    recipe, budget, overrides = CASES[name]
    check_rows(tiny_qwen_vl(), PICTURES, recipe, budget, near=0.05 if codes(name) else 1e-4, **overrides)


@pytest.mark.slow
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", ["text", "pictures"])
@pytest.mark.parametrize("trigger", TRIGGERS)
@pytest.mark.parametrize("name", [name for name in CASES if recompresses(name)])
def test_rows_that_are_compressed_while_they_decode_are_what_they_are_alone(name, trigger, family, attention):
    recipe, budget, overrides = CASES[name]
    model, rows = (tiny_llama(), TEXT) if family == "text" else (tiny_qwen_vl(), PICTURES)
    model.set_attn_implementation(attention)
    near = 0.05 if codes(name) else 1e-4
    check_rows(model, rows, recipe, budget, near=near, trigger=TRIGGERS[trigger], **overrides)


ENDED = ["flowmm", "h2o", "h2o, ragged", "d2o, mass", "kvzip", "kvzip, appended", "pyramidkv", "mikv", "full"]


@pytest.mark.parametrize("name", ENDED)
@torch.no_grad()
def test_what_is_appended_to_a_row_that_has_ended_is_padding_in_the_next_turn(name):
    """The shorter row ends after one token, and `generate()` pads it while the other goes on; both are asked again."""
    recipe, budget, overrides = CASES[name]
    model = tiny_llama()
    batch = left_padded([text_inputs(tokens, seed=tokens)["input_ids"] for tokens in (60, 27)])
    ids = torch.cat([batch["input_ids"], text_inputs(12, batch=2)["input_ids"]], dim=1)
    mask = torch.cat([batch["attention_mask"], torch.ones(2, 12, dtype=torch.long)], dim=1)
    mask[1, 61:64] = 0
    session = kvcomp.attach(model)
    caches = [session.cache(recipe, budget, **overrides) for _ in range(3)]

    def feed(cache, ids, mask, widths, answered):
        said, end = [], 0
        for width in widths:
            start, end = end, end + width
            known = mask[:, :end].clone()
            known[:, widths[0] : answered] = 1 if end <= answered else known[:, widths[0] : answered]
            positions = (known.cumsum(dim=1) - 1).clamp(min=0)[:, start:]
            inputs = {"input_ids": ids[:, start:end], "attention_mask": known, "position_ids": positions}
            said.append(model(**inputs, past_key_values=cache).logits[:, -1])
        return said

    together = feed(caches[0], ids, mask, [60, 1, 1, 1, 1, 7, 1], answered=64)
    for place, (prompt, answer) in enumerate(((60, 4), (27, 1))):
        own = mask[place : place + 1][:, mask[place] == 1], ids[place : place + 1, mask[place] == 1]
        alone = feed(caches[1 + place], own[1], own[0], [prompt, *[1] * answer, 7, 1], answered=0)
        for seen, expected in zip(together[-2:], alone[-2:], strict=True):
            near = 0.05 if codes(name) else 1e-4
            torch.testing.assert_close(seen[place], expected[0], atol=near, rtol=near)
        check_row(caches[0], place, caches[1 + place], near=0.05 if codes(name) else 1e-4)
    session.detach()


@pytest.mark.parametrize("name", ["h2o", "h2o, ragged", "d2o, mass"])
@pytest.mark.parametrize("trigger", ["prefill-end", {"every": 2}], ids=str)
def test_sums_of_a_padded_row_are_those_that_it_has_alone(name, trigger):
    recipe, budget, overrides = CASES[name]
    model = tiny_llama()
    together = converse(model, TEXT, recipe, budget, trigger=trigger, **overrides)[1]
    for place, one in enumerate(TEXT):
        alone = converse(model, [one], recipe, budget, trigger=trigger, **overrides)[1]
        for layer, reference in zip(together.layers, alone.layers, strict=True):
            (sums,), (expected,) = layer.carried.values(), reference.carried.values()
            assert torch.allclose(sums[place].sum(dim=-1), expected[0].sum(dim=-1), rtol=1e-5)  # an empty slot has none


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("recipe", ["flowmm", "ada-kv", "kvzip", "mikv"])
def test_left_padded_rows_generate_what_they_do_alone(recipe, attention):
    model = tiny_llama()
    model.set_attn_implementation(attention)
    rows = [text_inputs(tokens, seed=tokens)["input_ids"] for tokens in LENGTHS]
    budget = LARGE.get(recipe, 0.3)
    batch, _ = generate_compressed(model, left_padded(rows), recipe, budget)
    for place, row_ids in enumerate(rows):
        output, _ = generate_compressed(model, {"input_ids": row_ids}, recipe, budget)
        assert torch.equal(batch.sequences[place, max(LENGTHS) :], output.sequences[0, row_ids.shape[1] :])


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("store", ["dense", "ragged"])
@torch.no_grad()
def test_a_mask_that_hides_only_padding_shows_every_slot_and_another_is_obeyed(attention, store):
    model = tiny_llama()
    model.set_attn_implementation(attention)
    inputs = left_padded([text_inputs(tokens, seed=tokens)["input_ids"] for tokens in (40, 23)])
    given = torch.cat([inputs["attention_mask"], torch.ones(2, 1, dtype=torch.long)], dim=1)
    step = {"input_ids": torch.tensor([[5], [6]]), "position_ids": torch.tensor([[40], [23]])}
    only_causal, logits = [], []
    with kvcomp.compress(model, "snapkv", 0.3, store=store) as cache:
        model(**inputs, past_key_values=cache)
        context, layer = cache.snapshot(), cache.layers[0]
        kept = int(layer.indices[0, 0, 3])
        for hidden in ([], [kept]):
            mask = given.clone()
            mask[0, hidden] = 0
            logits.append(model(**step, attention_mask=mask, past_key_values=cache).logits)
            only_causal.append(layer.only_causal(mask[:, None, None].bool()))
            cache.restore(context)
    assert only_causal == [True, False]
    torch.testing.assert_close(logits[0][1], logits[1][1])
    assert (logits[0][0] - logits[1][0]).abs().max() > 1e-3


def test_beams_and_samples_at_budget_one_are_those_of_the_stock_cache():
    model, inputs = tiny_llama(), text_inputs(40)
    settings = {"num_beams": 3, "num_return_sequences": 2, "output_logits": False}
    stock = generate_stock(model, inputs, **settings)
    assert torch.equal(generate_compressed(model, inputs, "flowmm", 1.0, **settings)[0].sequences, stock.sequences)
    settings = {"do_sample": True, "num_return_sequences": 4, "output_logits": False}
    torch.manual_seed(1)
    stock = generate_stock(model, inputs, **settings)
    torch.manual_seed(1)
    assert torch.equal(generate_compressed(model, inputs, "h2o", 1.0, **settings)[0].sequences, stock.sequences)
