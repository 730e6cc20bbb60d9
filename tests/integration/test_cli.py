"""The command line, in this process and as a process of its own."""

import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from commands import call, save_untrained
from models import TEXT
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import kvcomp
from kvcomp.cli import catalogue
from kvcomp.core.about import About
from kvcomp.core.interfaces import PART_KINDS
from kvcomp.core.making import make_part
from kvcomp.core.registry import registry

KINDS = {
    *("recipe", "policy", "allocator", "scorer", "selector", "matcher", "merger", "store", "observation"),
    *("adapter", "task", "testbed"),
}


def process(*arguments):
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "kvcomp", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120, check=False)


@pytest.fixture(scope="module")
def vision_model(tmp_path_factory):
    """An untrained model that takes images, with its processor, in a folder."""
    return save_untrained(tmp_path_factory.mktemp("vision") / "untrained-xs")


@pytest.fixture(scope="module")
def text_model(tmp_path_factory):
    """An untrained Llama with a tokenizer of single words and no chat template."""
    folder = tmp_path_factory.mktemp("text")
    words = {word: number for number, word in enumerate(["<pad>", "<unk>", *"abcdefghij"])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>").save_pretrained(folder)
    LlamaForCausalLM(LlamaConfig(**TEXT | {"vocab_size": len(words)})).save_pretrained(folder)
    return folder


@pytest.fixture
def red(tmp_path):
    path = tmp_path / "red.png"
    Image.new("RGB", (56, 56), "red").save(path)
    return path


@pytest.mark.parametrize("recipe", ["fastv", "gear", "kivi", "mikv", "minicache"])
def test_a_short_prompt_is_answered_at_the_recipes_own_budget(text_model, recipe):
    asked = ("run", "--model", text_model, "--prompt", "a b c d e f g", "--strategy", recipe, "--max-new-tokens", 2)
    answered = call(*asked, "--json")
    assert answered.exit_code == 0, answered.stderr
    report = json.loads(answered.stdout)["report"]
    assert report["budget"].endswith(" or smallest")
    assert report["layers"][0]["tokens"] == report["layers"][0]["slots"]
    refused = call(*asked, "--budget", 0.01)
    assert refused.exit_code == 2
    assert f"recipe '{recipe}'" in refused.stderr
    assert "'0.01 or smallest' takes that by itself" in " ".join(refused.stderr.split())


# --- list, show, check ---


def test_list_as_json_is_one_array_of_everything_registered():
    result = process("list", "--json")
    entries = json.loads(result.stdout)
    assert result.returncode == 0
    assert entries == [entry.describe() for entry in registry.entries()]
    assert {entry["kind"] for entry in entries} <= KINDS
    assert {"name": "flowmm", "kind": "recipe", "package": "kvcomp", "version": kvcomp.__version__} in entries


def test_list_is_a_plain_table_where_stdout_is_no_terminal():
    result = call("list")
    lines = result.stdout.splitlines()
    assert result.exit_code == 0
    assert lines[0].split() == ["name", "kind", "package", "version", "what", "it", "does"]
    assert len(lines) == 1 + len(registry.entries())
    assert ["flow-guided", "policy", "kvcomp", kvcomp.__version__] in [line.split()[:4] for line in lines]


@pytest.mark.parametrize("entry", registry.entries("recipe"), ids=lambda entry: entry.name)
def test_list_shows_the_idea_and_the_source_of_a_recipe(entry):
    about = About.of(entry.value)
    (line,) = (line for line in call("list").stdout.splitlines() if line.split()[:2] == [entry.name, "recipe"])
    assert line.endswith(f"{about.idea} [{about.source}]")


def test_version():
    assert call("--version").stdout == f"kvcomp {kvcomp.__version__}\n"


@pytest.mark.parametrize("entry", registry.entries("recipe"), ids=lambda entry: entry.name)
def test_what_show_writes_is_what_check_accepts(entry, tmp_path):
    shown = call("show", entry.name)
    file = tmp_path / f"{entry.name}.yaml"
    file.write_text(shown.stdout)
    checked = call("check", file)
    assert (shown.exit_code, checked.exit_code) == (0, 0)
    assert kvcomp.strategy(file) == kvcomp.strategy(entry.name)
    assert entry.name in checked.stdout


def test_a_recipe_given_as_a_mapping_is_shown_as_yaml():
    class Plugin:
        @kvcomp.hookimpl
        def kvcomp_recipes(self):
            return [{"name": "mapped", "budget": 0.3, "scorer": {"use": "random"}, "selector": "top-k"}]

    registry.register(Plugin(), "mapped-plugin")
    try:
        assert yaml.safe_load(call("show", "mapped").stdout)["scorer"] == {"use": "random"}
    finally:
        registry.unregister("mapped-plugin")


def test_an_unknown_recipe_exits_with_2_and_the_nearest_name():
    result = call("show", "flowm")
    assert result.exit_code == 2
    assert result.stdout == ""
    assert (
        result.stderr == "error: no recipe or part named 'flowm'. Did you mean 'flowmm'? `kvcomp list` has them all\n"
    )


def test_list_of_one_kind():
    entries = json.loads(call("list", "scorer", "--json").stdout)
    assert entries == [entry.describe() for entry in registry.entries("scorer")]
    result = call("list", "scorers")
    assert (result.exit_code, result.stdout) == (2, "")
    assert "no kind named 'scorers'. Did you mean 'scorer'?" in result.stderr


@pytest.mark.parametrize("kind", [kind for kind in PART_KINDS if registry.entries(kind)])
def test_what_show_writes_of_a_part_makes_that_part_with_its_defaults(kind):
    for entry in registry.entries(kind):
        shown = call("show", entry.name)
        assert shown.exit_code == 0
        if entry.name in {recipe.name for recipe in registry.entries("recipe")}:
            continue  # a recipe of that name goes before
        written = yaml.safe_load(shown.stdout)
        required = [name for name, field in entry.value.model_fields.items() if field.is_required()]
        assert all(f"# `{name}` must be given." in shown.stdout for name in required)
        if not required:
            faults = []
            assert make_part(kind, written[kind], faults) == entry.value()
            assert faults == []


def test_show_of_a_name_that_several_kinds_have_shows_each():
    assert yaml.safe_load(call("show", "uniform").stdout) == {
        "allocator": {"use": "uniform"},
        "policy": {"use": "uniform"},
    }


def test_show_of_what_is_neither_recipe_nor_part():
    result = call("show", "minimile-xs")
    assert result.exit_code == 2
    assert "'minimile-xs' is a testbed, and `kvcomp show` shows recipes and parts" in result.stderr
    assert "'matcher' is a kind; `kvcomp list matcher` has those of that kind" in call("show", "matcher").stderr


def test_check_takes_the_name_of_a_recipe_too():
    assert call("check", "snapkv").stdout == "snapkv: no fault; snapkv at budget 0.2\n"
    assert "no recipe named 'snapk'. Did you mean 'snapkv'?" in call("check", "snapk").stderr


@pytest.mark.filterwarnings("always::kvcomp.core.errors.IgnoredSettingWarning")
def test_check_warns_of_settings_that_change_nothing(tmp_path):
    file = tmp_path / "half.yaml"
    file.write_text("budget: 0.2\nscorer: {use: random}\n")
    result = call("check", file)
    assert result.exit_code == 0
    assert "warning: recipe 'half' has no selector, so it keeps everything and ignores the budget 0.2" in result.stderr
    assert "warning: recipe 'half' has no selector, so its scorer 'random' does nothing" in result.stderr


# --- what the operating system says ---


def test_a_folder_that_cannot_be_made_is_one_message(tmp_path):
    (tmp_path / "file").write_text("")
    result = call("tasks", "export", "recall", "--out", tmp_path / "file", "--samples", 1)
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr == f"error: {tmp_path}/file/.mini-recall.partial/images: Not a directory\n"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is always full")
def test_a_full_disk_is_one_message():
    result = call("inspect", "--task", "recall", "--max-new-tokens", 1, "--out", "/dev/full")
    assert (result.exit_code, result.stderr) == (2, "error: No space left on device\n")


def test_the_reader_of_a_pipe_may_leave(monkeypatch):
    def broken(_):
        raise BrokenPipeError(errno.EPIPE, "Broken pipe")

    monkeypatch.setattr(catalogue, "emit_json", broken)
    result = call("list", "--json")
    assert (result.exit_code, result.stderr) == (1, "")


def test_check_lists_every_fault_with_its_path(tmp_path):
    file = tmp_path / "faulty.yaml"
    file.write_text(
        "budget: 1.5\n"
        "policy: {use: flow-guidedd}\n"
        "matcher: {use: sensitivity-gated, quantil: 0.8}\n"
        "scorrer: {use: random}\n"
    )
    result = process("check", file)
    assert result.returncode == 2
    assert result.stdout == ""
    assert "Traceback" not in result.stderr
    head, *faults = result.stderr.strip().splitlines()
    assert head == f"error: {file} has 4 faults:"
    starts = [fault.strip().split(": ", 1)[0] for fault in faults]
    assert starts == ["budget", "matcher.quantil", "policy.use", "scorrer"]
    for hint in ("(0, 1], got 1.5", "'quantile'", "'flow-guided'", "'scorer'"):
        assert hint in result.stderr


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "readable text: {file}: No such file or directory"),
        ("a: [", "must be YAML"),
        ("- flowmm", "must hold a mapping"),
        ("", "must hold a mapping of parts, got nothing"),
        ("1: a\ntrue: b", "the key 'true' stands twice (true is 1, and false 0)"),
    ],
)
def test_check_of_a_file_that_holds_no_strategy(tmp_path, content, message):
    file = tmp_path / "file.yaml"
    if content is not None:
        file.write_text(content)
    result = call("check", file)
    assert result.exit_code == 2
    assert message.format(file=file) in result.stderr
    assert str(file) in result.stderr


