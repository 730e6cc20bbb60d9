"""Results in MileBench's format: what its scorer reads and writes, and the average over the seven."""

from __future__ import annotations

import json

import pytest
from milebench_folders import ALFRED, MMCOQA, NEEDLE, record, write_task

from kvcomp.lab.evaluation import TaskResult
from kvcomp.lab.milebench import Reading, open_folder
from kvcomp.lab.milebench.results import official_result, seven_task_average, write_results
from kvcomp.lab.outcomes import Outcome


def seen(task, number, prediction):
    sample = task.sample("test", number)
    score = task.score(prediction, sample)
    return Outcome(number, prediction, False, score, 0.0, 10, 3, 1.0, 1.0, 1.0, ())


def result(name, score, samples):
    lengths = {"least": 1, "mean": 1.0, "most": 1}
    return TaskResult(name, "any", samples, None, 0.0, (0.0, 1.0), score, 0.0, lengths, 1.0, 1.0, 512)


def test_predictions_are_in_mile_benchs_format(tmp_path):
    write_task(tmp_path / "data", "ALFRED", [ALFRED])
    (task,) = open_folder(tmp_path / "data").tasks
    written = write_results(tmp_path, task, [seen(task, 0, "Carry the cup.")], "model", {"max_new_tokens": 512})
    assert (written.path, written.complete) == (tmp_path / "ALFRED" / "pred.json", True)
    (entry,) = json.loads(written.path.read_text())
    assert entry == {
        "sample_id": 3,
        "image": ["6.png", "7.png", "8.png"],
        "question": "What now?\nYour Main Goal: Put a cup away. Step Details: <ImageHere>Step#1: Walk. <ImageHere>"
        "Step#2: Pick up. <ImageHere> Next: ",
        "gt_response": "Carry the cup to the sink on the left.",
        "gen_model_id": "model",
        "pred_response": "Carry the cup.",
        "gen_kwargs": {"max_new_tokens": 512},
    }
    scored = json.loads((tmp_path / "ALFRED" / "eval.json").read_text())
    assert scored["Rouge-L f"] == pytest.approx(2 * 3 / (3 + 7), abs=1e-6)  # 3 of 3 words, 3 of 7 different ones
    assert scored["image_quantity_level-Result"] == {"Few": [scored["Rouge-L f"], 1], "Medium": [0, 0], "Many": [0, 0]}


def test_images_are_those_that_were_shown(tmp_path):
    write_task(tmp_path, "IEdit", [record(0, "{image#3}{image#3} x", ["0.png", "1.png", "2.png"])])
    for reading, expected in ((Reading(), ["2.png", "2.png"]), (Reading("official"), ["1.png", "2.png"])):
        (task,) = open_folder(tmp_path, reading=reading).tasks
        written = write_results(tmp_path / "out", task, [seen(task, 0, "")], "model", {})
        assert json.loads(written.path.read_text())[0]["image"] == expected
    (task,) = open_folder(tmp_path, reading=Reading(images="combined")).tasks
    written = write_results(tmp_path / "out", task, [seen(task, 0, "")], "model", {})
    (entry,) = json.loads(written.path.read_text())
    assert (entry["image"], entry["question"][:11]) == (["drawn of 3 images"], "<ImageHere>")


def test_a_part_of_the_samples_is_written_and_said_to_be_one(tmp_path):
    many = record(9, "".join(f"{{image#{number}}}" for number in range(1, 33)), [f"{n}.png" for n in range(32)], 7)
    write_task(tmp_path, "ImageNeedleInAHaystack", [NEEDLE, many])
    (task,) = open_folder(tmp_path).tasks
    assert not write_results(tmp_path / "out", task, [seen(task, 1, "7")], "model", {}).complete
    outcomes = [seen(task, 1, "7"), seen(task, 0, "none")]
    written = write_results(tmp_path / "out", task, outcomes, "model", {})
    assert written.complete
    assert [entry["sample_id"] for entry in json.loads(written.path.read_text())] == [5, 9]
    assert official_result(task, outcomes) == {
        "Accuracy": 0.5,
        "image_quantity_level-Accuracy": {"Few": 0.0, "Medium": 0, "Many": 1.0},
        "image_quantity_level-Result": {"Few": [0.0, 1], "Medium": [0, 0], "Many": [1.0, 1]},
    }


def test_a_task_of_two_names_needs_no_folder_of_two_levels(tmp_path):
    write_task(tmp_path, "MMCoQA", [MMCOQA])
    write_task(tmp_path, "MMCoQA", [MMCOQA], file="MMCoQA-adv.json")
    for task in open_folder(tmp_path, ["MMCoQA", "MMCoQA_adv"]).tasks:
        assert write_results(tmp_path / "out", task, [seen(task, 0, "")], "m", {}).path.parent.name == task.name


def test_the_average_counts_each_task_once(tmp_path):
    average = seven_task_average(
        [result("IEdit", 0.3, 200), result("TextNeedleInAHaystack", 0.1, 320), result("x", 1, 9)]
    )
    assert average.tasks == ("IEdit", "TextNeedleInAHaystack")
    assert average.score == pytest.approx(0.2)
    assert average.score_by_sample == pytest.approx((60 + 32) / 520)
    assert set(average.missing) == {"ALFRED", "CLEVR-Change", "MMCoQA", "Spot-the-Diff", "ImageNeedleInAHaystack"}
    assert seven_task_average([result("recall", 1.0, 5)]) is None


def test_the_papers_own_average_comes_out():
    """Qwen2.5-VL with the full cache: 32.44, from the seven numbers of its row."""
    row = {"ALFRED": 36.92, "IEdit": 30.16, "Spot-the-Diff": 28.13, "MMCoQA": 50.50, "CLEVR-Change": 45.45}
    row |= {"TextNeedleInAHaystack": 11.56, "ImageNeedleInAHaystack": 24.38}
    average = seven_task_average([result(name, score, 200) for name, score in row.items()])
    assert average.missing == ()
    assert average.score == pytest.approx(32.44, abs=0.005)
