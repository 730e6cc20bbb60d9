"""`kvcomp demo` from the command line to its three files, with an untrained model of the demo's own shape."""

import json

import pytest
from commands import save_untrained
from PIL import Image
from typer.testing import CliRunner

import kvcomp
from kvcomp.cli import app
from kvcomp.cli.demo import RECIPES as HEADLINE
from kvcomp.cli.demo import choose_tasks, recipe_names
from kvcomp.core.errors import InputError
from kvcomp.core.registry import registry
from kvcomp.lab import Sample, Task
from kvcomp.lab.records import TaskRecord
from kvcomp.minimile.tasks import TASKS

RECIPES = ("flowmm", "random", "streaming-llm")


class Colour(Task):
    """Asks for the colour of one of two or three images."""

    name = "small/colour"

    def sample(self, split: str, index: int) -> Sample:
        red = Image.new("RGB", (56, 56), "red")
        return Sample(("image # 1 :", red, "image # 2 :", *[red] * (1 + index % 2)), "what colour ?", "answer : red")


class Other(Colour):
    name = "small/other"


class Slow(Colour):
    name = "small/slow_hard"


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    """A package that brings a testbed and two tasks for it."""
    folder = save_untrained(tmp_path_factory.mktemp("beds") / "untrained")

    class Plugin:
        @kvcomp.hookimpl
        def kvcomp_tasks(self):
            return [Colour(), Other(), Slow()]

        @kvcomp.hookimpl
        def kvcomp_testbeds(self):
            return [folder]

    registry.register(Plugin(), "bench-plugin", package="bench", version="1")
    yield "untrained"
    registry.unregister("bench-plugin")


@pytest.fixture(scope="module")
def demo(bench, tmp_path_factory):
    """Return the folder and the document of one demo."""
    out = tmp_path_factory.mktemp("out") / "new" / "folder"
    chosen = [argument for recipe in RECIPES for argument in ("--recipe", recipe)]
    result = CliRunner().invoke(
        app, ["demo", "--testbed", bench, "--samples", "3", "--out", str(out), "--json", *chosen]
    )
    assert result.exit_code == 0, result.stderr
    return out, json.loads(result.stdout)


def test_stdout_is_the_document_that_was_written(demo):
    out, document = demo
    assert json.loads((out / "results.json").read_text()) == document
    assert {path.name for path in out.iterdir()} == {"results.json", "results.png", "report.html"}


def test_there_is_a_row_per_recipe_budget_and_task_and_one_full(demo):
    rows = demo[1]["rows"]
    tasks = ("small/colour", "small/other")
    expected = {("full", 1.0, task) for task in tasks}
    expected |= {(recipe, budget, task) for recipe in RECIPES for budget in (1.0, 0.2, 0.1) for task in tasks}
    assert {(row["recipe"], row["budget"], row["task"]) for row in rows} == expected
    assert len(rows) == len(expected)
    for row in rows:
        assert set(row) == {"recipe", "budget", "task", "exact_match", "ci", "kv_bytes", "decode_ratio", "rho"}
        assert row["ci"][0] <= row["exact_match"] <= row["ci"][1]
        assert row["decode_ratio"] > 0


def test_bytes_follow_the_budget_and_only_flowmm_measures_rho(demo):
    rows = demo[1]["rows"]
    full = next(row["kv_bytes"] for row in rows if row["recipe"] == "full")
    for row in rows:
        assert row["kv_bytes"] == pytest.approx(row["budget"] * full, rel=0.25)  # whole slots of some 25 tokens
        assert len(row["rho"]) == 4
        assert all((value is not None) == (row["recipe"] == "flowmm") for value in row["rho"])


def test_at_budget_1_every_recipe_gives_the_answers_of_the_full_cache(demo):
    whole = [entry for entry in demo[1]["agreement"] if entry["budget"] == 1.0]
    assert [entry["recipe"] for entry in whole] == ["full", *RECIPES]
    assert all(entry["same"] == entry["samples"] == 6 for entry in whole)


