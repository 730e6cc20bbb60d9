"""The checkpoint that comes with the package answers its tasks, loaded as any Hugging Face model."""

import json

import pytest
import torch
from safetensors.torch import load_file

from kvcomp.core.registry import registry
from kvcomp.lab.controls import find_method
from kvcomp.lab.evaluation import Evaluation
from kvcomp.lab.records import is_learned, read_records
from kvcomp.lab.testbed import load_testbed
from kvcomp.minimile import HARD_TASKS, TASKS

FOLDER = registry.find("testbed", "minimile-xs").value
RECORDS = read_records(FOLDER)
LEARNED = [task for task in TASKS if task.id in RECORDS and RECORDS[task.id].learned]


@pytest.fixture(scope="module")
def bed():
    return load_testbed(FOLDER)


def outcomes(bed, task):
    """Return what 40 fresh samples showed with the full cache."""
    run = Evaluation(bed, find_method("full"), samples=40, split="integration")
    return list(run.outcomes(task))


def test_the_folder_is_a_small_float16_checkpoint():
    assert sum(path.stat().st_size for path in FOLDER.iterdir()) < 8_000_000
    weights = load_file(FOLDER / "model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.float16}
    assert json.loads((FOLDER / "config.json").read_text())["model_type"] == "qwen2_5_vl"


def test_every_task_has_a_record_that_says_whether_it_is_learned():
    tasks = (*TASKS, *HARD_TASKS)
    assert set(RECORDS) == {task.id for task in tasks}
    assert all(RECORDS[task.id].learned == is_learned(task, RECORDS[task.id].exact_match) for task in tasks)


@pytest.mark.parametrize("task", LEARNED, ids=lambda task: task.id)
def test_a_learned_task_is_answered_on_fresh_samples(bed, task):
    assert sum(seen.exact_match for seen in outcomes(bed, task)) >= 36  # 95 % of 40, less two


@pytest.mark.parametrize("task", TASKS, ids=lambda task: task.id)
def test_a_batch_padded_on_the_left_answers_as_one_sample_does(bed, task):
    together, alone = (
        Evaluation(bed, find_method("full"), samples=3, split="integration", batch=batch).outcomes(task)
        for batch in (3, 1)
    )
    assert [seen.prediction for seen in together] == [seen.prediction for seen in alone]


def lowest_share(bed, task, slots):
    """Return the lower end of the interval of exact match where only the latest slots are kept."""
    run = Evaluation(bed, find_method("recency", {"tokens": slots}), samples=60, split="integration", batch=30)
    return run.run(task).ci[0]


@pytest.mark.parametrize("task", LEARNED, ids=lambda task: task.id)
def test_with_one_slot_a_task_is_at_chance(bed, task):
    assert lowest_share(bed, task, 1) <= task.chance


@pytest.mark.parametrize("task", LEARNED, ids=lambda task: task.id)
def test_the_latest_32_slots_do_not_answer(bed, task):
    assert lowest_share(bed, task, 32) <= task.chance + 0.1
