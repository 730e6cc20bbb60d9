"""The tasks of MileBench: the seven that the FlowMM paper reports, the others, and every name that they go by."""

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

OTHERS = (
    "ActionLocalization",
    "ActionPrediction",
    "ActionSequence",
    "CharacterOrder",
    "CounterfactualInference",
    "DocVQA",
    "EgocentricNavigation",
    "GPR1200",
    "MovingAttribute",
    "MovingDirection",
    "MultiModalQA",
    "OCR-VQA",
    "ObjectExistence",
    "ObjectInteraction",
    "ObjectShuffle",
    "SceneTransition",
    "SlideVQA",
    "StateChange",
    "TQA",
    "WebQA",
    "WikiVQA",
    "nuscenes",
)
"""MileBench's other tasks: read where they are named, never fetched."""

KNOWN: Mapping[str, KnownTask] = {task.name: task for task in SEVEN}

OFFICIAL = frozenset((*KNOWN, *OTHERS))
"""Every name that is MileBench's own: nobody may export samples under it."""

MULTIPLE_CHOICE = "multi-choice"
"""The question type of the tasks that offer choices."""

ADVERSARIAL = "-adv"
"""Ends the name of the file with paraphrased references, beside the usual one."""


_BY_ALIAS = {alias.casefold(): task.name for task in SEVEN for alias in (task.name, task.short)} | {
    name.casefold(): name for name in OTHERS
}


def canonical(name: str) -> str:
    """Return the name of a task's folder for any name that it goes by; an unknown name comes back as it is.

    Accepted are the paper's abbreviations, underscores for hyphens, and the names of the hub's splits, which end in
    `_test` or `_adv`; case does not matter.

    >>> [canonical(name) for name in ("STD", "CLEVR_Change_test", "textneedle", "ALFRED_adv", "ocr_vqa", "mine")]
    ['Spot-the-Diff', 'CLEVR-Change', 'TextNeedleInAHaystack', 'ALFRED-adv', 'OCR-VQA', 'mine']
    """
    folded = name.casefold().replace("_", "-").removesuffix("-test")
    known = _BY_ALIAS.get(folded.removesuffix(ADVERSARIAL))
    if known is None:
        return name
    return known + (ADVERSARIAL if folded.endswith(ADVERSARIAL) else "")


def official_metric(name: str, question_type: str = "open-ended") -> str:
    """Return the official scorer of a task. MileBench asks for the name first, and for the question type only then.

    >>> [official_metric(name) for name in ("TextNeedleInAHaystack", "MMCoQA", "IEdit")]
    ['needle_official', 'mmcoqa_official', 'rouge_l_official']
    >>> official_metric("ActionSequence", MULTIPLE_CHOICE)
    'multi_choice_official'
    """
    if "NeedleInAHaystack" in name:
        return "needle_official"
    if "MMCoQA" in name:
        return "mmcoqa_official"
    return "multi_choice_official" if question_type == MULTIPLE_CHOICE else "rouge_l_official"


def quantity_level(images: int) -> str:
    """Return MileBench's word for a number of images.

    >>> [quantity_level(images) for images in (2, 5, 6, 31, 32)]
    ['Few', 'Few', 'Medium', 'Medium', 'Many']
    """
    if images < 6:
        return "Few"
    return "Medium" if images < 32 else "Many"