def test_the_document_says_how_it_was_made(demo):
    document = demo[1]
    assert (document["samples"], document["seed"], document["testbed"]) == (3, 0, "untrained")
    assert document["skipped"] == []
    assert document["versions"]["kvcomp"] == kvcomp.__version__
    assert document["hardware_threads"] >= 1
    assert document["seconds"] > 0


def test_the_page_and_the_plot_are_there(demo):
    page = (demo[0] / "report.html").read_text()
    assert page.startswith("<!doctype html>")
    assert all(recipe in page for recipe in RECIPES)
    with Image.open(demo[0] / "results.png") as plot:
        assert plot.format == "PNG"


def test_the_summary_has_a_line_per_recipe_and_budget(bench, tmp_path):
    result = CliRunner().invoke(
        app, ["demo", "--testbed", bench, "--samples", "1", "--out", str(tmp_path), "--recipe", "streaming-llm"]
    )
    lines = [line.split() for line in result.stdout.splitlines()]
    assert result.exit_code == 0
    assert lines[0][:4] == ["recipe", "budget", "exact", "match"]
    assert [line[:2] for line in lines[1:5]] == [
        ["full", "1.0"],
        *(["streaming-llm", b] for b in ("1.0", "0.2", "0.1")),
    ]
    assert "At budget 1.0 every other recipe (1) gave the answers of 'full': 2 of 2." in result.stdout
    assert str(tmp_path / "report.html") in result.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--testbed", "untraned"], "no testbed named 'untraned'. Did you mean 'untrained'?"),
        (["--recipe", "flowm"], "no recipe named 'flowm'. Did you mean 'flowmm'?"),
        (["--task", "othr"], "no task named 'othr'. Did you mean 'other'?"),
    ],
)
def test_unknown_names_exit_with_2(bench, tmp_path, arguments, message):
    result = CliRunner().invoke(app, ["demo", "--testbed", bench, "--out", str(tmp_path), *arguments])
    assert result.exit_code == 2
    assert message in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_an_output_folder_that_cannot_be_made_exits_with_2(bench, tmp_path):
    (tmp_path / "file").write_text("")
    result = CliRunner().invoke(
        app, ["demo", "--testbed", "none, for the folder comes first", "--out", str(tmp_path / "file")]
    )
    assert result.exit_code == 2
    assert "--out must be a folder that can be made" in result.stderr


def records(*learned):
    record = TaskRecord(exact_match=0.5, ci=(0.4, 0.6), samples=9, reference_tokens=40, learned=False)
    return {task.id: record.model_copy(update={"learned": task.id in learned}) for task in TASKS}


@pytest.mark.parametrize(
    ("known", "expected"),
    [
        ({}, ["text_needle", "recall", "clevr_change"]),
        (records("alfred", "clevr_change", "order", "recall"), ["recall", "clevr_change", "alfred"]),
        (records("order"), ["order"]),
    ],
)
def test_the_headline_is_three_tasks_that_the_testbed_has_learned(known, expected):
    assert [task.id for task in choose_tasks(None, "minimile-xs", known)] == expected


def test_a_testbed_that_has_learned_nothing_needs_chosen_tasks():
    with pytest.raises(InputError, match="has learned none of its tasks; choose some with --task"):
        choose_tasks(None, "minimile-xs", records())
    assert [task.id for task in choose_tasks(["order", "mini/recall_hard"], "minimile-xs", records())] == [
        *("order", "recall_hard")
    ]


def test_the_headline_of_recipes_does_not_grow_with_what_is_installed():
    names = recipe_names(None)
    assert names[0] == "full"
    assert set(names[1:]) == set(HEADLINE) & {entry.name for entry in registry.entries("recipe")}
    assert recipe_names(["flowmm-no-gate", "full"]) == ["full", "flowmm-no-gate"]
