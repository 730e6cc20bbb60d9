from collections import Counter

import pytest
from PIL import Image

from kvcomp.minimile import TASKS
from kvcomp.minimile.drawing import HELD_OUT
from kvcomp.minimile.processor import build_processor
from kvcomp.minimile.rendering import Thing
from kvcomp.minimile.stories import TAIL, count_tokens, seeded
from kvcomp.minimile.tasks import HARD_TASKS
from kvcomp.minimile.vocabulary import COLOURS, SHAPES

ALL = {task.name: task for task in (*TASKS, *HARD_TASKS)}
tasks = pytest.mark.parametrize("task", ALL.values(), ids=list(ALL))
grids = pytest.mark.parametrize("task", [task for task in ALL.values() if task.grid], ids=lambda task: task.name)


def fingerprint(sample):
    parts = [part.tobytes() if isinstance(part, Image.Image) else part for part in sample.context]
    return (*parts, sample.question, sample.answer)


def words_of(parts):
    return " ".join(part if isinstance(part, str) else "<image>" for part in parts)


def test_the_ten_tasks():
    perception = ["text_needle", "image_needle", "recall", "retrieve", "mmcoqa"]
    names = [*perception, "clevr_change", "spot_diff", "iedit", "alfred", "order"]
    assert [task.name for task in TASKS] == [f"mini/{name}" for name in names]


@tasks
def test_a_sample_depends_on_split_and_index_alone(task):
    assert fingerprint(task.sample("test", 5)) == fingerprint(task.sample("test", 5))
    seen = {fingerprint(task.sample(split, index)) for split in ("train", "test", "eval-0") for index in range(8)}
    assert len(seen) == 24


@tasks
def test_prompts_hold_no_unknown_word_and_are_as_long_as_said(task):
    processor = build_processor()
    for index in range(4):
        sample = task.sample("test", index)
        inputs = processor.apply_chat_template(
            sample.messages(), tokenize=True, add_generation_prompt=True, return_dict=True, return_tensors="pt"
        )
        ids = inputs["input_ids"][0]
        assert len(ids) == count_tokens(sample.context) + len(sample.question.split()) + 5  # the frame
        assert processor.tokenizer.unk_token_id not in ids
        assert 95 <= count_tokens(sample.context) <= 215


@tasks
def test_the_answer_repeats_the_key_and_then_says_what_is_asked_for(task):
    for index in range(20):
        sample = task.sample("test", index)
        words = sample.answer.split()
        key = " ".join(words[: sample.slots[0]])
        assert sample.question.removesuffix(" ?").endswith(key)
        assert sample.slots == tuple(range(len(key.split()), len(words)))
        assert sample.slots[0] > 0


@tasks
def test_the_evidence_is_what_the_key_names(task):
    for index in range(10):
        sample = task.sample("test", index)
        parts = [sample.context[span.part] for span in sample.evidence]
        text = words_of(parts)
        label = sample.answer if task.name == "mini/retrieve" else sample.question
        named = [word for word in label.split() if word not in (*COLOURS, *SHAPES)]
        if task.name == "mini/order":
            assert text.count("<image>") == 2
        elif task.name != "mini/image_needle":
            assert any(word in text.split() for word in named)
        if "text_needle" in task.name:
            assert " ".join(sample.answer.split()[1:]) in text


@tasks
def test_no_two_questions_of_a_story_are_the_same(task):
    for index in range(5):
        story = task.compose(seeded("distinct", index), 1.0)
        assert len({question.text for question in story.questions}) == len(story.questions)


@tasks
@pytest.mark.parametrize("size", [0.05, 0.15, 0.4, 1.0])
def test_a_story_of_every_size_can_ask_what_its_task_asks(task, size):
    for index in range(10):
        story = task.compose(seeded("sizes", index), size)
        assert {question.kind for question in story.questions} >= set(task.kinds[: 1 if size < 0.1 else None])
        assert count_tokens(story.parts) <= 12 + 215 * size + 30


@tasks
def test_answers_of_a_task_are_spread_evenly(task):
    values = Counter(" ".join(task.sample("test", index).answer.split()[-1:]) for index in range(300))
    most = {"mini/iedit": 0.35, "mini/spot_diff": 0.8}.get(task.name, 0.4)
    assert max(values.values()) / 300 < most
    assert len(values) >= 4 or task.name == "mini/spot_diff"


@grids
def test_needles_stand_at_every_depth(task):
    found = []
    for index in range(10):
        sample = task.sample("test", index)
        before = count_tokens(sample.context[: sample.evidence[0].part])
        found.append(before / count_tokens(sample.context))
        assert sample.depth == pytest.approx(index / 10 + 0.05)
        assert min(sample.depth, 0.8) - 0.2 < found[-1] < sample.depth + 0.2  # the tail stays free
    assert found[0] < 0.2
    assert found[9] > 0.65


@tasks
def test_the_tail_of_the_context_answers_no_sample(task):
    for index in range(20):
        sample = task.sample("test", index)
        last = max(span.part for span in sample.evidence)
        assert count_tokens(sample.context[last + 1 :]) >= TAIL


def test_what_is_held_out_is_drawn_in_its_own_split_only():
    held_out = {str(thing) for thing in HELD_OUT}
    retrieve = ALL["mini/retrieve"]
    for index in range(20):
        assert retrieve.sample("held-out", index).question.removeprefix("name of ").removesuffix(" ?") in held_out
        story = retrieve.compose(seeded("train", index), 1.0)
        assert not held_out & {question.key for question in story.questions}
    looks = set()
    for index in range(20):
        asked = ALL["mini/recall"].compose(seeded("held", index), 1.0).questions
        looks |= {Thing(*pair) for pair in zip(*[iter(question.value for question in asked)] * 2, strict=True)}
    assert not looks & set(HELD_OUT)


def test_the_plan_of_alfred_goes_sideways_first():
    plans = {" ".join(ALL["mini/alfred"].sample("test", index).answer.split()[4:]) for index in range(200)}
    assert plans == {"left", "right", "up", "down", "left up", "left down", "right up", "right down"}


def test_two_needles_share_no_digit():
    for index in range(20):
        story = ALL["mini/text_needle"].compose(seeded("digits", index), 1.0)
        numbers = [question.value.split() for question in story.questions if question.kind == "number"]
        assert len({digit for number in numbers for digit in number}) == 8


def test_exact_match_ignores_white_space_only():
    task, sample = TASKS[0], TASKS[0].sample("test", 0)
    assert task.exact_match(sample.answer + " \n", sample)
    assert not task.exact_match(sample.answer.split()[0], sample)
