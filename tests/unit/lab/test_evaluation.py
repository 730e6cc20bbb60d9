"""An evaluation: what a row says, against its outcomes and against loops that anyone can follow."""

import math
from dataclasses import replace

import pytest
import torch

from kvcomp.lab.answers import answer
from kvcomp.lab.batches import QueryMode, make_batches
from kvcomp.lab.controls import find_method
from kvcomp.lab.document import make_evaluation_document
from kvcomp.lab.evaluation import FIELDS, Evaluation, TaskResult
from kvcomp.lab.outcomes import judge
from kvcomp.lab.records import TaskRecord
from kvcomp.lab.statistics import wilson
from kvcomp.minimile.tasks import RecallHard

NAME = "sample {} of s".format

MODES = list(QueryMode)
APPROXIMATE = ("answer_nll", "kl_to_full", "rho", "kv_bytes")


def evaluation(bed, name="snapkv", budget=0.4, **settings):
    return Evaluation(bed, find_method(name, budget), **{"samples": 5, "split": "eval-3", "batch": 3} | settings)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", ["flowmm", "oracle"])
def test_outcomes_do_not_depend_on_the_batch(bed, echo, mode, name):
    found = []
    for batch in (1, 5):
        run = evaluation(bed, name, mode=mode, batch=batch, forced=True)
        found.append(sorted(run.outcomes(echo()), key=lambda seen: seen.number))
    for alone, together in zip(*found, strict=True):
        same = {name: getattr(alone, name) for name in APPROXIMATE}
        assert replace(together, **same) == alone
        assert together.answer_nll == pytest.approx(alone.answer_nll, abs=1e-5)
        assert together.kl_to_full == pytest.approx(alone.kl_to_full, abs=1e-5)
        assert together.kv_bytes == pytest.approx(alone.kv_bytes)


@pytest.mark.parametrize("mode", MODES)
def test_likelihood_divergence_and_retention_against_loops(bed, echo, mode):
    samples = [replace(echo().sample("s", number), answer="riga 4 0 7") for number in (1, 2, 4)]
    (batch,) = make_batches(bed, NAME, samples, 3, mode)
    method = find_method("h2o", 0.3, **({"turns": "append"} if mode is QueryMode.question_later else {}))
    answers = answer(batch, method.strategy, mode=mode, forced=True)
    logits = answers.logits, batch.full_logits
    first = 1 if mode is QueryMode.question_seen else 0  # what the full cache still predicts is left out
    for row, seen in enumerate(judge(echo(), batch, answers, mode)):
        costs, gaps = [], []
        for place, token in list(enumerate(bed.codec.encode_answer(batch.samples[row])))[first:]:
            given, full = (side[row, place].double().softmax(0).tolist() for side in logits)
            costs.append(-math.log(given[token]))
            gaps.append(sum(p * math.log(p / q) for p, q in zip(full, given, strict=True)))
        assert seen.answer_nll == pytest.approx(sum(costs) / len(costs), rel=1e-5)
        assert seen.kl_to_full == pytest.approx(sum(gaps) / len(gaps), rel=1e-3)
        for layer, heads in enumerate(seen.retention):
            for head, share in enumerate(heads):
                held = answers.held.indices[layer][row, head].tolist()
                assert share == sum(place in held for place in batch.evidence[row]) / len(batch.evidence[row])


def test_a_row_is_the_mean_over_its_samples(bed, echo):
    run = evaluation(bed, forced=True)
    outcomes = list(run.outcomes(echo()))
    row = run.run(echo())
    assert (row.task, row.metric, row.samples, row.learned) == ("echo", "exact match", 5, None)
    assert (row.exact_match, row.ci) == (0.0, wilson(0, 5))
    assert row.slot_accuracy == sum(seen.slot_accuracy for seen in outcomes) / 5
    assert row.answer_nll == pytest.approx(sum(seen.answer_nll for seen in outcomes) / 5)
    assert row.prompt_tokens == {"least": 30, "mean": sum(seen.prompt_tokens for seen in outcomes) / 5, "most": 38}
    lengths = [seen.prompt_tokens for seen in outcomes]
    assert row.slots == sum(int(0.4 * length) for length in lengths) / 5
    assert row.kv_bytes == pytest.approx(row.slots * 4 * 2 * (32 + 32) * 4)
    expected = torch.tensor([seen.retention for seen in outcomes], dtype=torch.double).mean(dim=0)
    assert torch.allclose(torch.tensor(row.evidence_retention, dtype=torch.double), expected)


def test_a_plain_row_measures_what_is_cheap_alone(bed, echo):
    row = evaluation(bed).run(echo())
    assert (row.answer_nll, row.kl_to_full, row.evidence_retention) == (None, None, None)


