"""The seven tasks and every name that they go by."""

import pytest

from kvcomp.lab.milebench.names import KNOWN, SEVEN, canonical, official_metric, quantity_level


def test_there_are_seven_tasks_with_1640_samples():
    assert len(SEVEN) == len(KNOWN) == 7
    assert sum(task.samples for task in SEVEN) == 1640


@pytest.mark.parametrize("task", SEVEN, ids=lambda task: task.name)
def test_every_alias_leads_to_the_folder(task):
    underscored = task.name.replace("-", "_")
    for alias in (task.name, task.short, underscored, f"{underscored}_test", task.name.lower(), task.short.upper()):
        assert canonical(alias) == task.name
    assert canonical(f"{underscored}_adv") == f"{task.name}-adv"


@pytest.mark.parametrize("name", ["DocVQA", "mini/alfred", "", "ALFRED2", "adv"])
def test_another_name_stays_as_it_is(name):
    assert canonical(name) == name


def test_the_official_metric_goes_by_name():
    metrics = {task.short: official_metric(task.name) for task in SEVEN}
    assert metrics.pop("TextNeedle") == metrics.pop("ImageNeedle") == "needle_official"
    assert metrics.pop("MMCoQA") == "mmcoqa_official"
    assert set(metrics.values()) == {"rouge_l_official"}


def test_levels_end_at_5_and_31_images():
    assert [quantity_level(images) for images in (1, 5, 6, 31, 32, 109)] == [
        "Few",
        "Few",
        *["Medium"] * 2,
        *["Many"] * 2,
    ]
