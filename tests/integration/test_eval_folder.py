"""`kvcomp eval --data`: tasks from a folder, asked from the command line."""

import json
from functools import partial

import commands
import pytest
from commands import save_untrained
from milebench_folders import record, write_seven, write_task
from PIL import Image
from typer.testing import CliRunner

from kvcomp.cli import app
from kvcomp.core.registry import registry
from kvcomp.lab.controls import find_method
from kvcomp.lab.evaluation import Evaluation
from kvcomp.lab.testbed import load_testbed

call, document = partial(commands.call, "eval"), partial(commands.document, "eval")
EXPORTED = ("recall", "order", "clevr_change")
TRAINED = registry.find("testbed", "minimile-xs").value
LABELS = ("task", "metric", "exact_match", "ci", "score", "slot_accuracy", "slots", "learned", "max_new_tokens")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """An untrained model with its processor."""
    return save_untrained(tmp_path_factory.mktemp("beds") / "untrained")


@pytest.fixture(scope="module")
def seven(tmp_path_factory):
    root = tmp_path_factory.mktemp("data")
    write_seven(root)
    write_task(
        root, "TQA", [record(0, "{image#1}?", ["0.png"], "a", choice_list=["a", "b"])], question_type="multi-choice"
    )
    return root


def test_exported_samples_get_the_scores_of_the_direct_evaluation(tmp_path):
    """The trained testbed, so that some answers are right and some are not."""
    exported = CliRunner().invoke(
        app, ["tasks", "export", *EXPORTED, "--out", str(tmp_path), "--samples", "12", "--seed", "3"]
    )
    assert exported.exit_code == 0, exported.stderr
    options = ("--model", "minimile-xs", "--strategy", "snapkv", "--budget", "0.3", "--batch", "6")
    found = document("--data", tmp_path, "--predictions", tmp_path / "out", *options)
    direct = Evaluation(load_testbed(TRAINED), find_method("snapkv", 0.3), samples=12, split="export-3", batch=6)
    expected = [direct.run(registry.find("task", f"mini/{name}").value).to_dict() for name in sorted(EXPORTED)]
    for row, other in zip(found["tasks"], expected, strict=True):
        assert {name: row[name] for name in LABELS} == {
            **{name: other[name] for name in LABELS},
            "ci": list(other["ci"]),
        }
    assert 0 < sum(row["exact_match"] for row in found["tasks"]) < len(EXPORTED)
    assert found["average"] is None
    entries = json.loads((tmp_path / "out" / "mini-recall" / "pred.json").read_text())
    assert len(entries) == 12
    right = sum(entry["pred_response"].split() == entry["gt_response"].split() for entry in entries)
    (recall,) = [row for row in found["tasks"] if row["task"] == "recall"]
    assert right / 12 == recall["exact_match"]


def test_the_seven_from_a_folder_with_their_average(folder, seven, tmp_path):
    options = ("--model", folder, "--data", seven, "--strategy", "flowmm", "--budget", "0.5", "--max-new-tokens", "4")
    found = document(*options, "--predictions", tmp_path)
    assert len(found["tasks"]) == len(found["average"]["tasks"]) == 7
    scores = [row["score"] for row in found["tasks"]]
    assert found["average"]["score"] == pytest.approx(sum(scores) / 7)
    assert found["data"] == {
        "folder": str(seven),
        "tasks": None,
        "placeholders": "by_index",
        "images": "separate",
        "max_context_len": None,
        "tokens_per_image": None,
    }
    assert {len(task["sha256"]) for task in found["data_tasks"]} == {64}
    assert found["image_processing"]["size"] == {"shortest_edge": 3136, "longest_edge": 3136}
    written = {path.parent.name for path in tmp_path.glob("*/pred.json")}
    assert written == {row["task"] for row in found["tasks"]}
    (entry,) = json.loads((tmp_path / "IEdit" / "pred.json").read_text())
    assert entry["gen_kwargs"] == {"do_sample": False, "min_new_tokens": 1, "max_new_tokens": 4}


def test_the_table_names_the_average_and_what_was_left_out(folder, seven):
    options = ("--model", folder, "--data", seven, "--strategy", "full", "--max-new-tokens", "2")
    result = call(*options)
    assert result.exit_code == 0, result.stderr
    assert "average of 7 of MileBench's seven tasks: 0." in result.stdout
    assert "prompts: placeholders by_index, images separate, nothing cut" in result.stdout
    assert "left out, name them in --tasks: TQA" in result.stderr
    result = call(*options, "--tasks", "STD,TQA")
    assert [line.split()[0] for line in result.stdout.splitlines()[1:3]] == ["Spot-the-Diff", "TQA"]
    assert "average of 1 of MileBench's seven tasks (without ALFRED" in result.stdout


