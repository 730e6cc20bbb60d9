"""`kvcomp tasks`: list, export, verify, fetch."""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from functools import partial

import commands
import pytest
from fake_hub import serve
from milebench_folders import ALFRED, record, write_seven, write_task
from PIL import Image

from kvcomp.cli.testbeds import TESTBED, tasks_beside
from kvcomp.core.registry import registry
from kvcomp.lab.milebench import archives, open_folder
from kvcomp.lab.milebench.archives import Archive

call = partial(commands.call, "tasks")
TASKS = [entry.name for entry in registry.entries("task")]


# --- list ---


def test_list_shows_every_registered_task(tmp_path):
    listed = json.loads(call("list", "--json").stdout)
    assert [entry["name"] for entry in listed] == TASKS
    assert {entry["samples"] for entry in listed} == {None}
    lines = call("list").stdout.splitlines()
    assert lines[0].split() == ["name", "metric", "samples", "from"]
    assert len(lines) == 1 + len(TASKS)


def test_list_of_a_folder_shows_what_is_in_it_too(tmp_path):
    write_seven(tmp_path)
    listed = json.loads(call("list", tmp_path, "--json").stdout)
    found = {entry["name"]: entry for entry in listed if entry["source"] == str(tmp_path)}
    assert len(found) == 7
    assert found["MMCoQA"] == {"name": "MMCoQA", "metric": "mmcoqa_official", "samples": 1, "source": str(tmp_path)}


# --- export ---


def test_what_is_exported_is_verified_and_read_as_it_was(tmp_path):
    name = TASKS[0]
    result = call("export", name, "--out", tmp_path, "--samples", 3, "--seed", 5)
    assert result.exit_code == 0, result.stderr
    folder = tmp_path / name.replace("/", "-")
    assert result.stdout.split() == [str(folder)]
    (task,) = open_folder(tmp_path).tasks
    drawn = registry.find("task", name).value
    assert [task.sample("test", index) for index in range(3)] == [drawn.sample("export-5", index) for index in range(3)]
    assert call("verify", tmp_path, "--pixels").exit_code == 0


def test_every_seed_gives_other_samples(tmp_path):
    answers = []
    for seed in (1, 2):
        call("export", TASKS[0], "--out", tmp_path / str(seed), "--samples", 8, "--seed", seed)
        (task,) = open_folder(tmp_path / str(seed)).tasks
        answers.append([task.sample("test", index).answer for index in range(8)])
    assert answers[0] != answers[1]


def test_instructions_are_the_callers_or_three(tmp_path):
    call("export", TASKS[0], "--out", tmp_path / "a", "--samples", 1)
    call("export", TASKS[0], "--out", tmp_path / "b", "--samples", 1, "--instruction", "Say it.")
    first, second = (open_folder(tmp_path / name).tasks[0].file.meta.task_instruction for name in "ab")
    assert len(set(first.values())) == 3
    assert second == {0: "Say it."}


def test_the_prefix_of_mini_mile_may_be_left_out(tmp_path):
    bare = TASKS[0].removeprefix("mini/")
    for number, name in enumerate((bare, f"mini/{bare}")):
        assert call("export", name, "--out", tmp_path / str(number), "--samples", 1).exit_code == 0


def test_all_is_what_eval_calls_all(tmp_path):
    assert call("export", "all", "--out", tmp_path, "--samples", 1).exit_code == 0
    assert [task.name for task in open_folder(tmp_path).tasks] == [task.name for task in tasks_beside(TESTBED)]


def test_an_unknown_task_and_a_folder_that_is_there_are_errors(tmp_path):
    result = call("export", TASKS[0] + "x", "--out", tmp_path)
    assert result.exit_code == 2
    assert f"Did you mean '{TASKS[0]}'?" in result.stderr
    for expected in (0, 2):
        result = call("export", TASKS[0], "--out", tmp_path, "--samples", 1)
        assert result.exit_code == expected
    assert "must be new, and this one exists" in result.stderr


# --- verify ---


def test_verify_of_a_sound_folder_is_a_table(tmp_path):
    write_seven(tmp_path)
    write_task(tmp_path, "DocVQA", [{}])
    result = call("verify", tmp_path, "--pixels")
    assert result.exit_code == 0
    rows = [line.split() for line in result.stdout.splitlines()]
    assert rows[0] == ["name", "metric", "samples", "images", "repeated", "unused"]
    assert ["ALFRED", "rouge_l_official", "1", "3", "0", "0"] in rows
    assert "ALFRED: the benchmark has 200 samples, this folder 1" in result.stdout
    assert "not read, neither of the seven nor exported by kvcomp: DocVQA" in result.stdout


def test_verify_as_json(tmp_path):
    write_task(tmp_path, "IEdit", [record(0, "{image#1}{image#1}", ["0.png", "1.png"])])
    document = json.loads(call("verify", tmp_path, "--json").stdout)
    counts = {"samples": 1, "images": 2, "repeated": 1, "unused": 1, "num_sample": 1}
    entry = {"name": "IEdit", "metric": "rouge_l_official", **counts}
    assert document == {"tasks": [entry], "unread": [], "faults": []}


