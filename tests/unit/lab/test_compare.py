"""The comparison on a tiny random model: what is run, and what its rows say."""

import kvcomp
from kvcomp.lab import Comparison, compare, grid
from kvcomp.lab.answers import answer
from kvcomp.lab.statistics import wilson


def test_a_recipe_without_a_selector_is_run_once_at_budget_1():
    runs = [(made.name, str(made.budget)) for made in grid(["full", "snapkv", "flowmm"], [1.0, 0.2, 0.1])]
    assert runs[0] == ("full", "1")
    assert runs[1:] == [(recipe, budget) for recipe in ("snapkv", "flowmm") for budget in ("1", "0.2", "0.1")]


def test_rows_hold_bytes_by_budget_rho_by_layer_and_an_interval(bed, echo):
    comparison = Comparison(bed, [echo()], grid(["full", "flowmm"], [1.0, 0.5]), samples=3, batch=2, timed=1)
    steps = []
    found = comparison.run(steps.append)
    assert len(steps) == comparison.steps == 3 * 2 + 1
    full, whole, half = found.rows
    assert [(row.recipe, row.budget, row.task) for row in found.rows] == [
        ("full", 1.0, "fake/echo"),
        ("flowmm", 1.0, "fake/echo"),
        ("flowmm", 0.5, "fake/echo"),
    ]
    lengths = [31, 37, 30]  # a frame of 5 tokens, three or four names with images of 6 tokens, 4 or 5 of the question
    slot_bytes = 4 * 2 * (32 + 32) * 4  # layers, KV heads, keys and values, float32
    assert full.kv_bytes == whole.kv_bytes == sum(lengths) / 3 * slot_bytes
    assert half.kv_bytes == sum(length // 2 for length in lengths) / 3 * slot_bytes
    assert full.rho == (None,) * 4
    assert half.rho == whole.rho
    assert all(rho is not None and 0 < rho < 1 for rho in half.rho)
    assert full.exact_match == 0.0
    assert full.ci == wilson(0, 3)
    assert full.decode_ratio == 1.0
    assert half.decode_ratio is not None
    assert half.decode_ratio > 0


def test_at_budget_1_every_recipe_agrees_with_the_full_cache_in_padded_batches(bed, echo):
    strategies = grid(["full", "flowmm", "h2o", "random", "snapkv", "streaming-llm"], [1.0])
    found = Comparison(bed, [echo()], strategies, samples=4, batch=4, timed=0).run()
    assert [(entry.recipe, entry.same, entry.samples) for entry in found.agreement] == [
        (made.name, 4, 4) for made in strategies
    ]


def test_every_sample_draws_lots_of_its_own(bed, echo, monkeypatch):
    drawn = []

    def spy(batch, strategy, **settings):
        drawn.append((batch.numbers, strategy.scorer.samples))
        return answer(batch, strategy, **settings)

    monkeypatch.setattr("kvcomp.lab.compare.answer", spy)
    Comparison(bed, [echo()], grid(["random"], [0.5]), samples=5, batch=2, timed=0).run()
    assert all(numbers == lots for numbers, lots in drawn)
    assert sorted(number for numbers, _ in drawn for number in numbers) == [0, 1, 2, 3, 4]
    h2o = kvcomp.strategy("h2o")
    assert h2o.for_samples((1, 2)) == h2o


def test_the_decode_ratio_is_the_median_over_the_reference_median_of_the_same_task(bed, echo, monkeypatch):
    times = iter([[[2.0, 2.0, 9.0], [3.0, 1.0, 1.0]], [[1.0, 1.0, 1.0], [4.0, 4.0, 0.0]]])
    monkeypatch.setattr(compare, "decode_seconds", lambda *given: next(times))
    strategies = grid(["full", "random"], [0.5])
    found = Comparison(bed, [echo("one"), echo("two")], strategies, samples=1, timed=1).run()
    ratios = {(row.recipe, row.task): row.decode_ratio for row in found.rows}
    assert ratios == {("full", "one"): 1.0, ("full", "two"): 1.0, ("random", "one"): 0.5, ("random", "two"): 4.0}


def test_exact_match_counts_right_answers_of_every_task(bed, echo):
    class First(echo):
        """Right where the sample's index is 0."""

        def exact_match(self, prediction, sample):
            return sample.answer == "lisbon 0 ."

    found = Comparison(bed, [First("one"), echo("two")], grid(["full"], [1.0]), samples=4, batch=3, timed=0).run()
    assert [(row.task, row.exact_match) for row in found.rows] == [("one", 0.25), ("two", 0.0)]
    assert [row.decode_ratio for row in found.rows] == [None, None]


def test_a_recipe_that_cannot_be_run_is_skipped_and_named(bed, echo):
    too_small = kvcomp.strategy("snapkv", {"bytes": 10})
    found = Comparison(bed, [echo()], [kvcomp.strategy("full"), too_small], samples=2, timed=1).run()
    assert [row.recipe for row in found.rows] == ["full"]
    (skipped,) = found.skipped
    assert (skipped.recipe, skipped.budget) == ("snapkv", "10B")
    assert "below one slot" in skipped.reason


def test_rows_become_plain_data(bed, echo):
    (row,) = Comparison(bed, [echo()], grid(["full"], [1.0]), samples=1, timed=0).run().rows
    plain = row.to_dict()
    assert set(plain) == {"recipe", "budget", "task", "exact_match", "ci", "kv_bytes", "decode_ratio", "rho"}
    assert plain["rho"] == [None] * 4
    assert isinstance(plain["ci"], list)
