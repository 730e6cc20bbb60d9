"""Folders in MileBench's format with invented contents, sound and broken."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

COLOURS = ("red", "green", "blue", "yellow", "white", "black", "orange", "purple")
INSTRUCTIONS = ["Decide.", "Say what is next.", "What now?"]


def record(
    number: int, context: str, images: Sequence[str], response: Any = "red", instruction: int = 0, **instance: Any
) -> dict[str, Any]:
    """Return one sample; further arguments go into its task instance."""
    return {
        "sample_id": number,
        "task_instruction_id": instruction,
        "task_instance": {"context": context, "images_path": list(images), **instance},
        "response": response,
        "image_quantity_level": "Few",
        "images_number": len(images),
    }


ALFRED = record(
    3,
    "Your Main Goal: Put a cup away. Step Details: {image#1}Step#1: Walk. {image#2}Step#2: Pick up. {image#3} Next: ",
    ["6.png", "7.png", "8.png"],
    "Carry the cup to the sink on the left.",
    instruction=2,
    combined_1_images=["3-0.jpg"],
)
MMCOQA = record(
    2,
    "Global Table: {table#1} History: Table: {table#2} Current Context: {image#3} {image#4} Question: colour? Answer:",
    ["2.png", "2.png", "3.png", "4.png"],
    "red. blue ",
)
NEEDLE = record(5, "{image#1}{image#2}{image#3}Question: which number?", ["1.png", "2.png", "3.png"], 5626534)


def write_task(
    root: Path, name: str, records: Sequence[Any], *, file: str = "", images: str = "images", **meta: Any
) -> Path:
    """Write a task's folder, an image of another colour for every name in it, and return its annotation file."""
    folder = root / name
    (folder / images).mkdir(parents=True, exist_ok=True)
    names = [path for entry in records if isinstance(entry, dict) for path in image_names(entry)]
    for position, path in enumerate(dict.fromkeys(names)):
        Image.new("RGB", (8, 8), COLOURS[position % len(COLOURS)]).save(folder / images / path)
    described = {"dataset": name, "split": "test", "num_sample": len(records), "task_instruction": INSTRUCTIONS}
    document = {"meta_data": described | {"question_type": "open-ended"} | meta, "data": list(records)}
    path = folder / (file or f"{name}.json")
    path.write_text(json.dumps(document), encoding="utf-8")
    return path


def image_names(entry: dict[str, Any]) -> list[str]:
    """Return the names of a sample's images that a file can be written for."""
    instance = entry.get("task_instance")
    paths = instance.get("images_path", []) if isinstance(instance, dict) else []
    return [path for path in paths if isinstance(path, str) and path.endswith(".png") and "/" not in path]


def write_seven(root: Path) -> None:
    """Write a small folder of each of the seven tasks."""
    pair = ["0.png", "1.png"]
    write_task(root, "ALFRED", [ALFRED], question_type="")
    write_task(root, "IEdit", [record(0, "Source:{image#1} Target:{image#2}Instruction:", pair, "remove the dog")])
    write_task(root, "Spot-the-Diff", [record(7, "{image#1}{image#2}Difference:", pair, "the car is gone")])
    write_task(root, "CLEVR-Change", [record(1, "{image#1}{image#2}Difference:", pair, "the cube turned red")])
    write_task(root, "MMCoQA", [MMCOQA])
    write_task(root, "TextNeedleInAHaystack", [record(41, "{image#1} Essay {image#2} Question: ?", pair, "4071936")])
    write_task(root, "ImageNeedleInAHaystack", [NEEDLE])
