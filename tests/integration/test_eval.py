"""`kvcomp eval` from the command line, with an untrained model of the testbed's shape."""

from functools import partial

import commands
import pytest
from commands import save_untrained

import kvcomp
from kvcomp.core.registry import registry
from kvcomp.lab.records import TaskRecord, write_records
from kvcomp.minimile.tasks import TASKS

call, document = partial(commands.call, "eval"), partial(commands.document, "eval")
IDS = sorted(task.id for task in TASKS)
RECORD = TaskRecord(exact_match=0.99, ci=(0.97, 1.0), samples=300, reference_tokens=213, learned=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """An untrained model with its processor, said to have learned one task and not another."""
    folder = save_untrained(tmp_path_factory.mktemp("beds") / "untrained")
    write_records(folder, {"recall": RECORD, "order": RECORD.model_copy(update={"learned": False})})
    return folder


def test_all_is_the_ten_tasks_and_their_rows_say_what_is_learned(folder):
    found = document("--model", folder, "--tasks", "all", "--strategy", "snapkv", "--budget", "0.2", "--samples", "2")
    assert [row["task"] for row in found["tasks"]] == IDS
    learned = {row["task"]: row["learned"] for row in found["tasks"]}
    assert learned == dict.fromkeys(IDS) | {"recall": True, "order": False}
    for row in found["tasks"]:
        assert row["ci"][0] <= row["exact_match"] <= row["ci"][1]
        assert (row["samples"], row["answer_nll"]) == (2, None)
        assert row["slots"] == pytest.approx(0.2 * row["prompt_tokens"]["mean"], abs=1)
    assert (found["query_mode"], found["split"], found["budget"]) == ("question_seen", "eval-0", 0.2)
    assert found["versions"]["kvcomp"] == kvcomp.__version__


def test_prefixes_are_accepted_and_each_task_is_asked_once(folder):
    names = "mini/recall, recall,recall_hard"
    found = document("--model", folder, "--tasks", names, "--samples", "1", "--strategy", "full")
    assert [row["task"] for row in found["tasks"]] == ["recall", "recall_hard"]


@pytest.mark.parametrize("control", ["full", "random", "recency", "oracle", "no-context", "no-images"])
def test_the_controls_are_strategies(folder, control):
    found = document("--model", folder, "--tasks", "text_needle", "--samples", "2", "--strategy", control)
    (row,) = found["tasks"]
    assert found["strategy"]["name"] == control
    assert (row["prompt_tokens"]["most"] < 15) == (control == "no-context")
    assert (row["slots"] == row["prompt_tokens"]["mean"]) == (control in ("full", "no-context"))


def test_all_metrics_and_a_question_that_comes_later(folder):
    options = ("--model", folder, "--tasks", "clevr_change", "--samples", "3", "--metrics", "all")
    found = document(*options, "--strategy", "oracle", "--budget", "0.3", "--query-mode", "question_later")
    (row,) = found["tasks"]
    assert (found["query_mode"], found["turns"], found["strategy"]["turns"]) == ("question_later", "append", "append")
    assert row["evidence_retention"] == [[1.0, 1.0]] * 4
    assert row["answer_nll"] > 0
    assert row["kl_to_full"] > 0
    (full,) = document(*options, "--strategy", "full", "--query-mode", "question_later")["tasks"]
    assert full["kl_to_full"] < 1e-5


def test_another_seed_asks_other_questions_and_the_same_seed_the_same(folder):
    options = ("--model", folder, "--tasks", "image_needle", "--samples", "3", "--strategy", "h2o", "--metrics", "all")
    first, again, other = (document(*options, "--seed", seed)["tasks"][0] for seed in (1, 1, 2))
    assert first == again
    assert first["answer_nll"] != other["answer_nll"]


def test_a_file_and_overrides_make_the_strategy(folder, tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("budget: 0.5\nscorer: {use: position, sinks: 1}\nselector: top-k\n")
    options = ("--model", folder, "--tasks", "order", "--samples", "1")
    found = document(*options, "--strategy", file, "--set", "scorer.sinks=3")
    assert (found["strategy"]["name"], found["strategy"]["scorer"]["sinks"], found["budget"]) == ("mine", 3, 0.5)


def test_a_registered_testbed_is_found_by_its_name_with_the_tasks_of_its_package(folder):
    class Plugin:
        @kvcomp.hookimpl
        def kvcomp_testbeds(self):
            return [folder]

        @kvcomp.hookimpl
        def kvcomp_tasks(self):
            class Mine(type(TASKS[2])):
                name = "mine/recall"

            return [Mine()]

    registry.register(Plugin(), "bench", package="bench")
    try:
        options = ("--model", "untrained", "--samples", "1", "--strategy", "full")
        assert [row["task"] for row in document(*options)["tasks"]] == ["recall"]
        ambiguous = call(*options, "--tasks", "recall")
        assert "several tasks are named 'recall': mine/recall, mini/recall" in ambiguous.stderr
    finally:
        registry.unregister("bench")


def test_the_table_has_a_line_per_task(folder):
    options = ("--model", folder, "--tasks", "recall,order", "--samples", "2")
    result = call(*options, "--strategy", "flowmm", "--budget", "0.2")
    lines = result.stdout.splitlines()
    assert result.exit_code == 0, result.stderr
    assert [line.split()[0] for line in lines[:3]] == ["task", "recall", "order"]
    assert [line.split()[-1] for line in lines[1:3]] == ["yes", "no"]
    assert lines[-1].startswith("flowmm at budget 0.2, question_seen, 2 questions per task, seed 0")


def test_every_fault_comes_in_one_run_before_a_model_is_loaded(monkeypatch):
    monkeypatch.setattr("kvcomp.cli.evaluate.load_testbed", lambda *given: pytest.fail("a model was loaded"))
    result = call(
        *("--model", "minmile-xs", "--tasks", "recal,text_needle,none", "--strategy", "flowm", "--budget", "1.5"),
        *("--set", "policy"),
    )
    assert (result.exit_code, result.stdout) == (2, "")
    head, *faults = result.stderr.strip().splitlines()
    assert head == "error: kvcomp eval has 6 faults:"
    assert [fault.split(":")[0].strip() for fault in faults] == [
        *("--tasks", "--tasks", "--model", "--budget", "--set", "--strategy")
    ]
    for hint in ("'recall'", "no task named 'none'", "'minimile-xs'", "(0, 1]", "PATH=VALUE", "'flowmm'"):
        assert hint in result.stderr


def test_no_task_at_all_is_a_fault(folder):
    result = call("--model", folder, "--tasks", " , ")
    assert result.exit_code == 2
    assert "--tasks: must name a task, or all" in result.stderr


def test_faults_of_a_strategy_keep_their_paths(folder):
    result = call("--model", folder, "--strategy", "flowmm", "--set", "polcy.threshold=1", "--set", "policy.treshold=1")
    assert result.exit_code == 2
    assert "--strategy: policy.treshold: 'flow-guided' has no field 'treshold'." in result.stderr
    assert "Did you mean 'policy'?" in result.stderr


def test_a_trigger_does_not_go_with_a_question_that_comes_later(folder):
    result = call("--model", folder, "--query-mode", "question_later", "--set", "trigger=over-budget")
    assert result.exit_code == 2
    assert "--query-mode: question_later leaves what follows the context as it is, and the trigger over-budget" in (
        result.stderr
    )


def test_a_folder_that_holds_no_model_exits_with_2(tmp_path):
    result = call("--model", tmp_path, "--tasks", "recall", "--strategy", "full")
    assert result.exit_code == 2
    assert f"the testbed in {tmp_path} cannot be loaded" in result.stderr


def test_a_budget_below_one_slot_exits_with_2(folder):
    result = call("--model", folder, "--tasks", "recall", "--strategy", "h2o", "--budget", "10B", "--samples", "1")
    assert result.exit_code == 2
    assert "below one slot" in result.stderr
