"""What the options of `kvcomp run` spell."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from kvcomp.cli.models import Source, find_model, load_model
from kvcomp.cli.prompts import encode_prompt, move
from kvcomp.cli.run import parse_overrides, strategy_source
from kvcomp.core.errors import ConfigError, InputError


def test_values_are_yaml():
    changes = ["policy.threshold=0.3", "merger={use: mean}", "mass_preserving=true", "name=a=b"]
    assert parse_overrides(changes) == {
        "policy.threshold": 0.3,
        "merger": {"use": "mean"},
        "mass_preserving": True,
        "name": "a=b",
    }


def test_every_fault_is_listed():
    with pytest.raises(ConfigError) as caught:
        parse_overrides(["threshold", "=1", "budget=0.2", "source=x", "merger={use"])
    assert caught.value.faults == (
        "threshold: must be PATH=VALUE, as policy.threshold=0.3",
        "=1: must be PATH=VALUE, as policy.threshold=0.3",
        "budget: use --budget",
        "source: use --strategy",
        "merger: the value must be YAML, got '{use'",
    )


@pytest.mark.parametrize(
    ("given", "source"),
    [("flowmm", "flowmm"), ("mine.yaml", Path("mine.yaml")), ("folder/mine", Path("folder/mine"))],
)
def test_a_strategy_is_a_path_where_it_looks_like_one(given, source):
    assert strategy_source(given) == source


@pytest.mark.parametrize("name", ["./none", "/none", "~/none", "none/", "a/b/c"])
def test_a_folder_that_is_not_there_is_named(name):
    with pytest.raises(InputError, match=f"this folder does not exist: {name}"):
        find_model(name)


def test_a_folder_without_a_model_is_named(tmp_path):
    with pytest.raises(InputError, match=f"--model {tmp_path} holds no model configuration"):
        find_model(str(tmp_path))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_missing_device_is_an_input_error(tmp_path):
    with pytest.raises(InputError, match="use --device cpu"):
        load_model(Source(str(tmp_path), None), "cuda")


class Template:
    """A processor with a chat template that returns what it was given."""

    chat_template = "..."

    def apply_chat_template(self, messages, **options):
        return {"messages": messages, "options": options}


def test_images_come_before_the_prompt_in_one_user_message():
    encoded = encode_prompt(Template(), "what ?", ["first", "second"], multimodal=True)
    (message,) = encoded["messages"]
    assert message["role"] == "user"
    assert message["content"] == [
        {"type": "image", "image": "first"},
        {"type": "image", "image": "second"},
        {"type": "text", "text": "what ?"},
    ]
    assert encoded["options"]["add_generation_prompt"]


def test_a_text_model_is_given_text_and_without_a_template_the_bare_prompt():
    assert encode_prompt(Template(), "hi", [], multimodal=False)["messages"][0]["content"] == "hi"

    def tokenizer(text, return_tensors):
        return {"text": text}

    assert encode_prompt(tokenizer, "hi", [], multimodal=False) == {"text": "hi"}


def test_images_without_a_chat_template_are_refused():
    with pytest.raises(InputError, match="no chat template"):
        encode_prompt(SimpleNamespace(), "hi", ["image"], multimodal=True)


def test_real_numbers_take_the_dtype_of_the_model_and_ids_keep_theirs():
    model = SimpleNamespace(device=torch.device("cpu"), dtype=torch.float16)
    moved = move({"ids": torch.tensor([1]), "pixels": torch.tensor([0.5]), "other": "x"}, model)
    assert (moved["ids"].dtype, moved["pixels"].dtype, moved["other"]) == (torch.int64, torch.float16, "x")
