import pytest
import torch

from kvcomp.minimile import TASKS
from kvcomp.minimile.batching import IGNORED, collate, plain_row, story_row
from kvcomp.minimile.model import build_model, image_features
from kvcomp.minimile.processor import build_processor
from kvcomp.minimile.stories import Question, Story
from kvcomp.minimile.training import answer_logits
from kvcomp.minimile.vocabulary import IMAGE, TOKEN_IDS, encode


@pytest.fixture(scope="module")
def model():
    return build_model(seed=0).eval()


@pytest.fixture(scope="module")
def sample():
    return TASKS[2].sample("batching", 0)


@pytest.fixture(scope="module")
def prompt(sample):
    return build_processor().apply_chat_template(
        sample.messages(), tokenize=True, add_generation_prompt=True, return_dict=True, return_tensors="pt"
    )


@pytest.fixture(scope="module")
def batch(sample):
    story = Story(sample.context, ())
    return collate([story_row(story, [Question("code", sample.question, sample.answer)])])


def test_training_sees_the_tokens_and_pixels_that_the_processor_makes(prompt, batch):
    length = prompt["input_ids"].shape[1]
    assert torch.equal(batch.input_ids[:, :length], prompt["input_ids"])
    assert torch.equal(batch.pixel_values, prompt["pixel_values"])


def test_training_sees_the_positions_that_the_model_makes(model, prompt, batch):
    types = (batch.input_ids == TOKEN_IDS[IMAGE]).int()
    expected, _ = model.model.get_rope_index(batch.input_ids, types, image_grid_thw=prompt["image_grid_thw"])
    assert torch.equal(batch.position_ids, expected)


def test_the_fast_vision_tower_is_the_stock_one(model, prompt):
    with torch.no_grad():
        stock = model.model.visual(prompt["pixel_values"], grid_thw=prompt["image_grid_thw"]).pooler_output
        fast = image_features(model.model.visual, prompt["pixel_values"])
    torch.testing.assert_close(fast, stock, atol=1e-5, rtol=1e-5)


def test_the_training_logits_are_those_of_the_stock_forward(model, prompt, batch):
    with torch.no_grad():
        fast = answer_logits(model, batch)
        ids = batch.input_ids
        stock = model(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            mm_token_type_ids=(ids == TOKEN_IDS[IMAGE]).int(),
            pixel_values=prompt["pixel_values"],
            image_grid_thw=prompt["image_grid_thw"],
        ).logits[0]
    torch.testing.assert_close(fast, stock[prompt["input_ids"].shape[1] - 1 : -1], atol=1e-4, rtol=1e-4)


def test_loss_falls_on_answers_only(sample):
    other = Question("colour", "colour of oslo ?", "answer : red")
    questions = [Question("code", sample.question, sample.answer), other]
    batch = collate([story_row(Story(sample.context, ()), questions)])
    learned = batch.targets[batch.targets != IGNORED].tolist()
    assert learned == encode(f"{sample.answer} <|im_end|> answer : red <|im_end|>")
    assert batch.answers[batch.targets != IGNORED].tolist() == [0] * 7 + [1] * 4
    assert batch.kinds == ("code", "colour")


def test_a_plain_row_asks_without_the_frame(sample):
    questions = [
        Question("colour", "colour of oslo ?", "answer : oslo red"),
        Question("code", "code of image ?", "answer : 4 0 7 1"),
    ]
    batch = collate([plain_row(Story(("the river",), ()), questions)])
    assert batch.input_ids[0].tolist() == encode("<|im_start|> user the river colour of oslo red code of image 4 0 7 1")
    assert batch.targets[batch.targets != IGNORED].tolist() == encode("red 4 0 7 1")
    assert batch.kinds == ("plain colour", "plain code")


def test_padding_changes_no_logit(model, sample):
    questions = [Question("code", sample.question, sample.answer)]
    short, long = Story(sample.context[:3], ()), Story(sample.context, ())
    with torch.no_grad():
        alone = answer_logits(model, collate([story_row(short, questions)]))
        padded = answer_logits(model, collate([story_row(short, questions), story_row(long, questions, 1)]))
    torch.testing.assert_close(padded[: len(alone)], alone, atol=1e-4, rtol=1e-4)
