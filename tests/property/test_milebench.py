"""Whatever an annotation file holds, it opens and every sample can be made, or every fault is named with its file."""

from __future__ import annotations

import copy
import json

from hypothesis import given
from hypothesis import strategies as st
from milebench_folders import ALFRED, MMCOQA, NEEDLE, write_task
from PIL import Image

from kvcomp.core.errors import DataError
from kvcomp.lab.milebench import Reading, Truncation, open_folder
from kvcomp.lab.scoring import SCORERS

TASKS = {"ALFRED": ALFRED, "MMCoQA": MMCOQA, "ImageNeedleInAHaystack": NEEDLE}
TEXTS = st.one_of(
    st.text(max_size=6), st.sampled_from(["{image#1}{table#2}", "{image#9999999999}", "../x.png", "6.png"])
)
SCALARS = st.one_of(st.none(), st.booleans(), st.integers(-2, 9), st.floats(allow_nan=False), TEXTS)
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3), max_leaves=6
)
READINGS = [
    Reading(),
    Reading(placeholder_policy="official"),
    Reading(truncation=Truncation(9, 2, str.split, " ".join)),
]


def places(node, path=()):
    """Yield the path of every value in a document."""
    entries = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    for key, value in entries:
        yield (*path, key)
        yield from places(value, (*path, key))


def replaced(document, path, value):
    document = copy.deepcopy(document)
    place = document
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    return document


def open_or_faults(root, reading):
    try:
        return open_folder(root, reading=reading).tasks, ()
    except DataError as error:
        return (), error.faults


@given(st.data())
def test_a_file_opens_or_names_its_faults(tmp_path_factory, data):
    root = tmp_path_factory.mktemp("data")
    name = data.draw(st.sampled_from(sorted(TASKS)))
    path = write_task(root, name, [TASKS[name], TASKS[name] | {"sample_id": 9}])
    document = json.loads(path.read_text())
    for _ in range(data.draw(st.integers(1, 3))):
        place = data.draw(st.sampled_from(list(places(document)) or [()]))
        document = replaced(document, place, data.draw(VALUES)) if place else document
    path.write_text(json.dumps(document))
    for reading in READINGS:
        tasks, faults = open_or_faults(root, reading)
        assert bool(tasks) != bool(faults)
        assert all(fault.startswith(f"{name}/{name}.json: ") for fault in faults)
        for task in tasks:
            for sample in (task.sample("test", index) for index in range(task.size)):
                assert all(isinstance(part, str | Image.Image) for part in sample.context)
                assert 0.0 <= task.score(sample.answer, sample) <= 1.0


@given(st.sampled_from(sorted(SCORERS)), st.text(max_size=60), st.text(max_size=60))
def test_a_score_is_a_float_between_0_and_1_for_any_text(name, prediction, reference):
    score = SCORERS[name](prediction, reference)
    assert type(score) is float
    assert 0.0 <= score <= 1.0
    assert SCORERS["needle_lenient"](prediction, reference) >= SCORERS["needle_official"](prediction, reference)
