"""The checkpoint that comes with the package answers its tasks, loaded as any Hugging Face model."""

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText, AutoProcessor

from kvcomp.core.registry import registry
from kvcomp.minimile import TASKS
from kvcomp.minimile.evaluation import evaluate, predict

FOLDER = registry.find("testbed", "minimile-xs").value


def test_the_folder_is_a_small_float16_checkpoint():
    assert sum(path.stat().st_size for path in FOLDER.iterdir()) < 8_000_000
    weights = load_file(FOLDER / "model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.float16}
    assert json.loads((FOLDER / "config.json").read_text())["model_type"] == "qwen2_5_vl"


@pytest.mark.parametrize("task", TASKS, ids=lambda task: task.name)
def test_exact_match_on_fresh_samples_is_at_least_95_percent(task):
    result = evaluate(FOLDER, task, "integration", samples=40)
    assert result["exact_match"] >= 0.95
    assert result["prompt_tokens"]["least"] >= 250


def test_a_batch_padded_on_the_left_answers_as_one_sample_does():
    model = AutoModelForImageTextToText.from_pretrained(FOLDER, dtype=torch.float32).eval()
    processor = AutoProcessor.from_pretrained(FOLDER)
    samples = [task.sample("integration", 100) for task in TASKS]
    together = [answer for _, answer, _ in predict(model, processor, samples)]
    alone = [answer for sample in samples for _, answer, _ in predict(model, processor, [sample])]
    assert together == alone
    assert all(answer.startswith("answer : ") for answer in alone)
