import pytest
import torch
from safetensors.torch import load_file

from kvcomp.minimile import curriculum, training
from kvcomp.minimile.curriculum import FINAL_STAGE, choose_questions, copy_batch, draw_recipe, story_batch
from kvcomp.minimile.stories import compose, count_tokens, seeded
from kvcomp.minimile.training import DECAY_STEPS, LEARNING_RATE, Mix, Progress, Run, train
from kvcomp.minimile.vocabulary import encode


@pytest.fixture(autouse=True)
def small_steps(monkeypatch):
    monkeypatch.setattr(training, "FIRST_MIX", Mix(story_tokens=100, copies=1, recalls=1))


def test_two_steps_and_two_resumed_ones_give_the_weights_of_four(tmp_path):
    whole = Run(seed=1)
    for _ in range(4):
        whole.step()
    first = Run(seed=1)
    for _ in range(2):
        first.step()
    first.save(tmp_path / "last")
    second = Run.load(tmp_path / "last")
    for _ in range(2):
        second.step()
    assert second.progress == whole.progress
    for (name, left), right in zip(second.model.named_parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(left, right), name


def test_a_checkpoint_holds_no_pickle_and_replaces_the_one_before(tmp_path):
    run = Run()
    run.step()
    run.save(tmp_path / "last")
    run.step()
    run.save(tmp_path / "last")
    assert {path.name for path in (tmp_path / "last").iterdir()} == {
        "model.safetensors",
        "optimizer.safetensors",
        "progress.json",
    }
    assert [path.name for path in tmp_path.iterdir()] == ["last"]
    assert load_file(tmp_path / "last" / "optimizer.safetensors")["0.step"].item() == 2


def test_training_reports_progress_and_stops_when_the_rate_has_fallen_to_zero(tmp_path, capsys):
    run = Run()
    run.progress.decay_start, run.progress.decay_steps = 0, 2
    train(run, tmp_path / "last", minutes=5, log_every=1)
    assert run.progress.finished()
    assert len(run.progress.log) == 2
    assert capsys.readouterr().out.count('"step"') == 2


def test_the_clock_starts_the_decay(tmp_path):
    run = Run()
    train(run, tmp_path / "last", minutes=1e-9)  # over before the first step ends, on any machine
    assert run.progress.decay_start == 1


def test_learning_rate_warms_up_stays_and_falls():
    assert Progress(step=0).learning_rate() == pytest.approx(LEARNING_RATE / 100)
    assert Progress(step=5_000).learning_rate() == LEARNING_RATE
    assert Progress(step=5_000 + DECAY_STEPS // 2, decay_start=5_000).learning_rate() == pytest.approx(1e-3)


def test_stages_advance_once_every_kind_is_right():
    run = Run()
    run.progress.stage_step = 40
    run.progress.right = {"colour": 1.0, "number": 0.8, "copy": 0.0}
    run.advance()
    assert run.progress.stage == 0
    run.progress.right["number"] = 0.86
    run.advance()
    assert (run.progress.stage, run.progress.stage_step) == (1, 0)
    run.progress.stage, run.progress.stage_step = FINAL_STAGE, 40
    run.advance()
    assert run.progress.decay_start is None
    run.progress.right["number"] = 0.97
    run.advance()
    assert run.progress.decay_start == run.progress.step


def test_batches_depend_on_seed_and_step_alone():
    first, again, other = (story_batch(0, step, 3, 400) for step in (5, 5, 6))
    assert torch.equal(first.input_ids, again.input_ids)
    assert torch.equal(first.pixel_values, again.pixel_values)
    assert first.input_ids.shape != other.input_ids.shape or not torch.equal(first.input_ids, other.input_ids)


def test_the_second_half_of_a_copy_row_is_the_first_one_rotated():
    batch = copy_batch(0, 0, copies=2, recalls=0)
    words = batch.input_ids[0, 2:].tolist()  # after the opening, which all rows share
    first, second = words[: len(words) // 2], words[len(words) // 2 :]
    turn = first.index(second[0])
    assert second == first[turn:] + first[:turn]
    assert (batch.targets[0] >= 0).sum() == len(first) - 1


def test_a_recall_row_asks_for_every_value_once_more():
    batch = copy_batch(0, 0, copies=0, recalls=1)
    ids, answers = batch.input_ids[0].tolist(), batch.answers[0].tolist()
    assert batch.kinds == ("recall",) * curriculum.PAIRS
    for answer in range(curriculum.PAIRS):
        start, length = answers.index(answer), answers.count(answer)
        pair = ids[start : start + 1 + length]  # the key, then its value
        places = [place for place in range(len(ids)) if ids[place : place + len(pair)] == pair]
        assert len(places) == 2


def test_every_row_opens_alike_so_that_no_mode_can_be_told_from_the_opening():
    stories, copies = story_batch(0, 0, 1, 500), copy_batch(0, 0, copies=2, recalls=2)
    opening = encode("<|im_start|> user")
    assert all(row[:2] == opening for row in (*stories.input_ids.tolist(), *copies.input_ids.tolist()))


@pytest.mark.parametrize("stage", range(FINAL_STAGE + 1))
def test_every_stage_asks_distinct_questions_of_a_long_enough_context(stage):
    rng = seeded("stages", stage)
    recipe = draw_recipe(rng, stage)
    story = compose(rng, recipe)
    questions = choose_questions(rng, story)
    assert count_tokens(story.parts) >= recipe.tokens
    assert len({question.text for question in questions}) == len(questions) <= curriculum.QUESTIONS
    assert sum(question.kind == "code" for question in questions) == recipe.codes
