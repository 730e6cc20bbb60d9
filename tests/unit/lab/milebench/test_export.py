"""Samples written in MileBench's format come back equal, and the official reading of them is MileBench's."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from kvcomp.core.errors import InputError
from kvcomp.core.registry import registry
from kvcomp.lab.milebench import Reading, Truncation, export_samples, open_folder
from kvcomp.lab.milebench.prompts import build_prompt
from kvcomp.lab.tasks import Sample, Span, Task

INSTRUCTIONS = ("Look.", "Read.", "Answer.")


class Made(Task):
    """A task whose samples are never drawn."""

    max_new_tokens = 24

    def __init__(self, name: str = "fake/made", metric: str = "needle_official") -> None:
        self.name, self.metric = name, metric

    def sample(self, split: str, index: int) -> Sample:
        raise NotImplementedError


def picture(colour: str) -> Image.Image:
    return Image.new("RGB", (6, 4), colour)


SAMPLES = [
    Sample(("one", picture("red"), picture("blue"), "a\ntext ", " "), "which ?", "answer : 4 0"),
    Sample((picture("red"),), "", "yes", (Span(0, 1, 3),)),
    Sample(("text {only}", "é"), "q", "a b", (Span(0), Span(1, 0, 1)), (1,)),
    Sample((), "nothing before ?", "no"),
    Sample(("", ""), "", "empty parts"),
]


def test_what_is_read_equals_what_was_written(tmp_path):
    folder = export_samples(Made(), SAMPLES, tmp_path, INSTRUCTIONS, "seed 3")
    assert folder == tmp_path / "fake-made"
    opened = open_folder(tmp_path)
    (task,) = opened.tasks
    assert (task.name, task.metric, task.size) == ("fake/made", "needle_official", len(SAMPLES))
    assert task.max_new_tokens == 24
    assert [task.sample("any", index) for index in range(task.size)] == SAMPLES
    assert not list(tmp_path.glob(".*"))


def test_the_file_is_in_mile_benchs_schema(tmp_path):
    folder = export_samples(Made(), SAMPLES, tmp_path, INSTRUCTIONS)
    document = json.loads((folder / "fake-made.json").read_text())
    assert document["meta_data"] == {
        "dataset": "fake/made",
        "split": "test",
        "num_sample": 5,
        "task_instruction": list(INSTRUCTIONS),
        "question_type": "open-ended",
        "metric": "needle_official",
        "max_new_tokens": 24,
    }
    first, second, *_ = document["data"]
    assert first["task_instance"]["context"] == "one {image#1} {image#2} a\ntext    which ?"
    assert first["task_instance"]["images_path"] == ["0-1.png", "0-2.png"]
    assert second["task_instance"]["evidence"] == [{"part": 0, "start": 1, "stop": 3}]
    assert [entry["task_instruction_id"] for entry in document["data"]] == [0, 1, 2, 0, 1]
    assert {entry["image_quantity_level"] for entry in document["data"]} == {"Few"}
    assert sorted(path.name for path in (folder / "images").iterdir()) == ["0-1.png", "0-2.png", "1-1.png"]


def test_a_harness_that_knows_no_parts_reads_instruction_and_whole_context(tmp_path):
    export_samples(Made(), SAMPLES, tmp_path, INSTRUCTIONS)
    expected = build_prompt("one {image#1} {image#2} a\ntext    which ?", 2, "Look.", "official", None)
    for reading in (Reading("official"), Reading(truncation=Truncation(99, 1, list, "".join))):
        (task,) = open_folder(tmp_path, reading=reading).tasks
        sample = task.sample("test", 0)
        texts = [part for part in sample.context if isinstance(part, str)]
        assert texts[0] == expected.texts[0]
        assert texts[-1] == expected.texts[-1]
        assert (sample.question, sample.evidence) == ("", ())


@pytest.mark.parametrize("entry", registry.entries("task"), ids=lambda entry: entry.name)
def test_every_registered_task_survives_the_way_to_disk_and_back(entry, tmp_path):
    samples = [entry.value.sample("test", index) for index in range(3)]
    export_samples(entry.value, samples, tmp_path, INSTRUCTIONS)
    (task,) = open_folder(tmp_path).tasks
    assert task.name == entry.name
    assert [task.sample("test", index) for index in range(3)] == samples


TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)


@given(st.lists(TEXTS, max_size=4), TEXTS, TEXTS.filter(str.strip))
def test_any_text_survives(tmp_path_factory, parts, question, answer):
    root = tmp_path_factory.mktemp("any")
    sample = Sample(tuple(parts), question, answer)
    export_samples(Made(metric="exact match"), [sample], root, INSTRUCTIONS)
    assert open_folder(root).tasks[0].sample("test", 0) == sample


def test_a_metric_that_is_no_scorer_becomes_exact_match(tmp_path):
    export_samples(Made(metric="grid distance"), SAMPLES, tmp_path, INSTRUCTIONS)
    assert open_folder(tmp_path).tasks[0].metric == "exact match"


@pytest.mark.parametrize("name", ["ALFRED", "STD", "CLEVR_Change", "ALFRED_adv", "mmcoqa", "docvqa"])
def test_nothing_is_exported_under_a_name_of_mile_bench(tmp_path, name):
    with pytest.raises(InputError, match="must not have a name of MileBench's own"):
        export_samples(Made(name), SAMPLES, tmp_path, INSTRUCTIONS)


def test_every_sample_that_cannot_be_written_is_named_and_nothing_stays(tmp_path):
    wrong = [
        SAMPLES[0],
        Sample(("see {image#1}",), "", "a"),
        Sample((Image.new("RGBA", (2, 2)),), "{table#2}", " "),
        Sample((), "which ?", "a", choices=("a", "b")),
    ]
    with pytest.raises(InputError) as caught:
        export_samples(Made(), wrong, tmp_path, INSTRUCTIONS)
    assert str(caught.value).splitlines() == [
        "these samples cannot be exported:",
        "  sample 1: a text must not look like a placeholder, got 'see {image#1}'",
        "  sample 2: a text must not look like a placeholder, got '{table#2}'",
        "  sample 2: images must be RGB, got RGBA",
        "  sample 2: the answer must not be empty",
        "  sample 3: choices cannot be written: a task to export asks open questions",
    ]
    assert list(tmp_path.iterdir()) == []


def test_an_interrupted_export_leaves_nothing_and_can_be_repeated(tmp_path):
    def samples():
        yield SAMPLES[0]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        export_samples(Made(), samples(), tmp_path, INSTRUCTIONS)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_there_is_not_touched(tmp_path):
    export_samples(Made(), SAMPLES, tmp_path, INSTRUCTIONS)
    with pytest.raises(InputError, match="must be new, and this one exists"):
        export_samples(Made(), SAMPLES[:1], tmp_path, INSTRUCTIONS)
    assert open_folder(tmp_path).tasks[0].size == len(SAMPLES)


@pytest.mark.parametrize(("samples", "instructions"), [([], INSTRUCTIONS), (SAMPLES, ())])
def test_there_must_be_something_to_export(tmp_path, samples, instructions):
    with pytest.raises(InputError, match="at least one"):
        export_samples(Made(), samples, tmp_path, instructions)


@pytest.mark.parametrize(
    ("key", "value", "fault"),
    [
        ("evidence", [{"part": 2, "start": 0, "stop": None}], "evidence must lie in one of the 2 parts"),
        ("evidence", [{"part": 0, "start": 3, "stop": 3}], "evidence must lie in one of the 2 parts"),
        ("evidence", [{"part": "0"}], "evidence[0].part: must be a valid integer"),
        ("slots", [2], "slots must be numbers of the 2 words"),
        ("question", None, "question and parts must come together"),
        ("parts", ["other", "é"], "context must be the parts and the question with spaces between"),
    ],
)
def test_what_kvcomp_wrote_is_checked_too(tmp_path, key, value, fault):
    folder = export_samples(Made(), SAMPLES[2:3], tmp_path, INSTRUCTIONS)
    path = folder / "fake-made.json"
    document = json.loads(path.read_text())
    document["data"][0]["task_instance"][key] = value
    path.write_text(json.dumps(document))
    with pytest.raises(ValueError, match=r"fake-made/fake-made\.json: sample 0: ") as caught:
        open_folder(tmp_path)
    assert fault in str(caught.value)
