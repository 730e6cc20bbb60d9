"""Turn a training checkpoint into a Hugging Face folder: float16 weights, processor, model card, records, log."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig

from kvcomp.lab.controls import find_method
from kvcomp.lab.evaluation import Evaluation, TaskResult
from kvcomp.lab.records import TaskRecord, write_records
from kvcomp.lab.testbed import load_testbed
from kvcomp.minimile.curriculum import PASS
from kvcomp.minimile.model import KV_HEADS, SIZES, Size
from kvcomp.minimile.processor import build_processor
from kvcomp.minimile.tasks import HARD_TASKS, TASKS
from kvcomp.minimile.training import Progress, Run
from kvcomp.minimile.vocabulary import IM_END, PAD, TOKEN_IDS

CARD = """\
# {name}

A Qwen2.5-VL *architecture* with {parameters:,} parameters, trained on a CPU on tasks
that this repository renders. It is a ruler for KV-cache compression, not an assistant; it knows {words}
words.

| part | size |
|---|---|
| text | {text} |
| vision | {vision} |
| weights | float16, trained in float32 |

## Exact match with the full cache

Greedy `generate` in float32 on the split `{split}`, which training never saw.

| task | exact match | 95 % interval | samples | prompt tokens (least, mean, most) | learned |
|---|---|---|---|---|---|
{rows}

A task counts as learned at 95 %, a hard variant at 90 %; `tasks.json` says which. Others are left out of
comparisons. The reference length of a task is that of its longest prompt here, which is the longest it was trained
to.

## Recipe

    python -m kvcomp.minimile.training --out training-output/{name} --size {size} --seed {seed}
    python -m kvcomp.minimile.export training-output/{name}/last <this folder>

Seed {seed}; {steps:,} steps of about 3,000 tokens; {minutes:.0f} minutes of wall-clock on one CPU core that other
work shared. AdamW, learning rate {learning_rate}, which falls linearly to zero over the last part of the run; bfloat16
products. Many questions follow each context, each with its answer, and only answers carry loss. Every task goes
through four sizes of context, from 5 % of its own; a size is passed at {gate:.0%} for every kind of its questions.
The heads of the first layer start by looking one or two tokens back. Three tasks begin; the others follow once names
are bound to what they name. Rotated copies and shuffled
name-value pairs fill half of each step until they are learned, then stand before some stories. Questions are
asked without the chat's frame at first (`colour of lisbon red`), and with it in most steps later.
`training_log.json` has every 50th step: the level of each task and the running share of right answers there.

An answer repeats what was asked for before it says anything (`colour of lisbon ?`, `lisbon red`), because the
first token after a prefill is still computed from the full cache.

The processor class is `PaddleOCRVLProcessor` with Qwen2-VL's image processor: the same tensors as
`Qwen2_5_VLProcessor`, which cannot be built without torchvision.
"""


def export(checkpoint: Path, folder: Path, split: str = "test", samples: int = 300, note: str = "") -> list[TaskResult]:
    """Write the folder, load it back as any user would, measure it, and return the measurements."""
    run = Run.load(checkpoint)
    model = run.model.eval().to(torch.float16)
    settings: Any = GenerationConfig
    model.generation_config = settings(
        do_sample=False,
        max_new_tokens=16,
        bos_token_id=TOKEN_IDS[PAD],
        eos_token_id=TOKEN_IDS[IM_END],
        pad_token_id=TOKEN_IDS[PAD],
    )
    model.save_pretrained(folder)
    build_processor().save_pretrained(folder)
    results = measure(folder, split, samples)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    (folder / "README.md").write_text(write_card(folder.name, run.progress, parameters, split, results) + note)
    write_log(folder / "training_log.json", run.progress, results)
    return results


def measure(folder: Path, split: str, samples: int) -> list[TaskResult]:
    """Return how the model in a folder answers every task with the full cache, and write `tasks.json` beside it."""
    evaluation = Evaluation(load_testbed(folder), find_method("full"), samples=samples, split=split)
    tasks = (*TASKS, *HARD_TASKS)
    records: dict[str, TaskRecord] = {}
    results = []
    for task in tasks:
        result = evaluation.run(task)
        records[task.id] = result.record(task)
        results.append(replace(result, learned=records[task.id].learned))
    write_records(folder, records)
    return results


def write_card(name: str, progress: Progress, parameters: int, split: str, results: Sequence[TaskResult]) -> str:
    """Return the model card."""
    rows = "\n".join(
        f"| `{result.task}` | {result.exact_match:.1%} | {result.ci[0]:.1%} to {result.ci[1]:.1%} | {result.samples} | "
        f"{result.prompt_tokens['least']}, {result.prompt_tokens['mean']:.1f}, {result.prompt_tokens['most']} | "
        f"{'yes' if result.learned else 'no'} |"
        for result in results
    )
    return CARD.format(
        name=name,
        parameters=parameters,
        words=len(TOKEN_IDS),
        split=split,
        rows=rows,
        seed=progress.seed,
        steps=progress.step,
        minutes=progress.seconds / 60,
        gate=PASS,
        size=progress.size,
        learning_rate=SIZES[progress.size].learning_rate,
        **_towers(SIZES[progress.size]),
    )


def _towers(size: Size) -> dict[str, str]:
    text = f"hidden {size.hidden}, {size.layers} layers, {size.heads} heads, {KV_HEADS} KV heads of 32, feed-forward "
    text += f"{size.feed_forward}, `mrope_section` [4, 6, 6], tied"
    vision = f"hidden {size.vision_hidden}, {size.vision_blocks} blocks, feed-forward {size.vision_feed_forward}, "
    vision += "patch 14, merge 2: 4 visual tokens per 56 x 56 image"
    return {"text": text, "vision": vision}


def write_log(path: Path, progress: Progress, results: Sequence[TaskResult]) -> None:
    """Write the training log, one line to a report."""
    lines = ",\n".join(json.dumps(line) for line in progress.log)
    measured = json.dumps([result.to_dict() for result in results])
    path.write_text(f'{{"seed": {progress.seed}, "results": {measured}, "log": [\n{lines}\n]}}\n')


def main(arguments: list[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--samples", type=int, default=300)
    parser.add_argument("--note", type=Path, help="Markdown file whose text ends the model card")
    options = parser.parse_args(arguments)
    note = "\n" + options.note.read_text() if options.note else ""
    for result in export(options.checkpoint, options.folder, samples=options.samples, note=note):
        print(json.dumps(result.to_dict()))  # noqa: T201 - a command prints its result


if __name__ == "__main__":
    main()
