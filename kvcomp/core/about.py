"""What its author says of a recipe: in the comment at the head of its file, and on a page beside it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any

HEAD = re.compile(r"(?P<title>[^(]+) \((?P<source>[^)]+)\): (?P<idea>.+)")


@dataclass(frozen=True)
class About:
    """What a recipe is; empty where its author does not say.

    Attributes:
        title: the method's own name.
        source: the paper it follows, or what else it is.
        idea: one line.
        notes: what else the comment says.
        page: Markdown, with headings of the second level: equations, deviations, the smallest budget.
    """

    title: str = ""
    source: str = ""
    idea: str = ""
    notes: str = ""
    page: str = ""

    @classmethod
    def of(cls, recipe: Path | Mapping[str, Any]) -> About:
        """Return what is said of a recipe as the hook `kvcomp_recipes` gives it; nothing of a mapping or an unreadable
        file.

        The first line of a file is `# TITLE (SOURCE): IDEA`; a first line of another form is the idea. The page is the
        file of the same name that ends in `.md`, if there is one.
        """
        if isinstance(recipe, Mapping):
            return cls()
        comment = takewhile(lambda line: line.startswith("#"), _text(Path(recipe)).splitlines())
        first, *notes = [line.lstrip("#").strip() for line in comment] or [""]
        found = HEAD.fullmatch(first)
        said = found.groupdict() if found else {"idea": first}
        return cls(**said, notes=" ".join(notes), page=_text(Path(recipe).with_suffix(".md")))


def _text(path: Path) -> str:
    """Return the text of a file; empty where it cannot be read, which `kvcomp.strategy` reports."""
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return ""
