"""Writing samples in MileBench's own format, so that one loader serves real and synthetic data."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from kvcomp.core.errors import InputError
from kvcomp.lab.milebench.folder import folder_name
from kvcomp.lab.milebench.names import ADVERSARIAL, OFFICIAL, quantity_level
from kvcomp.lab.milebench.schema import PLACEHOLDER, join_context
from kvcomp.lab.scoring import SCORERS
from kvcomp.lab.tasks import Part, Sample, Task

EXACT = "exact match"


def export_samples(
    task: Task, samples: Iterable[Sample], root: Path, instructions: Sequence[str], split: str = "test"
) -> Path:
    """Write samples of a task to `<root>/<task>/<task>.json` with their images as PNG, and return that folder.

    A `/` in the task's name becomes `-` in the folder's. Instructions take turns. Reading the folder gives equal
    samples; MileBench's scripts, which know neither parts nor evidence, read it too. A metric that is not among
    kvcomp's scorers is written as exact match.

    Args:
        task: gives name and metric.
        samples: what to write, one held at a time; images must be RGB.
        root: where the task's folder is made.
        instructions: paraphrases of the instruction, at least one.
        split: what `meta_data` says of the samples' origin.

    Raises:
        InputError: listing every sample that cannot be written, or there is such a folder already, or the name is one
            of MileBench's: nobody must take the samples for the real ones.
    """
    folder = root / folder_name(task.name)
    _check(folder, instructions)
    partial = root / f".{folder.name}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    (partial / "images").mkdir(parents=True)
    try:
        records = _write_all(samples, partial, len(instructions))
        document = {"meta_data": _meta(task, len(records), instructions, split), "data": records}
        text = json.dumps(document, indent=1, ensure_ascii=False) + "\n"
        (partial / f"{folder.name}.json").write_text(text, encoding="utf-8")
        partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return folder


def _check(folder: Path, instructions: Sequence[str]) -> None:
    if folder.name.removesuffix(ADVERSARIAL) in OFFICIAL:
        raise InputError(f"a task to export must not have a name of MileBench's own, got {folder.name!r}; rename it")
    if folder.exists():
        raise InputError(f"a folder to export to must be new, and this one exists: {folder}; remove it, or use another")
    if not instructions:
        raise InputError("there must be at least one instruction, got none")


def _write_all(samples: Iterable[Sample], folder: Path, instructions: int) -> list[dict[str, Any]]:
    """Write the images of all samples, and return their annotations.

    Raises:
        InputError: with every reason why a sample cannot be written, or there is none.
    """
    records, faults = [], []
    for number, sample in enumerate(samples):
        found = _faults(sample)
        faults += [f"sample {number}: {fault}" for fault in found]
        if not found:
            records.append(_write(sample, number, instructions, folder))
    if not (records or faults):
        raise InputError("there must be at least one sample to export, got none")
    if faults:
        raise InputError("these samples cannot be exported:\n  " + "\n  ".join(faults))
    return records


def _faults(sample: Sample) -> list[str]:
    texts = [part for part in (*sample.context, sample.question) if isinstance(part, str)]
    modes = {part.mode for part in sample.context if isinstance(part, Image.Image)}
    faults = [f"a text must not look like a placeholder, got {text!r}" for text in texts if PLACEHOLDER.search(text)]
    faults += ["choices cannot be written: a task to export asks open questions"] if sample.choices else []
    faults += [f"images must be RGB, got {mode}" for mode in sorted(modes - {"RGB"})]
    return faults + ([] if sample.answer.split() else ["the answer must not be empty"])


def _meta(task: Task, samples: int, instructions: Sequence[str], split: str) -> dict[str, Any]:
    return {
        "dataset": task.name,
        "split": split,
        "num_sample": samples,
        "task_instruction": list(instructions),
        "question_type": "open-ended",
        "metric": task.metric if task.metric in SCORERS else EXACT,
        "max_new_tokens": task.max_new_tokens,
    }


def _write(sample: Sample, number: int, instructions: int, folder: Path) -> dict[str, Any]:
    """Write the images of a sample, and return its annotation."""
    names: list[str] = []

    def write(part: Part) -> str:
        if isinstance(part, str):
            return part
        names.append(f"{number}-{len(names) + 1}.png")
        part.save(folder / "images" / names[-1])
        return f"{{image#{len(names)}}}"

    parts = tuple(write(part) for part in sample.context)
    return {
        "sample_id": number,
        "task_instruction_id": number % instructions,
        "task_instance": {
            "context": join_context(parts, sample.question),
            "images_path": names,
            "question": sample.question,
            "parts": parts,
            "evidence": [{"part": span.part, "start": span.start, "stop": span.stop} for span in sample.evidence],
            "slots": sample.slots,
            "depth": sample.depth,
        },
        "response": sample.answer,
        "image_quantity_level": quantity_level(len(names)),
        "images_number": len(names),
    }
