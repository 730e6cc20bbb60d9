import pytest
import torch

from kvcomp.minimile import TASKS
from kvcomp.minimile.batching import (
    COPY,
    IGNORED,
    PAIRS,
    collate,
    copy_drill,
    open_row,
    pairs_drill,
    write_plain_row,
    write_row,
)
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
    return TASKS[1].sample("batching", 0)


@pytest.fixture(scope="module")
def prompt(sample):
    return build_processor().apply_chat_template(
        sample.messages(), tokenize=True, add_generation_prompt=True, return_dict=True, return_tensors="pt"
    )


def asked(sample):
    """The question of the image needle, whose answer repeats its one word."""
    key, *value = sample.answer.split()
    return Question("code", "", key, " ".join(value), (0,))


def story_of(parts):
    return Story(tuple(parts), (), ())


@pytest.fixture(scope="module")
def batch(sample):
    return collate([write_row(story_of(sample.context), [asked(sample)], "task")])


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
    questions = [asked(sample), Question("colour", "colour of", "oslo", "red", (0,))]
    batch = collate([write_row(story_of(sample.context), questions, "task")])
    wanted = batch.targets != IGNORED
    assert batch.targets[wanted].tolist() == encode(f"{sample.answer} <|im_end|> oslo red <|im_end|>")
    assert batch.answers[wanted].tolist() == [0] * 6 + [1] * 3
    assert batch.kinds == ("task code", "task colour")


def test_a_plain_row_asks_without_the_frame():
    questions = [Question("colour", "colour of", "oslo", "red", (0,)), Question("code", "", "code", "4 0 7 1", (0,))]
    batch = collate([write_plain_row(story_of(["the river"]), questions, "task")])
    assert batch.input_ids[0].tolist() == encode("<|im_start|> user the river colour of oslo red code 4 0 7 1")
    assert batch.targets[batch.targets != IGNORED].tolist() == encode("red 4 0 7 1")
    assert batch.kinds == ("task colour", "task code")


def test_padding_changes_no_logit(model, sample):
    short, long = story_of(sample.context[:3]), story_of(sample.context)
    rows = [write_row(story, [asked(sample)], "task") for story in (short, long)]
    with torch.no_grad():
        alone, padded = (answer_logits(model, collate(chosen)) for chosen in (rows[:1], rows))
    torch.testing.assert_close(padded[: len(alone)], alone, atol=1e-4, rtol=1e-4)


def test_the_second_half_of_a_copy_is_the_first_one_rotated():
    batch = collate([open_row([copy_drill([30, 31, 32, 33], 1)])])
    assert batch.input_ids[0].tolist() == [*encode("<|im_start|> user"), 30, 31, 32, 33, 31, 32, 33, 30]
    assert batch.targets[batch.targets != IGNORED].tolist() == [32, 33, 30]
    assert batch.kinds == (COPY,)


def test_pairs_ask_for_every_value_once_more():
    batch = collate([open_row([pairs_drill([(40, [1, 2]), (41, [3, 4])], [1, 0])])])
    assert batch.input_ids[0].tolist() == [*encode("<|im_start|> user"), 40, 1, 2, 41, 3, 4, 41, 3, 4, 40, 1, 2]
    assert batch.targets[batch.targets != IGNORED].tolist() == [3, 4, 1, 2]
    assert batch.kinds == (PAIRS, PAIRS)


def test_answers_are_numbered_through_all_rows(sample):
    drill = copy_drill([30, 31], 0)
    rows = [write_plain_row(story_of(["the"]), [asked(sample)], "task", [drill]) for _ in range(2)]
    batch = collate(rows)
    assert batch.kinds == (COPY, "task code") * 2
    assert sorted(set(batch.answers.flatten().tolist())) == [-1, 0, 1, 2, 3]
