"""Every promise, for every registered part in a pipeline of plain neighbours, on drawn prompts."""

from dataclasses import replace

import pytest
from generators import BUDGETS, DISTINCT, SAMPLES, part_entries
from hypothesis import given

from kvcomp.core.budget import Budget
from kvcomp.core.registry import Entry
from kvcomp.testing import PROMISES, Sample
from kvcomp.testing.conformance import NEEDS_DISTINCT
from kvcomp.testing.pipelines import pipeline_around
from kvcomp.testing.promises.parts import PART_PROMISES

PARTS = [pytest.param(entry, id=f"{entry.kind}-{entry.name}") for entry in part_entries()]


@pytest.mark.parametrize("entry", PARTS)
@given(sample=SAMPLES)
def test_a_part_keeps_the_promises_of_its_kind(entry: Entry, sample: Sample) -> None:
    for promise in PART_PROMISES.values():
        promise(pipeline_around(entry.value), entry.value(), sample)


@pytest.mark.parametrize("entry", PARTS)
@given(sample=SAMPLES, budget=BUDGETS)
def test_a_pipeline_around_a_part_keeps_every_promise(entry: Entry, sample: Sample, budget: Budget) -> None:
    strategy = replace(pipeline_around(entry.value), budget=budget)
    for name in PROMISES.keys() - NEEDS_DISTINCT:
        PROMISES[name](strategy, sample)


@pytest.mark.parametrize("entry", PARTS)
@given(sample=DISTINCT, budget=BUDGETS)
def test_order_and_batch_do_not_matter_around_a_part(entry: Entry, sample: Sample, budget: Budget) -> None:
    strategy = replace(pipeline_around(entry.value), budget=budget)
    for name in NEEDS_DISTINCT:
        PROMISES[name](strategy, sample)


def test_every_kind_of_part_is_registered() -> None:
    kinds = {entry.kind for entry in part_entries()}
    assert kinds >= {"policy", "allocator", "scorer", "selector", "matcher", "merger", "store", "observation"}
