"""Measure exact match of a checkpoint folder, loaded as any user would: Auto classes and `generate`."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

from kvcomp.lab.tasks import Sample, Task
from kvcomp.minimile.tasks import TASKS

NEW_TOKENS = 8


def evaluate(folder: Path, task: Task, split: str, samples: int, batch_size: int = 20) -> dict[str, Any]:
    """Return how many greedy answers of a task are right to the last token, and how long the prompts are."""
    model, processor = load(folder)
    right, lengths = 0, []
    for start in range(0, samples, batch_size):
        chosen = [task.sample(split, index) for index in range(start, min(samples, start + batch_size))]
        for sample, prediction, length in predict(model, processor, chosen):
            right += task.exact_match(prediction, sample)
            lengths.append(length)
    mean = round(sum(lengths) / samples, 1)
    return {
        "task": task.name,
        "split": split,
        "samples": samples,
        "exact_match": round(right / samples, 4),
        "prompt_tokens": {"least": min(lengths), "mean": mean, "most": max(lengths)},
    }


def load(folder: Path) -> tuple[Any, Any]:
    """Return the model in float32 and its processor."""
    model: Any = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
    processors: Any = AutoProcessor
    return model.eval(), processors.from_pretrained(folder)


def predict(model: Any, processor: Any, samples: list[Sample]) -> Iterator[tuple[Sample, str, int]]:
    """Yield each sample with the model's greedy answer and its number of prompt tokens, all in one batch."""
    inputs = processor.apply_chat_template(
        [sample.messages() for sample in samples],
        tokenize=True,
        add_generation_prompt=True,
        return_dict=True,
        return_tensors="pt",
        processor_kwargs={"padding": True},
    )
    with torch.inference_mode():
        output = model.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False)
    answers = processor.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    yield from zip(samples, answers, inputs["attention_mask"].sum(dim=1).tolist(), strict=True)


def main(arguments: list[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--samples", type=int, default=300)
    parser.add_argument("--split", default="test")
    options = parser.parse_args(arguments)
    for task in TASKS:
        result = evaluate(options.folder, task, options.split, options.samples)
        print(json.dumps(result), flush=True)  # noqa: T201 - a command prints its result


if __name__ == "__main__":
    main()