def test_prompts_are_made_as_they_are_asked_for(folder, seven):
    options = ("--model", folder, "--data", seven, "--strategy", "full", "--max-new-tokens", "1", "--tasks", "ALFRED")
    (whole,) = document(*options)["tasks"]
    cut = document(*options, "--max-context-len", "20", "--tokens-per-image", "4", "--placeholders", "official")
    assert cut["tasks"][0]["prompt_tokens"]["most"] < whole["prompt_tokens"]["most"]
    assert cut["data_tasks"][0]["max_context_len"] == 20
    assert cut["data"]["placeholders"] == "official"
    (large,) = document(*options, "--min-pixels", "12544", "--max-pixels", "12544")["tasks"]
    assert large["prompt_tokens"]["most"] == whole["prompt_tokens"]["most"] + 3 * 12  # 16 tokens for 4, three images
    assert large["slots"] == large["prompt_tokens"]["most"]


def test_combined_images_are_drawn_where_the_folder_has_none(folder, seven, tmp_path):
    options = ("--model", folder, "--data", seven, "--strategy", "full", "--max-new-tokens", "1")
    found = document(*options, "--tasks", "IEdit", "--images", "combined", "--predictions", tmp_path)
    assert found["data_tasks"][0]["images"] == "combined"
    (entry,) = json.loads((tmp_path / "IEdit" / "pred.json").read_text())
    assert entry["image"] == ["drawn of 2 images"]
    assert call(*options, "--tasks", "ALFRED", "--images", "combined").exit_code == 2  # it names a file that is missing


def test_what_a_task_allows_is_allowed_and_an_answer_has_a_token(folder, seven):
    options = ("--model", folder, "--data", seven, "--strategy", "full", "--tasks", "IEdit", "--samples", "1")
    assert document(*options, "--dtype", "bfloat16")["tasks"][0]["max_new_tokens"] == 512


def test_faults_of_data_come_before_the_model_is_loaded(folder, tmp_path, monkeypatch):
    monkeypatch.setattr("kvcomp.cli.evaluate.load_testbed", lambda *given, **more: pytest.fail("a model was loaded"))
    write_task(tmp_path, "IEdit", [record(0, "{image#2}", ["0.png"]), record(1, "{image#1}", ["none.jpg"])])
    result = call("--model", folder, "--data", tmp_path, "--tasks", "IEdit,STD")
    assert (result.exit_code, result.stdout) == (2, "")
    for fault in (
        "STD: no such task here",
        "sample 0: task_instance.context",
        "sample 1: task_instance.images_path[0]",
    ):
        assert fault in result.stderr


@pytest.mark.parametrize(
    ("options", "fault"),
    [
        (("--max-context-len", "5"), "--data: --max-context-len must come with --data"),
        (("--images", "combined"), "--data: --images must come with --data"),
        (("--predictions", "out"), "--predictions: must come with --data"),
    ],
)
def test_options_of_a_folder_need_one(options, fault):
    result = call("--tasks", "recall", *options)
    assert result.exit_code == 2
    assert fault in result.stderr


def test_limits_come_in_pairs_and_wrong_options_are_named_together(folder, seven):
    result = call("--model", folder, "--data", seven, "--max-context-len", "5", "--budget", "2")
    assert result.exit_code == 2
    assert "--data: folder of tasks: max_context_len and tokens_per_image must be given together" in result.stderr
    assert "--budget:" in result.stderr


@pytest.mark.parametrize("options", [("--query-mode", "question_later"), ("--strategy", "no-context")])
def test_what_needs_a_question_of_its_own_says_so(folder, seven, options):
    result = call("--model", folder, "--data", seven, "--tasks", "IEdit", *options)
    assert result.exit_code == 2
    assert "question" in result.stderr


def test_an_oracle_without_evidence_and_an_image_that_the_model_does_not_take_are_named(folder, seven, tmp_path):
    result = call("--model", folder, "--data", seven, "--tasks", "STD", "--strategy", "oracle")
    assert result.exit_code == 2
    assert "none is known of" in result.stderr
    path = write_task(tmp_path, "IEdit", [record(number, "{image#1}", [f"{number}.png"]) for number in (6, 7)])
    Image.new("RGB", (2500, 4)).save(path.parent / "images" / "7.png")
    result = call("--model", folder, "--data", tmp_path, "--strategy", "full")
    assert result.exit_code == 2
    assert f"error: {path}: sample 7: a prompt must be one that" in result.stderr
