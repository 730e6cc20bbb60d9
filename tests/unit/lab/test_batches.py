"""Batches: who is in them, where their contexts end, and what the reference answers add."""

from dataclasses import replace

import pytest
import torch
from PIL import Image

from kvcomp.core.errors import InputError
from kvcomp.lab import Sample
from kvcomp.lab.batches import IGNORED, QueryMode, make_batches
from kvcomp.minimile.vocabulary import encode


@pytest.fixture
def samples(echo):
    return [echo().sample("s", number) for number in range(7)]


def batches(bed, samples, size, mode):
    return list(make_batches(bed, "sample {} of fake/echo".format, samples, size, QueryMode(mode)))


@pytest.mark.parametrize("mode", list(QueryMode))
def test_every_sample_is_asked_once_in_batches_of_at_most_the_size(bed, samples, mode):
    made = batches(bed, samples, 3, mode)
    assert sorted(number for batch in made for number in batch.numbers) == list(range(7))
    assert all(batch.samples == tuple(samples[number] for number in batch.numbers) for batch in made)
    assert [len(batch.samples) for batch in made] == ([3, 3, 1] if mode == "question_seen" else [3, 1, 3])


def test_prompts_of_similar_length_stand_together(bed, samples):
    made = batches(bed, samples, 3, "question_seen")
    lengths = [length for batch in made for length in batch.inputs["attention_mask"].sum(dim=1).tolist()]
    assert lengths == sorted(lengths)
    assert lengths[0] < lengths[-1]


def test_with_question_later_every_row_ends_its_context_in_the_same_column(bed, samples):
    for batch in batches(bed, samples, 3, "question_later"):
        context = batch.context
        kept = context["input_ids"].shape[1]
        assert context["attention_mask"].shape == context["input_ids"].shape
        for row, sample in enumerate(batch.samples):
            ids = batch.inputs["input_ids"][row]
            assert ids[kept:].tolist() == encode(f"{sample.question} <|im_end|> <|im_start|> assistant")
            assert ids[:kept][-1] == encode("<|vision_end|>")[0]


def test_a_sample_without_a_question_of_its_own_is_named(bed, samples):
    samples[2] = replace(samples[2], question="")
    with pytest.raises(InputError, match="sample 2 of fake/echo has none"):
        batches(bed, samples, 3, "question_later")
    assert len(batches(bed, samples, 7, "question_seen")) == 1


def test_evidence_is_counted_without_padding(bed, samples):
    (batch,) = batches(bed, samples, 7, "question_seen")
    # 2 of the frame, 7 for lisbon and its image, then oslo, a mark, and the second and third token of its image
    assert set(batch.evidence) == {(9, 12, 13)}
    assert len({*batch.inputs["attention_mask"].sum(dim=1).tolist()}) > 1


def test_evidence_that_is_not_found_names_the_sample(bed, samples, monkeypatch):
    (batch,) = batches(bed, samples[4:], 7, "question_seen")
    monkeypatch.setattr(type(bed), "visual", lambda self, inputs: inputs["input_ids"] < 0)
    number = batch.numbers[0]
    with pytest.raises(InputError, match=f"evidence of sample {number} of fake/echo: the prompt's tokens"):
        batch.evidence  # noqa: B018


def test_reference_answers_stand_behind_the_prompts(bed):
    samples = [Sample(("riga",), "number ?", answer) for answer in ("4", "4 0 7")]
    (batch,) = batches(bed, samples, 2, "question_seen")
    assert batch.targets.tolist() == [[*encode("4"), IGNORED, IGNORED], encode("4 0 7")]
    tokens = batch.inputs["input_ids"].shape[1]
    assert torch.equal(batch.answered["input_ids"][:, :tokens], batch.inputs["input_ids"])
    assert batch.answered["input_ids"][1, tokens:].tolist() == encode("4 0 7")
    assert batch.answered["attention_mask"].shape == batch.answered["input_ids"].shape


@pytest.mark.parametrize("mode", list(QueryMode))
def test_a_sample_that_the_processor_does_not_take_is_named(bed, samples, mode):
    narrow = replace(samples[4], context=("lisbon", Image.new("RGB", (2500, 4))))
    with pytest.raises(
        InputError, match=r"sample 4 of fake/echo: a prompt must be one that .*Processor takes"
    ) as caught:
        batches(bed, [*samples[:4], narrow, *samples[5:]], 7, mode)
    assert "aspect ratio" in str(caught.value)
