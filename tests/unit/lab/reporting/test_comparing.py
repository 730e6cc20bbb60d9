"""Comparisons against counts by hand: which pairs, which test, which correction, and what may be bold."""

from dataclasses import replace

import pytest
from synthetic_results import synthetic_configurations, synthetic_result, write_synthetic

from kvcomp.core.errors import UnknownNameError
from kvcomp.lab.reporting.cells import AVERAGE, Arm, blocks_of, find_baseline
from kvcomp.lab.reporting.comparing import best, compare_all, hold_against
from kvcomp.lab.results import Planned, Run, Study
from kvcomp.lab.statistics import holm, mcnemar


def study(answers, samples=None, unlearned=(), **changes):
    """Return a study of these arms: strategy and task to the samples that are answered right, of 40."""
    planned, results = [], []
    for made in synthetic_configurations(tuple(dict.fromkeys(name for name, _ in answers)), budgets=(0.2,), **changes):
        planned.append(Planned(made, 40))
        right = answers[made.strategy, made.task]
        for sample in range(40 if samples is None else samples.get(made.strategy, 40)):
            hit = sample in right
            results.append(synthetic_result(made, sample, exact_match=hit, score=float(hit)))
    environment = {"models": {"minimile-xs": {"unlearned": list(unlearned)}}}
    return Study(Run({}, environment, "now", None), tuple(planned), tuple(results), 0)


def named(configuration):
    """Return a configuration with the class of its method, as a plan writes it."""
    method = "Oracle" if configuration.strategy == "oracle" else "Method"
    return replace(configuration, details={**configuration.details, "method": method})


RECALL, NEEDLE = "mini/recall", "mini/needle"
ANSWERS = {
    ("full", RECALL): range(40),
    ("full", NEEDLE): range(40),
    ("flowmm", RECALL): range(38),
    ("flowmm", NEEDLE): range(36),
    ("recency", RECALL): range(20),
    ("recency", NEEDLE): range(24),
}
FLOWMM, RECENCY = Arm("flowmm", 0.2), Arm("recency", 0.2)


def test_pairs_are_counted_and_tested_exactly():
    (block,) = blocks_of(study(ANSWERS))
    made = hold_against(block, FLOWMM, RECENCY, RECALL)
    assert (made.won, made.lost, made.samples, made.test) == (18, 0, 40, "McNemar")
    assert made.difference == pytest.approx(18 / 40)
    assert made.p == mcnemar(18, 0)
    assert made.low < made.difference < made.high
    average = hold_against(block, FLOWMM, RECENCY, AVERAGE)
    assert (average.samples, average.test) == (80, "sign flip")
    assert average.difference == pytest.approx((18 / 40 + 12 / 40) / 2)


def test_the_whole_family_is_corrected_together():
    (block,) = blocks_of(study(ANSWERS))
    made = compare_all(block, "full")
    assert set(made) == {(task, arm) for task in (RECALL, NEEDLE, AVERAGE) for arm in (FLOWMM, RECENCY)}
    assert [entry.corrected for entry in made.values()] == holm([entry.p for entry in made.values()])
    assert made[RECALL, RECENCY].mark == -1
    assert made[RECALL, FLOWMM].mark == 0  # two of forty: not to be believed


def test_only_what_beats_every_other_is_the_best():
    (block,) = blocks_of(study(ANSWERS))
    arms = [arm for arm in block.arms if arm.budget == 0.2]
    assert best(block, [*arms, Arm("full", 1.0)], RECALL) == FLOWMM
    close = ANSWERS | {("recency", RECALL): range(37), ("recency", NEEDLE): range(36)}
    (block,) = blocks_of(study(close))
    assert best(block, arms, RECALL) is None
    assert best(block, arms, NEEDLE) is None
    assert best(block, [FLOWMM], RECALL) is None  # alone it beats nobody


def test_a_control_that_is_told_the_answer_keeps_no_method_from_being_the_best():
    told = {("oracle", RECALL): range(40), ("oracle", NEEDLE): range(40)}
    found = study(ANSWERS | told)
    planned = tuple(replace(entry, configuration=named(entry.configuration)) for entry in found.planned)
    results = tuple(replace(result, configuration=named(result.configuration)) for result in found.results)
    (block,) = blocks_of(replace(found, planned=planned, results=results))
    assert best(block, block.arms, RECALL) == FLOWMM


def test_only_samples_that_both_have_are_compared():
    (block,) = blocks_of(study(ANSWERS, samples={"recency": 10}))
    made = hold_against(block, RECENCY, FLOWMM, RECALL)
    assert (made.samples, made.won, made.lost, made.p) == (10, 0, 0, 1.0)
    (block,) = blocks_of(study(ANSWERS, samples={"recency": 0}))
    assert hold_against(block, RECENCY, FLOWMM, RECALL) is None
    assert block.score(RECENCY, AVERAGE) is None


def test_a_task_that_was_not_learned_counts_in_no_average():
    (block,) = blocks_of(study(ANSWERS, unlearned=[NEEDLE]))
    assert block.score(FLOWMM, AVERAGE) == block.score(FLOWMM, RECALL) == 38 / 40
    average = hold_against(block, FLOWMM, RECENCY, AVERAGE)
    assert (average.samples, average.difference) == (40, pytest.approx(18 / 40))
    assert hold_against(block, FLOWMM, RECENCY, NEEDLE).samples == 40  # its own column stays
    (nothing,) = blocks_of(study(ANSWERS, unlearned=[NEEDLE, RECALL]))
    assert nothing.score(FLOWMM, AVERAGE) is None
    assert hold_against(nothing, FLOWMM, RECENCY, AVERAGE) is None


def test_scores_between_0_and_1_are_tested_by_signs():
    whole = study(ANSWERS)
    whole = replace(whole, results=tuple(replace(result, score=0.25 + result.score / 2) for result in whole.results))
    (block,) = blocks_of(whole)
    made = hold_against(block, FLOWMM, RECENCY, RECALL)
    assert made.test == "sign flip"
    assert made.difference == pytest.approx(18 / 80)
    assert made.p < 0.01


def test_seeds_are_one_sample_and_modes_are_apart():
    found = study(ANSWERS, seeds=(0, 1), query_modes=("question_seen", "question_later"))
    blocks = blocks_of(found)
    assert [block.query_mode for block in blocks] == ["question_seen", "question_later"]
    cell = blocks[0].cells[RECALL, FLOWMM]
    assert (len(cell.results), cell.planned) == (80, 80)


def test_the_baseline_is_the_same_budget_or_the_only_one(tmp_path):
    (block,) = blocks_of(write_synthetic(tmp_path, samples=2))
    assert block.reference("full", 0.2) == Arm("full", 1.0)
    assert block.reference("flowmm", 0.5) == Arm("flowmm", 0.5)
    assert block.reference("flowmm", 0.3) is None
    assert find_baseline([block], None) == "full"
    with pytest.raises(UnknownNameError, match="no strategy named 'flowm' in these results"):
        find_baseline([block], "flowm")