def test_verify_says_where_a_file_holds_other_samples_than_it_counts(tmp_path):
    path = write_task(tmp_path, "ALFRED", [ALFRED])
    path.write_text(path.read_text().replace('"num_sample": 1', '"num_sample": 3'))
    result = call("verify", tmp_path)
    assert "ALFRED: meta_data.num_sample says 3, and the file holds 1 samples" in result.stdout


def test_verify_prints_all_faults_and_exits_with_1(tmp_path):
    write_task(tmp_path, "ALFRED", ["none"])
    write_task(tmp_path, "IEdit", [record(number, "{image#2}", ["0.png"]) for number in range(60)])
    result = call("verify", tmp_path)
    assert (result.exit_code, result.stdout) == (1, "")
    assert len(result.stderr.splitlines()) == 62
    assert "IEdit/IEdit.json: sample 59: task_instance.context: {image#2} must name" in result.stderr
    result = call("verify", tmp_path, "--json")
    assert result.exit_code == 1
    assert len(json.loads(result.stdout)["faults"]) == 61
    assert call("verify", tmp_path, "--task", "IEdit", "--placeholders", "official").exit_code == 0


def test_verify_decodes_images_where_it_is_asked_to(tmp_path):
    path = write_task(tmp_path, "ALFRED", [ALFRED]).parent / "images" / "7.png"
    Image.new("RGB", (64, 64)).save(path, "BMP")
    path.write_bytes(path.read_bytes()[:2000])
    assert call("verify", tmp_path).exit_code == 0
    result = call("verify", tmp_path, "--pixels")
    assert result.exit_code == 1
    assert "sample 3" in result.stderr
    assert "7.png" in result.stderr


def test_verify_of_a_folder_that_is_not_there_exits_with_2(tmp_path):
    result = call("verify", tmp_path / "none")
    assert result.exit_code == 2
    assert "a folder of tasks must exist" in result.stderr


# --- fetch ---


def test_a_dry_run_names_the_five_archives():
    result = call("fetch", "milebench", "--out", "nowhere", "--dry-run")
    assert result.exit_code == 0
    lines = result.stdout.splitlines()
    assert len(lines) == 6
    assert "MileBench_part0.tar.gz" in lines[1]
    assert "3,974,906,269" in lines[1]
    assert "about 3,370,000,000" in lines[5]
    assert len(json.loads(call("fetch", "milebench", "--dry-run", "--json").stdout)) == 5
    assert call("fetch", "imagenet", "--out", "x").exit_code == 2


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub with two archives: one whose checksum is known, one with its beginning only."""
    write_seven(tmp_path / "source")
    contents = {number: pack(tmp_path / "source", Archive(number, 0, "").tasks) for number in (0, 5)}
    sums = {number: hashlib.sha256(content).hexdigest() for number, content in contents.items()}
    known = (Archive(0, len(contents[0]), sums[0]), Archive(5, 1, sums[5][:51], exact=False))
    monkeypatch.setattr(archives, "ARCHIVES", known)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    with serve(archives.REPOSITORY, {archive.name: contents[archive.number] for archive in known}) as running:
        yield running


def pack(source, tasks):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        for task in tasks:
            tar.add(source / task, f"MileBench/{task}")
    return buffer.getvalue()


def test_fetch_gives_a_folder_that_verifies(hub, tmp_path):
    out = tmp_path / "data"
    result = call("fetch", "milebench", "--out", out, "--endpoint", hub.url)
    assert result.exit_code == 0, result.stderr
    assert "The data is under CC BY-NC 4.0." in result.stderr
    assert archives.ARCHIVES[0].sha256 in result.stderr
    lines = result.stdout.splitlines()
    assert lines[0] == "MileBench_part0.tar.gz: 4 files"
    assert lines[2] == "  of its SHA-256 only the first 51 digits are known; those are right"
    assert call("verify", out, "--pixels").exit_code == 0
    assert [task.name for task in open_folder(out).tasks] == ["ALFRED", "TextNeedleInAHaystack"]
    hub.files.clear()
    again = call("fetch", "milebench", "--out", out, "--endpoint", hub.url, "--json")
    assert [entry["again"] for entry in json.loads(again.stdout)] == [True, True]


def test_a_fetch_that_fails_says_why_and_exits_with_2(hub, tmp_path):
    hub.files.clear()
    result = call("fetch", "milebench", "--out", tmp_path, "--task", "ALFRED", "--endpoint", hub.url)
    assert result.exit_code == 2
    assert "MileBench_part0.tar.gz cannot be downloaded" in result.stderr
    result = call("fetch", "milebench", "--out", tmp_path, "--task", "ALFREDO", "--endpoint", hub.url)
    assert "Did you mean 'ALFRED'?" in result.stderr
