"""Summaries of a document, against values that can be read off its rows."""

import json

from kvcomp.lab import Comparison, grid, make_document
from kvcomp.lab.document import budgets, ranked, rho_by_task, summarize, thresholds, verdict


def test_a_line_is_the_mean_over_tasks(document):
    lines = {(line.recipe, line.budget): line for line in summarize(document["rows"])}
    assert list(lines) == [("full", 1.0), ("bad", 1.0), ("bad", 0.2), ("good", 1.0), ("good", 0.2)]
    line = lines["bad", 0.2]
    assert (line.exact_match, line.kv_bytes, line.per_task) == (0.1, 200.0, {"a": 0.1, "b": 0.1})
    assert line.rho == (None, None)
    assert lines["good", 0.2].rho == (0.2, 0.4)


def test_recipes_are_ranked_by_their_smallest_budget_after_the_reference(document):
    assert ranked(document["rows"]) == ["full", "good", "bad"]
    assert budgets(document["rows"]) == [1.0, 0.2]


def test_rho_and_its_threshold_come_from_the_recipes_that_measure_it(document):
    assert rho_by_task(document) == {"a": [0.2, 0.4], "b": [0.2, 0.4]}
    assert thresholds(document) == [0.25]


def test_the_verdict_counts_the_answers_that_differ_at_budget_1(document):
    assert verdict(document) == "At budget 1.0 some answers differ from 'full' (of 8): bad 3."
    document["agreement"][1]["same"] = 8
    assert verdict(document) == "At budget 1.0 every other recipe (2) gave the answers of 'full': 8 of 8."


def test_a_document_is_json_and_says_how_it_was_made(bed, echo):
    comparison = Comparison(bed, [echo()], grid(["full", "flowmm"], [1.0, 0.2]), samples=2, timed=1, seed=7)
    document = make_document(comparison, comparison.run(), seconds=1.23)
    assert json.loads(json.dumps(document, allow_nan=False)) == document
    assert len(document["rows"]) == 3
    assert (document["samples"], document["seed"], document["seconds"]) == (2, 7, 1.2)
    assert set(document["versions"]) >= {"kvcomp", "torch", "transformers", "python"}
    assert document["hardware_threads"] >= 1
    assert document["recipes"]["flowmm"]["policy"]["threshold"] == 0.25
