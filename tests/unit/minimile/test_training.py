import pytest
import torch
from safetensors.torch import load_file

from kvcomp.minimile import training
from kvcomp.minimile.batching import COPY, IGNORED, Batch
from kvcomp.minimile.model import SIZES
from kvcomp.minimile.training import DECAY_STEPS, Progress, Run, answer_loss, score, train

LEARNING_RATE = SIZES["xs"].learning_rate


@pytest.fixture(autouse=True)
def small_steps(monkeypatch):
    monkeypatch.setattr(training, "BUDGET", 200)


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


def test_a_checkpoint_knows_its_size(tmp_path):
    run = Run(seed=2, size="s")
    run.save(tmp_path / "last")
    again = Run.load(tmp_path / "last")
    assert again.progress == run.progress
    assert again.model.config.text_config.num_hidden_layers == 6


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


def test_a_finished_run_descends_again_from_a_share_of_the_rate():
    progress = Progress(step=600, seconds=300.0, decay_start=400, decay_steps=200)
    assert progress.finished()
    progress.descend_again(0.5, minutes=10)
    assert progress.decay_steps == 1_200  # ten minutes at two steps a second
    assert progress.learning_rate() == pytest.approx(LEARNING_RATE / 2)
    progress.step += 900
    assert progress.learning_rate() == pytest.approx(LEARNING_RATE / 8)
    progress.step += 300
    assert progress.finished()


def test_a_second_descent_needs_a_checkpoint(tmp_path, capsys):
    with pytest.raises(SystemExit):
        training.main(["--out", str(tmp_path), "--again", "0.5"])
    assert "add --resume" in capsys.readouterr().err


def test_the_decay_starts_once_every_task_is_learned(monkeypatch):
    run = Run()
    run.progress.step = 7
    run.advance()
    assert run.progress.decay_start is None
    monkeypatch.setattr(type(run.progress.course), "finished", True)
    run.advance()
    assert run.progress.decay_start == 7


def small_batch():
    """Two answers: a drill of two tokens and a question of one."""
    targets = torch.tensor([[3, 4, IGNORED, 5]])
    answers = torch.tensor([[0, 0, -1, 1]])
    nothing = torch.zeros(0)
    return Batch(nothing, nothing, targets, answers, nothing, (COPY, "task colour"))


def test_an_answer_is_right_when_all_its_tokens_are():
    logits = torch.eye(8)[[3, 4, 5]]
    assert score(logits, small_batch()) == {COPY: 1.0, "task colour": 1.0}
    logits = torch.eye(8)[[3, 6, 5]]
    assert score(logits, small_batch()) == {COPY: 0.5, "task colour": 1.0}  # drills count by the token


def test_drills_and_questions_weigh_the_same():
    logits = 5 * torch.eye(8)[[3, 6, 5]]
    losses = torch.nn.functional.cross_entropy(logits, torch.tensor([3, 4, 5]), reduction="none")
    expected = losses[:2].mean() + losses[2]
    torch.testing.assert_close(answer_loss(logits, small_batch()), expected)
