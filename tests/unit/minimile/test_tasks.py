from collections import Counter

import pytest
from PIL import Image

from kvcomp.minimile import TASKS
from kvcomp.minimile.processor import build_processor
from kvcomp.minimile.vocabulary import COLOURS, SHAPES

tasks = pytest.mark.parametrize("task", TASKS, ids=lambda task: task.name)


def fingerprint(sample):
    parts = [part.tobytes() if isinstance(part, Image.Image) else part for part in sample.context]
    return (*parts, sample.question, sample.answer)


def test_names():
    assert [task.name for task in TASKS] == ["mini/text-needle", "mini/image-recall", "mini/image-needle"]


@tasks
def test_a_sample_depends_on_split_and_index_alone(task):
    assert fingerprint(task.sample("test", 5)) == fingerprint(task.sample("test", 5))
    splits = ("train", "test", "other")
    seen = {fingerprint(task.sample(split, index)) for split in splits for index in range(8)}
    assert len(seen) == 24


@tasks
def test_prompts_have_at_least_250_tokens(task):
    processor = build_processor()
    for index in range(6):
        inputs = processor.apply_chat_template(
            task.sample("test", index).messages(),
            tokenize=True,
            add_generation_prompt=True,
            return_dict=True,
            return_tensors="pt",
        )
        assert 250 <= inputs["input_ids"].shape[1] <= 340
        assert processor.tokenizer.unk_token_id not in inputs["input_ids"]


@tasks
def test_an_answer_starts_with_the_fixed_lead_and_never_ends_there(task):
    for index in range(20):
        assert task.sample("test", index).answer.startswith("answer : ")
        assert len(task.sample("test", index).answer.split()) in (4, 6)


def test_image_recall_is_balanced_and_cannot_be_guessed_from_what_occurs():
    task = TASKS[1]
    answers = Counter(task.sample("test", index).answer.split()[-1] for index in range(400))
    assert set(answers) == set(COLOURS) | set(SHAPES)
    assert all(10 <= answers[colour] <= 45 for colour in COLOURS)  # 25 expected
    assert all(30 <= answers[shape] <= 75 for shape in SHAPES)  # 50 expected


@pytest.mark.parametrize("task", [TASKS[0], TASKS[2]], ids=lambda task: task.name)
def test_needles_use_every_digit_about_equally(task):
    words = [word for index in range(200) for word in task.sample("test", index).answer.split()]
    digits = Counter(word for word in words if word.isdigit())
    expected = digits.total() / 10
    assert len(digits) == 10
    assert all(0.6 * expected < count < 1.4 * expected for count in digits.values())


def test_the_text_needle_stands_in_the_context_exactly_once():
    for index in range(20):
        sample = TASKS[0].sample("test", index)
        text = " ".join(part if isinstance(part, str) else "<image>" for part in sample.context)
        needle = f"number of {sample.answer.removeprefix('answer : ')} ."
        assert text.count(needle) == 1
        assert text.count("number of") == 3


def test_exact_match_ignores_white_space_only():
    task, sample = TASKS[0], TASKS[0].sample("test", 0)
    assert task.exact_match(sample.answer + " \n", sample)
    assert not task.exact_match("answer :", sample)
