"""The seven MileBench tasks that the FlowMM paper reports, and every name that they go by."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class KnownTask:
    """One task of MileBench (arXiv:2404.18532, table of tasks).

    Attributes:
        name: its folder in the archives; case and hyphens as there.
        samples: how many the benchmark has.
        archive: the number of the archive that holds it.
        short: what the FlowMM paper calls it.
    """

    name: str
    samples: int
    archive: int
    short: str


SEVEN = (
    KnownTask("ALFRED", 200, 0, "ALFRED"),
    KnownTask("CLEVR-Change", 200, 1, "CLEVR-C"),
    KnownTask("IEdit", 200, 2, "IEdit"),
    KnownTask("MMCoQA", 200, 2, "MMCoQA"),
    KnownTask("Spot-the-Diff", 200, 4, "STD"),
    KnownTask("TextNeedleInAHaystack", 320, 5, "TextNeedle"),
    KnownTask("ImageNeedleInAHaystack", 320, 2, "ImageNeedle"),
)

KNOWN: Mapping[str, KnownTask] = {task.name: task for task in SEVEN}

ADVERSARIAL = "-adv"
"""Ends the name of the file with paraphrased references, beside the usual one."""


def canonical(name: str) -> str:
    """Return the name of a task's folder for any name that it goes by; an unknown name comes back as it is.

    Accepted are the paper's abbreviations, underscores for hyphens, and the names of the hub's splits, which end in
    `_test` or `_adv`; case does not matter.

    >>> [canonical(name) for name in ("STD", "CLEVR_Change_test", "textneedle", "ALFRED_adv", "DocVQA")]
    ['Spot-the-Diff', 'CLEVR-Change', 'TextNeedleInAHaystack', 'ALFRED-adv', 'DocVQA']
    """
    folded = name.casefold().replace("_", "-").removesuffix("-test")
    variant = ADVERSARIAL if folded.endswith(ADVERSARIAL) else ""
    for task in SEVEN:
        if folded.removesuffix(ADVERSARIAL) in (task.name.casefold(), task.short.casefold()):
            return task.name + variant
    return name


def official_metric(name: str) -> str:
    """Return the official scorer of a task. MileBench asks for the name first, and for the question type only then.

    >>> [official_metric(name) for name in ("TextNeedleInAHaystack", "MMCoQA", "IEdit")]
    ['needle_official', 'mmcoqa_official', 'rouge_l_official']
    """
    if "NeedleInAHaystack" in name:
        return "needle_official"
    return "mmcoqa_official" if "MMCoQA" in name else "rouge_l_official"


def quantity_level(images: int) -> str:
    """Return MileBench's word for a number of images.

    >>> [quantity_level(images) for images in (2, 5, 6, 31, 32)]
    ['Few', 'Few', 'Medium', 'Medium', 'Many']
    """
    if images < 6:
        return "Few"
    return "Medium" if images < 32 else "Many"