def test_a_task_with_a_metric_of_its_own_is_scored_by_it(bed, echo):
    class Length(echo):
        metric = "length"

        def score(self, prediction, sample):
            return 0.25 if sample.answer == "lisbon 0 ." else 0.75

        def exact_match(self, prediction, sample):
            return sample.answer.split()[1] in "013"

    row = evaluation(bed).run(Length())
    assert (row.metric, row.score, row.exact_match, row.ci) == ("length", 0.65, 0.6, wilson(3, 5))


def test_no_context_is_no_longer_than_its_question_and_knows_no_evidence(bed, echo):
    row = evaluation(bed, "no-context", None, forced=True).run(echo())
    assert row.prompt_tokens["most"] == 2 + 5 + 3
    assert row.evidence_retention is None


def test_what_is_learned_comes_from_the_records(bed, echo):
    record = TaskRecord(exact_match=0.5, ci=(0.4, 0.6), samples=9, reference_tokens=40, learned=False)
    assert evaluation(replace(bed, records={"echo": record})).run(echo()).learned is False


def test_a_result_becomes_the_record_of_a_model():
    row = TaskResult(
        "recall_hard", "exact match", 100, None, 0.92, (0.8, 0.95), 0.92, 0.95, {"most": 213}, 1.0, 2.0, 16
    )
    expected = TaskRecord(exact_match=0.92, ci=(0.8, 0.95), samples=100, reference_tokens=213, learned=True)
    assert row.record(RecallHard()) == expected


class Finite:
    """Mixed into a task: it has an end, and an answer of its own length."""

    size, max_new_tokens = 4, 3


def test_all_samples_of_a_finite_task_are_asked_unless_fewer_are_wanted(bed, echo):
    class Few(Finite, echo):
        pass

    assert [evaluation(bed, samples=wanted).count(Few()) for wanted in (None, 3, 9)] == [4, 3, 4]
    assert evaluation(bed, samples=None).count(echo()) == 200
    assert evaluation(bed, samples=None).run(Few()).samples == 4


def test_an_answer_is_as_long_as_its_task_allows_unless_it_is_said(bed, echo):
    class Few(Finite, echo):
        pass

    lengths = {}
    for limit in (None, 2):
        run = evaluation(bed, max_new_tokens=limit, samples=2)
        lengths[limit] = max(len(bed.codec.encode_text(seen.prediction)) for seen in run.outcomes(Few()))
        assert run.run(Few()).max_new_tokens == (limit or 3)
    assert lengths[None] <= 3
    assert lengths[2] <= 2


def test_samples_are_drawn_a_pool_at_a_time(bed, echo, monkeypatch):
    monkeypatch.setattr("kvcomp.lab.evaluation.POOL", 1)
    drawn = []

    class Watched(echo):
        def sample(self, split, index):
            drawn.append(index)
            return super().sample(split, index)

    outcomes = evaluation(bed, samples=5, batch=2).outcomes(Watched())
    first = next(outcomes)
    assert drawn == [0, 1]
    numbers = [first.number, *(seen.number for seen in outcomes)]
    assert sorted(numbers) == [0, 1, 2, 3, 4]
    monkeypatch.undo()
    whole = {seen.number: seen.prediction for seen in evaluation(bed, samples=5, batch=2).outcomes(echo())}
    monkeypatch.setattr("kvcomp.lab.evaluation.POOL", 1)
    assert {seen.number: seen.prediction for seen in evaluation(bed, samples=5, batch=2).outcomes(echo())} == whole


def test_progress_is_told_once_for_each_sample(bed, echo):
    told = []
    evaluation(bed).run(echo(), told.append)
    assert told == ["echo"] * 5


@pytest.mark.parametrize(("mode", "turns"), [("question_seen", "recompress"), ("question_later", "append")])
def test_the_document_says_what_was_compressed_when(bed, echo, mode, turns):
    run = evaluation(bed, mode=QueryMode(mode))
    document = make_evaluation_document(run, [run.run(echo())], 1.26)
    assert (document["query_mode"], document["turns"], document["strategy"]["turns"]) == (mode, turns, turns)
    assert (document["model"], document["split"], document["samples"]) == ("tiny", "eval-3", 5)
    assert (document["budget"], document["metrics"], document["seconds"]) == (0.4, "plain", 1.3)
    assert set(document["fields"]) == set(FIELDS) <= set(document["tasks"][0])


@pytest.mark.parametrize(("name", "budget"), [("full", 1.0), ("no-context", 1.0), ("mikv", 0.9), ("snapkv", "30t")])
def test_the_document_says_the_budget_that_was_kept_to(bed, name, budget):
    assert make_evaluation_document(evaluation(bed, name, budget), [], 1.0)["budget"] == budget


def test_a_task_that_has_fewer_samples_is_asked_those(bed, echo):
    class Short(echo):
        size = 2

    assert len(list(evaluation(bed, "full", 1.0, samples=9).outcomes(Short()))) == 2
