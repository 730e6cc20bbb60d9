"""Reading folders: layouts, aliases, what is tolerated, and every fault at once."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path

import pytest
from milebench_folders import ALFRED, MMCOQA, NEEDLE, record, write_seven, write_task
from PIL import Image

from kvcomp.core.errors import DataError, InputError
from kvcomp.lab.milebench import SEVEN, Reading, Truncation, open_folder
from kvcomp.lab.milebench.image_files import find_image
from kvcomp.lab.tasks import Sample


def changed(entry, key, value):
    """Return a copy of a sample with another value at a dotted key; Ellipsis leaves it out."""
    entry = copy.deepcopy(entry)
    *path, last = key.split(".")
    place = entry
    for step in path:
        place = place[step]
    if value is ...:
        del place[last]
    else:
        place[last] = value
    return entry


def faults_of(root, tasks=None, **options):
    with pytest.raises(DataError) as caught:
        open_folder(root, tasks, **options)
    return caught.value.faults


def only(root, **options):
    (task,) = open_folder(root, **options).tasks
    return task


@pytest.mark.parametrize("inner", ["", "MileBench"])
def test_both_layouts_hold_all_seven(tmp_path, inner):
    write_seven(tmp_path / inner)
    opened = open_folder(tmp_path)
    assert [task.name for task in opened.tasks] == sorted(task.name for task in SEVEN)
    assert opened.unread == ()
    for task in opened.tasks:
        sample = task.sample("test", 0)
        assert sample.answer
        assert sample.question == ""
        assert task.score(sample.answer, sample) == pytest.approx(1.0)


def test_a_sample_is_what_mile_bench_shows(tmp_path):
    write_task(tmp_path, "ALFRED", [ALFRED])
    sample = only(tmp_path).sample("test", 0)
    texts = [part for part in sample.context if isinstance(part, str)]
    images = [part for part in sample.context if isinstance(part, Image.Image)]
    assert texts[0] == "What now?\nYour Main Goal: Put a cup away. Step Details: "
    assert texts[1:] == ["Step#1: Walk. ", "Step#2: Pick up. ", " Next: "]
    assert [image.getpixel((0, 0)) for image in images] == [(255, 0, 0), (0, 128, 0), (0, 0, 255)]
    assert sample.answer == ALFRED["response"]
    assert [part["type"] for part in sample.messages()[0]["content"]] == ["text", "image"] * 3 + ["text"]


def test_tables_and_images_share_one_numbering_and_files_may_repeat(tmp_path):
    write_task(tmp_path, "MMCoQA", [MMCOQA])
    task = only(tmp_path)
    images = [part.getpixel((0, 0)) for part in task.sample("test", 0).context if isinstance(part, Image.Image)]
    assert images == [(255, 0, 0), (255, 0, 0), (0, 128, 0), (0, 0, 255)]
    assert task.summary() == {"samples": 1, "images": 4, "repeated": 0, "unused": 0}


def test_scores_are_the_official_ones_and_a_needle_has_a_lenient_one(tmp_path):
    write_task(tmp_path, "ImageNeedleInAHaystack", [NEEDLE])
    write_task(tmp_path, "MMCoQA", [MMCOQA])
    needle, mmcoqa = open_folder(tmp_path).tasks
    sample = needle.sample("test", 0)
    assert sample.answer == "5626534"
    assert needle.scores("**5626534**", sample) == {"needle_official": 0.0, "needle_lenient": 1.0}
    assert needle.score("", sample) == needle.score("." * 40, sample) == 0.0
    sample = mmcoqa.sample("test", 0)
    assert mmcoqa.scores("it is red blue", sample) == {"mmcoqa_official": 1.0}


@pytest.mark.parametrize("images", ["images", "."])
def test_image_paths_start_in_images_or_beside_the_file(tmp_path, images):
    write_task(tmp_path, "IEdit", [record(0, "{image#1}?", ["0.png"])], images=images)
    assert only(tmp_path).sample("test", 0).context[1].getpixel((0, 0)) == (255, 0, 0)


def test_an_image_may_be_named_with_its_folder(tmp_path):
    write_task(tmp_path, "IEdit", [record(0, "{image#1}?", ["0.png"])])
    write_task(tmp_path, "IEdit", [record(0, "{image#1}?", ["images/0.png"])])
    assert only(tmp_path).size == 1


@pytest.mark.parametrize("folder", ["CLEVR-Change", "CLEVR_Change", "CLEVR_Change_test", "clevr-c"])
@pytest.mark.parametrize("asked", ["CLEVR-Change", "CLEVR_Change", "CLEVR-C"])
def test_aliases_of_folders_and_of_names(tmp_path, folder, asked):
    write_task(tmp_path, folder, [record(0, "{image#1}?", ["0.png"])])
    (task,) = open_folder(tmp_path, [asked]).tasks
    assert (task.name, task.metric) == ("CLEVR-Change", "rouge_l_official")


def test_the_adversarial_file_is_read_where_it_is_asked_for(tmp_path):
    write_task(tmp_path, "ALFRED", [ALFRED])
    write_task(tmp_path, "ALFRED", [changed(ALFRED, "response", "else")], file="ALFRED-adv.json")
    assert only(tmp_path).name == "ALFRED"
    (task,) = open_folder(tmp_path, ["ALFRED_adv"]).tasks
    assert task.name == "ALFRED-adv"
    assert task.sample("test", 0).answer == "else"


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("sample_id", "3"),
        ("task_instruction_id", "2"),
        ("response", 12),
        ("response", 1.5),
        ("task_instance.combined_1_images", ...),
        ("images_number", ...),
        ("extra", [1]),
    ],
)
def test_what_is_tolerated_in_a_sample(tmp_path, key, value):
    write_task(tmp_path, "ALFRED", [changed(ALFRED, key, value)])
    task = only(tmp_path)
    assert task.sample_id(0) == 3
    assert task.sample("test", 0).answer == str(value if key == "response" else ALFRED["response"])


@pytest.mark.parametrize("instructions", [["a", "b", "c"], {"0": "a", "1": "b", "2": "c"}])
@pytest.mark.parametrize("question_type", ["open-ended", ""])
def test_instructions_are_a_list_or_a_mapping_and_the_question_type_may_be_empty(tmp_path, instructions, question_type):
    write_task(tmp_path, "ALFRED", [ALFRED], task_instruction=instructions, question_type=question_type)
    assert only(tmp_path).sample("test", 0).context[0].startswith("c\nYour Main Goal")


def test_repeated_placeholders_and_unused_images_are_counted(tmp_path):
    write_task(tmp_path, "IEdit", [record(0, "{image#1}{image#1} {image#3}", ["0.png", "1.png", "2.png"])])
    assert only(tmp_path).summary() == {"samples": 1, "images": 3, "repeated": 1, "unused": 1}
    assert sum(isinstance(part, Image.Image) for part in only(tmp_path).sample("test", 0).context) == 3


def test_the_official_policy_pairs_from_the_end(tmp_path):
    write_task(tmp_path, "IEdit", [record(0, "{image#1}{image#1} {image#3}", ["0.png", "1.png", "2.png"])])
    task = only(tmp_path, reading=Reading("official"))
    pixels = [part.getpixel((0, 0)) for part in task.sample("test", 0).context if isinstance(part, Image.Image)]
    assert pixels == [(255, 0, 0), (0, 128, 0), (0, 0, 255)]
    assert task.reading.describe()["placeholder_policy"] == "official"


def test_truncation_is_recorded_and_cuts(tmp_path):
    write_task(tmp_path, "ALFRED", [ALFRED])
    cut = Truncation(8, 2, str.split, " ".join)
    task = only(tmp_path, reading=Reading(truncation=cut))
    assert task.sample("test", 0).context[0] == "What now?\nStep#2: Pick up."
    assert task.sample("test", 0).context[-1] == "Next:"
    assert task.reading.describe() == {
        "placeholder_policy": "by_index",
        "images": "separate",
        "max_context_len": 8,
        "tokens_per_image": 2,
    }
    assert open_folder(tmp_path).tasks[0].reading.describe()["max_context_len"] is None


def test_a_window_that_the_instruction_fills_is_a_fault(tmp_path):
    write_task(tmp_path, "ALFRED", [ALFRED])
    faults = faults_of(tmp_path, reading=Reading(truncation=Truncation(2, 2, str.split, " ".join)))
    fault = "ALFRED/ALFRED.json: meta_data.task_instruction[{}]: leaves nothing of max_context_len=2; use a larger one"
    assert faults == (fault.format(1), fault.format(2))


# --- faults ---


@pytest.mark.parametrize(
    ("key", "value", "fault"),
    [
        ("sample_id", ..., "data[0]: sample_id: is missing"),
        ("sample_id", 1.5, "data[0]: sample_id: must be a valid integer, got 1.5"),
        ("sample_id", True, "sample_id: must be a valid integer, got True"),
        ("task_instruction_id", 7, "sample 3: task_instruction_id: must be one of 0, 1, 2, got 7"),
        ("task_instance", [], "sample 3: task_instance: must be an object, got []"),
        ("task_instance.context", None, "sample 3: task_instance.context: must be a valid string, got None"),
        ("task_instance.context", "{image#4}", "task_instance.context: {image#4} must name one of the 3 images"),
        ("task_instance.context", "{table#0}", "task_instance.context: {table#0} must name one of the 3 images"),
        ("task_instance.images_path", "6.png", "sample 3: task_instance.images_path: must be a valid array"),
        (
            "task_instance.images_path",
            ["6.png", 7, "8.png"],
            "task_instance.images_path[1]: must be a valid string, got 7",
        ),
        ("task_instance.images_path", ["6.png", "7.png", "x.jpg"], "images_path[2]: no such image: 'x.jpg'; looked in"),
        ("task_instance.images_path", ["6.png", "7.png", "../8.png"], "images_path[2]: must be a path inside"),
        ("task_instance.choice_list", "a", "sample 3: task_instance.choice_list: must be a valid array"),
        ("task_instance.question", "Next:", "task_instance: question and parts must come together"),
        ("response", ..., "sample 3: response: is missing"),
        ("response", "", "sample 3: response must not be empty"),
        ("response", "?!", "sample 3: response: must hold more than punctuation, got '?!'"),
        ("response", "." * 40, "sample 3: response: must hold more than punctuation, got"),
        ("response", ["a"], "sample 3: response: must be a valid string, got ['a']"),
        ("image_quantity_level", "Some", "image_quantity_level: must be 'Few', 'Medium' or 'Many', got 'Some'"),
    ],
)
def test_a_fault_names_file_sample_and_key(tmp_path, key, value, fault):
    write_task(tmp_path, "ALFRED", [ALFRED])  # writes the images
    write_task(tmp_path, "ALFRED", [changed(ALFRED, key, value)])
    faults = faults_of(tmp_path)
    assert all(found.startswith("ALFRED/ALFRED.json: ") for found in faults)
    assert any(fault in found for found in faults), faults


@pytest.mark.parametrize(
    ("meta", "fault"),
    [
        (
            {"question_type": "essay"},
            "meta_data.question_type: must be 'open-ended', 'multi-choice' or empty, got 'essay'",
        ),
        (
            {"question_type": "multi-choice"},
            "sample 3: task_instance.choice_list: must hold the choices of a multiple-choice question, got none",
        ),
        ({"max_new_tokens": 0}, "meta_data.max_new_tokens: must be greater than or equal to 1, got 0"),
        ({"task_instruction": "Look."}, "meta_data.task_instruction: must be an object, got 'Look.'"),
        ({"task_instruction": [1]}, "meta_data.task_instruction[0]: must be a valid string, got 1"),
        ({"task_instruction": {"first": "a"}}, "meta_data.task_instruction.first"),
        ({"metric": "bleu"}, "meta_data: metric must be one of exact match, rouge_l_official"),
        ({"split": 3}, "meta_data.split: must be a valid string, got 3"),
    ],
)
def test_faults_of_meta_data(tmp_path, meta, fault):
    write_task(tmp_path, "ALFRED", [ALFRED], **meta)
    assert any(found.startswith(f"ALFRED/ALFRED.json: {fault}") for found in faults_of(tmp_path)), faults_of(tmp_path)


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("{", "must be a JSON file that can be read"),
        ("[]", "must be an object with the keys meta_data and data, got []"),
        ("{}", "meta_data: is missing"),
        ('{"meta_data": {}, "data": {}}', "data: must be a list of samples, got {}"),
        ('{"meta_data": {}, "data": []}', "data: must hold at least one sample"),
        ('{"meta_data": [], "data": [1, null]}', "data[1]: must be an object, got None"),
        ("[" * 100_000, "must be a JSON file that can be read"),
    ],
)
def test_files_of_the_wrong_shape(tmp_path, text, fault):
    (tmp_path / "ALFRED").mkdir()
    (tmp_path / "ALFRED" / "ALFRED.json").write_text(text)
    assert any(fault in found for found in faults_of(tmp_path)), faults_of(tmp_path)


def test_a_file_that_is_no_text_is_a_fault(tmp_path):
    (tmp_path / "ALFRED").mkdir()
    (tmp_path / "ALFRED" / "ALFRED.json").write_bytes(b"\xff\xfe\x00")
    assert "must be a JSON file that can be read" in faults_of(tmp_path)[0]


def test_all_faults_of_all_files_come_at_once(tmp_path):
    write_task(tmp_path, "ALFRED", [changed(ALFRED, "response", ""), changed(ALFRED, "sample_id", 4), "no sample"])
    write_task(tmp_path, "IEdit", [record(0, "{image#2}", ["0.png"]), record(0, "{image#1}", ["none.jpg"])])
    faults = faults_of(tmp_path, ["ALFRED", "IEdit", "STD"])
    assert [fault.split(":")[0] for fault in faults] == ["STD", *["ALFRED/ALFRED.json"] * 2, *["IEdit/IEdit.json"] * 3]
    assert faults[0].startswith("STD: no such task here.")
    assert "sample 0: sample_id: must be unique, got 2 of it" in faults[-1]


def test_a_damaged_image_is_a_fault_before_anything_runs(tmp_path):
    path = write_task(tmp_path, "ALFRED", [ALFRED])
    (path.parent / "images" / "7.png").write_text("no image")
    (fault,) = faults_of(tmp_path)
    assert "sample 3: task_instance.images_path[1]: an image file must be one that Pillow can read" in fault


def test_an_image_that_breaks_later_is_named_with_its_sample(tmp_path):
    path = write_task(tmp_path, "ALFRED", [ALFRED])
    task = only(tmp_path)
    (path.parent / "images" / "7.png").unlink()
    with pytest.raises(InputError, match=r"ALFRED\.json: sample 3: the image file .*7\.png cannot be read"):
        task.sample("test", 0)


def test_a_task_in_both_layouts_is_a_fault(tmp_path):
    write_task(tmp_path, "ALFRED", [ALFRED])
    write_task(tmp_path / "MileBench", "ALFRED", [ALFRED])
    assert faults_of(tmp_path) == ("ALFRED: must be there once, got 2 files",)


def test_a_placeholder_too_many_is_read_under_the_official_policy(tmp_path):
    write_task(tmp_path, "IEdit", [record(0, "{image#1} {image#2}", ["0.png"])])
    assert "the placeholder policy 'official' reads it" in faults_of(tmp_path)[0]
    sample = only(tmp_path, reading=Reading("official")).sample("test", 0)
    assert sample.context[-1] == " {image#2}"


# --- multiple choice ---

CHOICE = record(4, "{image#1} What is it?", ["0.png"], "a blue cup", choice_list=["a red cup", "a blue cup", "none"])


def test_multiple_choice_lists_its_choices_and_is_scored_by_them(tmp_path):
    write_task(tmp_path, "ActionSequence", [CHOICE], question_type="multi-choice")
    (task,) = open_folder(tmp_path, ["actionsequence_test"]).tasks
    sample = task.sample("test", 0)
    assert (task.metric, task.max_new_tokens) == ("multi_choice_official", 512)
    assert sample.choices == ("a red cup", "a blue cup", "none")
    listed = " What is it?\nChoice list: \nA. a red cup\nB. a blue cup\nC. none\nYour answer is: "
    assert sample.context[-1] == listed
    assert [task.score(text, sample) for text in ("B", "It is a blue cup.", "The answer is B", "")] == [1, 1, 0, 0]


def test_the_task_with_hundreds_of_choices_has_no_letters(tmp_path):
    write_task(tmp_path, "GPR1200", [CHOICE], question_type="multi-choice")
    (task,) = open_folder(tmp_path, ["gpr1200"]).tasks
    assert "\na red cup\na blue cup\n" in task.sample("test", 0).context[-1]


def test_open_ended_choices_are_shown_and_the_score_stays_rouge(tmp_path):
    write_task(tmp_path, "ALFRED", [CHOICE])
    task = only(tmp_path)
    assert task.metric == "rouge_l_official"
    assert "Choice list" in task.sample("test", 0).context[-1]


def test_a_reference_that_is_no_choice_is_a_fault(tmp_path):
    write_task(tmp_path, "TQA", [changed(CHOICE, "response", "a green cup")], question_type="multi-choice")
    (fault,) = faults_of(tmp_path, ["TQA"])
    assert "sample 4: response: must be one of the 3 choices of choice_list, got 'a green cup'" in fault
    write_task(tmp_path, "TQA", [changed(CHOICE, "response", "A blue cup.")], question_type="multi-choice")
    assert open_folder(tmp_path, ["TQA"]).tasks[0].size == 1


# --- combined images ---

COMBINED = Reading(images="combined")


def test_combined_mode_shows_the_one_image_first_and_names_the_others(tmp_path):
    path = write_task(tmp_path, "ALFRED", [ALFRED])
    (path.parent / "combined_1_images").mkdir()
    Image.new("RGB", (8, 8), "purple").save(path.parent / "combined_1_images" / "3-0.jpg")
    task = only(tmp_path, reading=COMBINED)
    image, text = task.sample("test", 0).context
    red, green, blue = image.getpixel((0, 0))
    assert max(red, blue) > 100 > green
    assert text.startswith(
        "\nWhat now?\nYour Main Goal: Put a cup away. Step Details: <Image 1> Step#1: Walk. <Image 2> "
    )
    assert task.image_files(0) == ("3-0.jpg",)
    assert task.describe()["images"] == "combined"


def test_combined_mode_draws_what_the_folder_does_not_have(tmp_path):
    write_task(tmp_path, "ALFRED", [changed(ALFRED, "task_instance.combined_1_images", ...)])
    task = only(tmp_path, reading=COMBINED)
    image = task.sample("test", 0).context[0]
    assert image.size == (1600, 1600)
    corners = [image.getpixel(place) for place in ((5, 5), (1595, 5), (5, 805), (1595, 1595))]
    assert corners == [(255, 0, 0), (0, 128, 0), (0, 0, 255), (0, 0, 0)]
    assert image.crop((0, 700, 800, 800)).getextrema() == ((0, 255), (0, 255), (0, 255))  # the caption
    assert task.image_files(0) == ("drawn of 3 images",)


@pytest.mark.parametrize(
    ("named", "fault"),
    [
        (
            ["none.jpg"],
            "task_instance.combined_1_images[0]: no such image: 'none.jpg'; looked in ALFRED/combined_1_images",
        ),
        (["../x.jpg"], "task_instance.combined_1_images[0]: must be a path inside the task's folder"),
        (["a.jpg", "b.jpg"], "task_instance.combined_1_images: must name one image, got 2"),
    ],
)
def test_faults_of_combined_images(tmp_path, named, fault):
    write_task(tmp_path, "ALFRED", [changed(ALFRED, "task_instance.combined_1_images", named)])
    (found,) = faults_of(tmp_path, reading=COMBINED)
    assert fault in found
    assert only(tmp_path).size == 1  # nobody looks at them where images are separate


def test_combined_mode_needs_an_image(tmp_path):
    write_task(tmp_path, "ALFRED", [record(0, "No image.", [])])
    assert "combined mode must have an image to show" in faults_of(tmp_path, reading=COMBINED)[0]


def test_combined_mode_cuts_the_text_and_counts_no_image(tmp_path):
    write_task(tmp_path, "ALFRED", [changed(ALFRED, "task_instance.combined_1_images", ...)])
    cut = Truncation(5, 100, str.split, " ".join)
    task = only(tmp_path, reading=Reading(truncation=cut, images="combined"))
    assert task.sample("test", 0).context[1] == "\nWhat now?\n<Image 3> Next:"


# --- folders ---


def test_other_tasks_are_named_and_not_read(tmp_path):
    write_task(tmp_path, "ALFRED", [ALFRED])
    write_task(tmp_path, "DocVQA", [{"anything": 1}], question_type="multi-choice")
    (tmp_path / "notes").mkdir()
    opened = open_folder(tmp_path)
    assert ([task.name for task in opened.tasks], opened.unread) == (["ALFRED"], ("DocVQA",))
    assert open_folder(tmp_path, ["alfred"]).unread == ()
    shutil.rmtree(tmp_path / "ALFRED")
    with pytest.raises(InputError, match="Here is DocVQA, which is read where it is named"):
        open_folder(tmp_path)


def test_a_broken_task_that_nobody_asked_for_does_not_matter(tmp_path):
    write_task(tmp_path, "ALFRED", [ALFRED])
    write_task(tmp_path, "IEdit", ["broken"])
    assert len(open_folder(tmp_path, ["ALFRED"]).tasks) == 1


def test_a_folder_of_the_seven_without_its_file_does_not_go_unnoticed(tmp_path):
    write_seven(tmp_path / "MileBench")
    (tmp_path / "MileBench" / "IEdit" / "IEdit.json").unlink()
    assert faults_of(tmp_path) == ("MileBench/IEdit: must hold IEdit.json, and there is no such file",)
    assert len(open_folder(tmp_path, ["ALFRED"]).tasks) == 1


def test_the_folder_of_one_task_says_which_folder_is_meant(tmp_path, monkeypatch):
    write_task(tmp_path, "ALFRED", [ALFRED])
    with pytest.raises(InputError, match="This is the folder of one task; name the one above it: ") as caught:
        open_folder(tmp_path / "ALFRED")
    assert str(caught.value).endswith(str(tmp_path))
    monkeypatch.chdir(tmp_path / "ALFRED")
    with pytest.raises(InputError, match="This is the folder of one task"):
        open_folder(Path())


def test_what_was_exported_is_found_without_its_prefix(tmp_path):
    for name in ("mini-recall", "mini-alfred", "other-order", "mini-order", "Spot-the-Diff"):
        write_task(tmp_path, name, [ALFRED], metric="exact match", dataset=name.replace("-", "/", 1))
    for asked in ("recall", "mini-recall", "mini/recall"):
        assert [task.name for task in open_folder(tmp_path, [asked]).tasks] == ["mini/recall"]
    assert [task.name for task in open_folder(tmp_path, ["alfred"]).tasks] == ["mini/alfred"]
    assert faults_of(tmp_path, ["order", "Diff"])[:1] == (
        "order: must name one task, and here are mini-order, other-order",
    )
    assert faults_of(tmp_path, ["Diff"])[0].startswith("Diff: no such task here.")
    write_task(tmp_path, "ALFRED", [ALFRED])
    assert [task.name for task in open_folder(tmp_path, ["alfred"]).tasks] == ["ALFRED"]


def test_an_empty_folder_and_a_missing_one_say_what_must_be_there(tmp_path):
    with pytest.raises(InputError, match=r"must hold at least one task as <task>/<task>\.json"):
        open_folder(tmp_path)
    with pytest.raises(InputError, match="a folder of tasks must exist"):
        open_folder(tmp_path / "none")


def test_there_is_no_training_split_and_no_sample_beyond_the_last(tmp_path):
    write_task(tmp_path, "ALFRED", [ALFRED])
    task = only(tmp_path)
    with pytest.raises(InputError, match="has no split 'train'"):
        task.sample("train", 0)
    for index in (1, -1):
        with pytest.raises(InputError, match=f"1 samples, 0 to 0, and no sample {index}"):
            task.sample("test", index)


@pytest.mark.parametrize(
    "entry", ["", "/etc/passwd", "../x", "a/../../x", "C:/x", "C:x", "a\\b", "..", "a\0b", "x" * 5000]
)
def test_image_paths_that_leave_the_folder_or_cannot_be_names(tmp_path, entry):
    with pytest.raises(InputError, match=r"must be a path inside the task's folder|no such image"):
        find_image(tmp_path, entry)


def test_data_is_read_as_it_is_written_by_others(tmp_path):
    path = write_task(tmp_path, "ALFRED", [ALFRED])
    path.write_text("\ufeff" + json.dumps(json.loads(path.read_text()), indent=4), encoding="utf-8")
    assert isinstance(only(tmp_path).sample("any", 0), Sample)
