"""Answers of a batch: what is compressed when, what one row sees of another, and what depends on what is kept."""

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from inference import left_padded
from models import text_inputs, tiny_llama
from PIL import Image

import kvcomp
from kvcomp.lab import LoadedTestbed, Sample
from kvcomp.lab.answers import answer
from kvcomp.lab.batches import Batch, QueryMode, make_batches
from kvcomp.lab.controls import KeepEvidence, find_method

NAME = "sample {} of s".format

MODES = list(QueryMode)


def only_batch(bed, samples, mode):
    (batch,) = make_batches(bed, NAME, samples, len(samples), mode)
    return batch


def strategy(name, budget, mode, **overrides):
    turns = {"turns": "append"} if mode is QueryMode.question_later else {}
    return kvcomp.strategy(name, budget, **overrides, **turns)


def decode_by_hand(bed, sample, chosen, mode):
    """Return the logits before each token of the reference answer: one row, one token at a time."""
    inputs, model = bed.encode([sample]), bed.model
    ids = torch.cat([inputs["input_ids"], torch.tensor([bed.codec.encode_answer(sample)])], dim=1)
    tokens = inputs["input_ids"].shape[1]
    positions, _ = model.model.get_rope_index(
        input_ids=ids,
        image_grid_thw=inputs["image_grid_thw"],
        mm_token_type_ids=torch.nn.functional.pad(inputs["mm_token_type_ids"], (0, ids.shape[1] - tokens)),
    )
    context = tokens - bed.codec.count_question(sample)
    cuts = [0, *([context] if mode is QueryMode.question_later else []), *range(tokens, ids.shape[1])]
    media = {name: inputs[name] for name in ("pixel_values", "image_grid_thw")}
    found = []
    with torch.inference_mode(), kvcomp.compress(model, chosen) as cache:
        for start, stop in pairwise(cuts):
            output = model(
                input_ids=ids[:, start:stop],
                position_ids=positions[..., start:stop],
                mm_token_type_ids=(ids[:, start:stop] == model.config.image_token_id).int(),
                past_key_values=cache,
                **(media if start == 0 else {}),
            )
            if stop >= tokens:
                found.append(output.logits[0, -1])
    return torch.stack(found)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("name", "budget"), [("flowmm", 0.3), ("streaming-llm", "9t"), ("h2o", 0.5)])
