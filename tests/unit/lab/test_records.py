"""`tasks.json`: written, read back, refused where it is malformed; and when a task counts as learned."""

import json

import pytest

from kvcomp.core.errors import InputError
from kvcomp.lab.records import TaskRecord, is_learned, read_records, write_records
from kvcomp.minimile.tasks import HARD_TASKS, TASKS

RECORD = TaskRecord(exact_match=0.97, ci=(0.95, 0.98), samples=300, reference_tokens=213, learned=True)


def test_records_are_read_as_they_were_written(tmp_path):
    write_records(tmp_path, {"recall": RECORD})
    assert read_records(tmp_path) == {"recall": RECORD}
    assert json.loads((tmp_path / "tasks.json").read_text())["recall"]["ci"] == [0.95, 0.98]


def test_a_folder_without_records_has_none(tmp_path):
    assert read_records(tmp_path) == {}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[]", "must hold a record of each task"),
        ("{", "Invalid JSON"),
        ('{"recall": {"exact_match": 1.0}}', "recall.ci: Field required"),
        ('{"recall": {"learned": "perhaps"}}', "recall.learned"),
    ],
)
def test_malformed_records_are_refused_by_file_and_key(tmp_path, text, message):
    (tmp_path / "tasks.json").write_text(text)
    with pytest.raises(InputError, match=message) as caught:
        read_records(tmp_path)
    assert str(tmp_path / "tasks.json") in str(caught.value)


def test_hard_variants_count_as_learned_a_little_earlier():
    assert not any(task.hard for task in TASKS)
    assert all(task.hard for task in HARD_TASKS)
    assert [is_learned(TASKS[0], share) for share in (0.949, 0.95)] == [False, True]
    assert [is_learned(HARD_TASKS[0], share) for share in (0.899, 0.9)] == [False, True]
