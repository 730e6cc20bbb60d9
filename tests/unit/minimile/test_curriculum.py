import pytest
import torch

from kvcomp.minimile.batching import COPY, PAIRS
from kvcomp.minimile.curriculum import (
    DRILLED,
    EARLIER,
    FINAL_LEVEL,
    FIRST_TASKS,
    OTHER_QUESTIONS,
    PASS,
    QUESTIONS,
    Course,
    choose_questions,
    draw_batch,
)
from kvcomp.minimile.stories import seeded
from kvcomp.minimile.tasks import HARD_TASKS, TASKS
from kvcomp.minimile.vocabulary import IM_START, TOKEN_IDS, encode

ALL = {task.name: task for task in (*TASKS, *HARD_TASKS)}


def passed(course, name, share=1.0):
    for kind in ALL[name].kinds:
        course.right[f"{name} {kind}"] = share
    course.steps[name] = 40


def whole_course(level=FINAL_LEVEL, share=1.0):
    course = Course(levels=dict.fromkeys(ALL, level), right={COPY: 1.0, PAIRS: 1.0})
    for name in ALL:
        passed(course, name, share)
    return course


def test_a_task_goes_on_when_every_kind_of_its_questions_is_right():
    course = Course()
    passed(course, "mini/recall")
    course.right["mini/recall shape"] = PASS - 0.01
    course.advance()
    assert course.levels["mini/recall"] == 0
    course.right["mini/recall shape"] = PASS
    course.advance()
    assert course.levels["mini/recall"] == 1
    course.advance()  # the steps at the new level count anew
    assert course.levels["mini/recall"] == 1


def test_the_others_begin_once_names_are_bound():
    course = Course(levels=dict.fromkeys(FIRST_TASKS, 1))
    course.advance()
    assert set(course.levels) == set(FIRST_TASKS)
    course.levels = dict.fromkeys(FIRST_TASKS, 2)
    course.advance()
    assert set(course.levels) == {task.name for task in TASKS} | {"mini/image_needle_hard"}
    course.levels["mini/recall"] = FINAL_LEVEL
    course.advance()
    assert "mini/recall_hard" in course.levels
    assert "mini/text_needle_hard" not in course.levels


def test_a_course_is_finished_when_every_task_is_learned_at_its_own_size():
    assert whole_course().finished
    assert not whole_course(level=FINAL_LEVEL - 1).finished
    assert not whole_course(share=0.9).finished


def test_shares_are_remembered_as_running_means_and_steps_counted_by_task():
    course = Course()
    course.remember({"mini/recall colour": 1.0, COPY: 0.5})
    course.remember({"mini/recall colour": 0.0})
    assert course.right["mini/recall colour"] == pytest.approx(0.05 * 0.95)
    assert course.right[COPY] == pytest.approx(0.025)
    assert course.steps["mini/recall"] == 2


def test_batches_depend_on_seed_step_and_course_alone():
    first, again, other = (draw_batch(0, step, Course(), 400) for step in (5, 5, 6))
    assert torch.equal(first.input_ids, again.input_ids)
    assert torch.equal(first.pixel_values, again.pixel_values)
    assert first.input_ids.shape != other.input_ids.shape or not torch.equal(first.input_ids, other.input_ids)
    assert first.kinds == again.kinds


def test_every_row_opens_alike_so_that_no_mode_can_be_told_from_the_opening():
    opening = encode("<|im_start|> user")
    for step in range(10):
        for course in (Course(), whole_course()):
            assert all(row[:2] == opening for row in draw_batch(0, step, course, 300).input_ids.tolist())


def test_the_chat_frame_comes_once_names_are_bound():
    def turns(course):
        ids = torch.cat([draw_batch(0, step, course, 300).input_ids.flatten() for step in range(10)])
        return int((ids == TOKEN_IDS[IM_START]).sum())

    rows = sum(len(draw_batch(0, step, Course(), 300).input_ids) for step in range(10))
    assert turns(Course()) == rows  # the opening of each row and no other turn
    assert turns(whole_course()) > 2 * rows


def test_drills_become_rare_once_they_are_learned():
    def drilled(course):
        return sum(COPY in draw_batch(0, step, course, 200).kinds for step in range(40))

    eager, calm = whole_course(), whole_course()
    eager.right[COPY] = DRILLED - 0.01
    assert drilled(calm) < 12 < 20 < drilled(eager)


def test_questions_of_levels_below_the_newest_do_not_count_for_it():
    kinds = {kind for step in range(10) for kind in draw_batch(0, step, whole_course(), 500).kinds}
    assert any(kind.startswith(EARLIER) for kind in kinds)
    assert {kind.split()[0] for kind in kinds} <= {*ALL, EARLIER, COPY, PAIRS}


def test_own_questions_are_chosen_first_and_few_others():
    story = ALL["mini/text_needle"].compose(seeded("choice"), 1.0)
    chosen = choose_questions(seeded("order"), story, ("number",))
    assert len(chosen) == len({question.text for question in chosen}) == 2 + OTHER_QUESTIONS
    assert sum(question.kind == "number" for question in chosen) == 2
    assert len(choose_questions(seeded("order"), story, ("colour", "shape"))) == QUESTIONS
