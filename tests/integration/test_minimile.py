"""The checkpoint that comes with the package answers its tasks, loaded as any Hugging Face model."""

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText, AutoProcessor

from kvcomp.core.errors import UnknownNameError
from kvcomp.minimile import TASKS, checkpoint_folder
from kvcomp.minimile.evaluation import evaluate, predict


def test_an_unknown_checkpoint_is_refused_with_the_names_of_the_known_ones():
    with pytest.raises(UnknownNameError, match=r"no testbed named 'mini'\. Available: minimile-xs"):
        checkpoint_folder("mini")


def test_the_folder_is_a_small_float16_checkpoint():
    folder = checkpoint_folder()
    assert sum(path.stat().st_size for path in folder.iterdir()) < 8_000_000
    weights = load_file(folder / "model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.float16}
    assert json.loads((folder / "config.json").read_text())["model_type"] == "qwen2_5_vl"


@pytest.mark.parametrize("task", TASKS, ids=lambda task: task.name)
def test_exact_match_on_fresh_samples_is_at_least_95_percent(task):
    result = evaluate(checkpoint_folder(), task, "integration", samples=40)
    assert result["exact_match"] >= 0.95
    assert result["prompt_tokens"]["least"] >= 250


def test_a_batch_padded_on_the_left_answers_as_one_sample_does():
    folder = checkpoint_folder()
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
    processor = AutoProcessor.from_pretrained(folder)
    samples = [task.sample("integration", 100) for task in TASKS]
    together = [answer for _, answer, _ in predict(model, processor, samples)]
    alone = [answer for sample in samples for _, answer, _ in predict(model, processor, [sample])]
    assert together == alone
    assert all(answer.startswith("answer : ") for answer in alone)