# --- run ---


def test_run_answers_with_images_and_reports_the_cache(vision_model, red):
    result = call(
        *("run", "--model", vision_model, "--image", red, "--image", red, "--prompt", "what colour is it ?"),
        *(
            "--strategy",
            "flowmm",
            "--budget",
            "0.5",
            "--set",
            "policy.threshold=0.9",
            "--max-new-tokens",
            "4",
            "--json",
        ),
    )
    assert result.exit_code == 0, result.stderr
    document = json.loads(result.stdout)
    assert document["report"]["recipe"] == "flowmm"
    assert document["report"]["budget"] == "0.5"
    tokens = document["prompt_tokens"]
    assert tokens > 8  # four visual tokens per image
    generated = document["report"]["layers"][0]["tokens"][0] - tokens
    assert generated == 3  # the last of four is never fed back
    assert [layer["slots"] for layer in document["report"]["layers"]] == [[tokens // 2 + generated]] * 4
    assert isinstance(document["answer"], str)


def test_run_takes_the_name_of_a_testbed():
    result = call("run", "--model", "minimile-xs", "--prompt", "what ?", "--max-new-tokens", 1, "--json")
    assert json.loads(result.stdout)["report"]["recipe"] == "flowmm"


def test_a_name_that_is_no_model_is_compared_with_the_testbeds(monkeypatch):
    def unreachable(*_, **__):
        raise OSError("no network")

    monkeypatch.setattr(AutoConfig, "from_pretrained", unreachable)
    result = call("run", "--model", "minimile-x", "--prompt", "what ?")
    assert result.exit_code == 2
    assert "--model minimile-x is neither a testbed, nor a folder here, nor a hub id" in result.stderr
    assert "Did you mean 'minimile-xs'? no network" in result.stderr


def test_run_equals_the_same_call_in_python(vision_model, red, tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("scorer: {use: window-attention}\nselector: top-k\n")
    options = ("--prompt", "what ?", "--image", red, "--max-new-tokens", "5", "--json")
    written = call("run", "--model", vision_model, "--strategy", file, "--budget", "1.0", *options)
    full = call("run", "--model", vision_model, "--strategy", "full", *options)
    assert json.loads(written.stdout)["answer"] == json.loads(full.stdout)["answer"]
    assert json.loads(written.stdout)["report"]["recipe"] == "mine"


def test_run_of_a_text_model_without_a_chat_template(text_model):
    result = call(
        *("run", "--model", text_model, "--prompt", "a b c d e f g h i j", "--strategy", "streaming-llm"),
        *("--budget", "5t", "--max-new-tokens", "3"),
    )
    assert result.exit_code == 0, result.stderr
    assert "streaming-llm at budget 5t" in result.stdout
    assert len(result.stdout.splitlines()[0].split()) <= 3


def test_run_warns_where_a_budget_is_ignored(text_model):
    result = process(
        *("run", "--model", text_model, "--prompt", "a b c", "--strategy", "full", "--budget", "0.5"),
        *("--max-new-tokens", "2", "--json"),
    )
    assert result.returncode == 0
    assert "warning: recipe 'full' has no selector, so it keeps everything" in result.stderr
    assert json.loads(result.stdout)["report"]["recipe"] == "full"


def test_a_text_model_takes_no_images(text_model, red):
    result = call("run", "--model", text_model, "--prompt", "a", "--image", red)
    assert result.exit_code == 2
    assert f"{text_model} is a text-only model (llama) and takes no images" in result.stderr


def test_a_model_folder_that_does_not_exist(tmp_path):
    result = process("run", "--model", tmp_path / "none", "--prompt", "hi")
    assert result.returncode == 2
    assert result.stdout == ""
    lines = result.stderr.strip().splitlines()
    assert lines == [f"error: --model must be a folder or a hub id, and this folder does not exist: {tmp_path}/none"]


def test_weights_that_are_cut_short(text_model, tmp_path):
    folder = tmp_path / "cut"
    shutil.copytree(text_model, folder)
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    result = call("run", "--model", folder, "--prompt", "a")
    assert result.exit_code == 2
    assert f"the model in {folder} cannot be loaded" in result.stderr


def test_an_image_that_is_no_image(vision_model, tmp_path):
    (tmp_path / "notes.txt").write_text("no image")
    result = call("run", "--model", vision_model, "--prompt", "hi", "--image", tmp_path / "notes.txt")
    assert result.exit_code == 2
    assert f"this one is not: {tmp_path / 'notes.txt'}" in result.stderr


def test_an_image_that_the_processor_refuses(vision_model, tmp_path):
    Image.new("RGB", (2000, 5)).save(tmp_path / "thin.png")
    result = call("run", "--model", vision_model, "--prompt", "hi", "--image", tmp_path / "thin.png")
    assert result.exit_code == 2
    assert "the model's processor cannot use this prompt: absolute aspect ratio" in result.stderr


@pytest.mark.parametrize("budget", ["0", "1.5", "-0.1", "many", "0t"])
def test_a_budget_that_cannot_be_read_or_is_out_of_range(vision_model, budget):
    result = call("run", "--model", vision_model, "--prompt", "hi", f"--budget={budget}")
    assert result.exit_code == 2
    assert "budget" in result.stderr
    assert result.stderr.count("error:") == 1


def test_overrides_that_name_no_part_or_field(vision_model):
    result = call(
        *("run", "--model", vision_model, "--prompt", "hi"),
        *("--set", "polcy.threshold=0.3", "--set", "policy.treshold=0.3"),
    )
    assert result.exit_code == 2
    assert "Did you mean 'policy'?" in result.stderr
    assert "Did you mean 'threshold'?" in result.stderr
