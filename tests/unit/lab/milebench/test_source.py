"""A folder of tasks as an experiment names it."""

from __future__ import annotations

from pathlib import Path

import pytest
from milebench_folders import ALFRED, write_seven, write_task

from kvcomp.core.errors import ConfigError
from kvcomp.lab.milebench import TaskFolder, is_task_folder


class Words:
    """As much of a codec as cutting takes."""

    def encode_text(self, text):
        return text.split()

    def decode_text(self, words):
        return " ".join(words)


def test_a_name_stands_for_all_or_for_some(tmp_path):
    write_seven(tmp_path)
    assert is_task_folder(f"milebench:{tmp_path}")
    assert not is_task_folder("recall")
    assert len(TaskFolder.parse(f"milebench:{tmp_path}").open().tasks) == 7
    some = TaskFolder.parse(f"milebench:{tmp_path}#STD, mmcoqa", placeholders="official")
    assert [task.name for task in some.open().tasks] == ["MMCoQA", "Spot-the-Diff"]
    assert {task.reading.placeholder_policy for task in some.open().tasks} == {"official"}


def test_plain_data_from_a_file_make_the_same(tmp_path):
    settings = {"folder": str(tmp_path), "tasks": ["IEdit"], "max_context_len": 9, "tokens_per_image": 2}
    folder = TaskFolder.of(settings)
    assert (folder.folder, folder.tasks, folder.cuts) == (tmp_path, ("IEdit",), True)
    assert TaskFolder.of(folder.model_dump(mode="json")) == folder
    assert TaskFolder.of({"folder": "~/data"}).folder == Path.home() / "data"


def test_prompts_are_cut_with_the_tokenizer_of_the_model(tmp_path):
    write_task(tmp_path, "ALFRED", [ALFRED])
    folder = TaskFolder.parse(f"milebench:{tmp_path}", max_context_len=8, tokens_per_image=2)
    (task,) = folder.open(Words()).tasks
    assert task.sample("test", 0).context[0] == "What now?\nStep#2: Pick up."
    assert task.describe()["max_context_len"] == 8


def test_what_decides_samples_and_score_is_described(tmp_path):
    path = write_task(tmp_path, "ALFRED", [ALFRED])
    first = TaskFolder.parse(f"milebench:{tmp_path}").open().tasks[0].describe()
    assert first == {
        "name": "ALFRED",
        "metric": "rouge_l_official",
        "max_new_tokens": 512,
        "sha256": first["sha256"],
        "placeholder_policy": "by_index",
        "images": "separate",
        "max_context_len": None,
        "tokens_per_image": None,
    }
    path.write_text(path.read_text() + " ")
    again = TaskFolder.parse(f"milebench:{tmp_path}").open().tasks[0].describe()
    assert again["sha256"] != first["sha256"]


def test_every_wrong_setting_is_named():
    with pytest.raises(ConfigError) as caught:
        TaskFolder.of({"folder": 3, "placeholders": "by_hand", "image": "separate"})
    assert {fault.split(":")[0] for fault in caught.value.faults} == {"folder", "placeholders", "image"}
    with pytest.raises(ConfigError, match="max_context_len and tokens_per_image must be given together"):
        TaskFolder.parse("milebench:here", max_context_len=4096)