def test_forced_logits_are_those_of_decoding_the_answer_token_by_token(bed, echo, mode, name, budget):
    replies = {1: "riga 4 0", 4: "oslo 1 2 3"}
    samples = [replace(echo().sample("s", number), answer=reply) for number, reply in replies.items()]
    batch, chosen = only_batch(bed, samples, mode), strategy(name, budget, mode)
    logits = answer(batch, chosen, mode=mode, forced=True).logits
    for row, sample in enumerate(batch.samples):
        expected = decode_by_hand(bed, sample, chosen, mode)
        torch.testing.assert_close(logits[row, : len(expected)], expected, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("mode", MODES)
def test_the_full_cache_gives_the_logits_of_one_forward_without_a_cache(bed, echo, mode):
    samples = [replace(echo().sample("s", number), answer="4 0 7 1") for number in (1, 2, 4)]
    batch = only_batch(bed, samples, mode)
    logits = answer(batch, strategy("full", None, mode), mode=mode, forced=True).logits
    torch.testing.assert_close(logits, batch.full_logits, atol=2e-5, rtol=1e-5)


def test_only_the_context_is_compressed_where_the_question_comes_later(bed, echo):
    samples = [echo().sample("s", number) for number in (1, 2, 4)]
    for mode, question in ((QueryMode.question_seen, 0), (QueryMode.question_later, 7)):
        batch = only_batch(bed, samples, mode)
        held = answer(batch, strategy("random", 0.5, mode), mode=mode).held
        tokens = [length - question for length in batch.inputs["attention_mask"].sum(dim=1).tolist()]
        assert [layer.tokens for layer in held.report.layers] == [tuple(tokens)] * 4
        assert [layer.slots for layer in held.report.layers] == [tuple(length // 2 for length in tokens)] * 4


def test_what_was_held_is_what_a_bare_prefill_holds(bed, echo):
    batch = only_batch(bed, [echo().sample("s", number) for number in (1, 2)], QueryMode.question_seen)
    held = answer(batch, kvcomp.strategy("flowmm", 0.4)).held
    with torch.inference_mode(), kvcomp.compress(bed.model, "flowmm", 0.4) as cache:
        bed.model(**batch.inputs, past_key_values=cache)
    assert held.report.allocated_bytes == cache.report().allocated_bytes
    for layer, indices, counts in zip(cache.layers, held.indices, held.counts, strict=True):
        assert torch.equal(indices, layer.indices)
        torch.testing.assert_close(counts, layer.counts)


def pictures(colour):
    """Return a sample whose evidence is the colour of one image."""
    image = Image.new("RGB", (56, 56), colour)
    return Sample(("riga", image, "oslo"), "colour of riga ?", "riga red circle gone")


def test_after_the_first_token_an_answer_rests_on_nothing_but_what_is_kept(bed):
    """The trap that one-token answers fall into: with the question seen, the first token still sees everything."""
    first_slot = KeepEvidence(scorer=kvcomp.strategy("random").scorer, evidence=((0,), (0,)))
    one_slot = replace(kvcomp.strategy("random", "1t"), scorer=first_slot)
    batch = only_batch(bed, [pictures("red"), pictures("blue")], QueryMode.question_seen)
    red, blue = answer(batch, one_slot, forced=True).logits
    assert (red[0] - blue[0]).abs().max() > 1e-4
    torch.testing.assert_close(red[1:], blue[1:], atol=1e-6, rtol=0)
    full_red, full_blue = batch.full_logits
    assert (full_red[1:] - full_blue[1:]).abs().max() > 1e-4


def test_with_the_question_later_the_first_token_rests_on_what_is_kept_too(bed):
    first_slot = KeepEvidence(scorer=kvcomp.strategy("random").scorer, evidence=((0,), (0,)))
    one_slot = replace(kvcomp.strategy("random", "1t", turns="append"), scorer=first_slot)
    batch = only_batch(bed, [pictures("red"), pictures("blue")], QueryMode.question_later)
    red, blue = answer(batch, one_slot, mode=QueryMode.question_later, forced=True).logits
    torch.testing.assert_close(red, blue, atol=1e-6, rtol=0)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", ["flowmm", "snapkv", "oracle", "recency"])
def test_a_batch_gives_each_sample_what_it_gives_alone(bed, echo, mode, name):
    method = find_method(name, 0.4, **({"turns": "append"} if mode is QueryMode.question_later else {}))
    samples = [echo().sample("s", number) for number in (1, 2, 4, 5)]
    batch = only_batch(bed, samples, mode)
    together = answer(batch, method.strategy_for(batch), mode=mode, forced=True)
    for row, sample in enumerate(batch.samples):
        single = only_batch(bed, [sample], mode)
        alone = answer(single, method.strategy_for(single), mode=mode, forced=True)
        assert alone.predictions[0] == together.predictions[row]
        for indices, own in zip(together.held.indices, alone.held.indices, strict=True):
            assert [index for index in indices[row, 0].tolist() if index >= 0] == own[0, 0].tolist()
        torch.testing.assert_close(together.logits[row, : alone.logits.shape[1]], alone.logits[0], atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("mode", MODES)
def test_a_model_without_positions_of_its_own_is_given_those_of_its_rows(mode):
    class Words:
        """Answers are the same three tokens."""

        def encode_answer(self, sample):
            return [5, 6, 7]

        def decode(self, ids):
            return [" ".join(map(str, row)) for row in ids.tolist()]

    bed = LoadedTestbed("llama", tiny_llama(), Words())
    rows = [text_inputs(tokens, seed=tokens)["input_ids"] for tokens in (30, 19, 12)]
    samples = (Sample((), "", "5 6 7"),) * 3
    later = 4 if mode is QueryMode.question_later else 0
    batch = Batch(bed, NAME, (0, 1, 2), samples, left_padded(rows), later)
    full = answer(batch, strategy("full", None, mode), mode=mode, forced=True)
    torch.testing.assert_close(full.logits, batch.full_logits, atol=2e-5, rtol=1e-5)
    chosen = strategy("h2o", 0.4, mode)
    together = answer(batch, chosen, mode=mode, forced=True)
    for row, ids in enumerate(rows):
        alone = answer(
            Batch(bed, NAME, (0,), samples[:1], left_padded([ids]), later),
            chosen,
            mode=mode,
            forced=True,
        )
        assert alone.predictions[0] == together.predictions[row]
        torch.testing.assert_close(together.logits[row], alone.logits[0], atol=2e-5, rtol=1e-5)
