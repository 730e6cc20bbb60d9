"""What the tests of families found: `python tests/family_results.py RESULTS.xml docs/families.json`.

`make families` runs the tests, writes their results as JUnit XML, and calls this.
"""

from __future__ import annotations

import json
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

CHECKS = {
    "test_a_full_budget_is_stock_to_the_bit": "stock",
    "test_media_are_told_from_text": "media",
    "test_images_and_compression_reach_the_answer": "answer",
    "test_a_second_turn_follows_the_first": "turns",
}
EVERY_RECIPE = "test_every_recipe_runs_on_every_family"
REFUSED = "test_what_cannot_work_is_refused_with_the_reason"


def outcome(case: ElementTree.Element) -> str:
    """`passed`, `skipped` or `failed`."""
    found = {child.tag for child in case}
    return "failed" if found & {"failure", "error"} else "skipped" if "skipped" in found else "passed"


def collect(results: ElementTree.Element) -> dict[str, Any]:
    """The outcome of each check per family, that of each recipe, and what is refused."""
    families: dict[str, dict[str, Any]] = {}
    refused: dict[str, dict[str, str]] = {}
    for case in results.iter("testcase"):
        test, _, parameters = case.attrib["name"].rstrip("]").partition("[")
        if test == REFUSED:
            kind, _, reason = parameters.split("-", 2)
            refused[kind] = {"reason": reason, "outcome": outcome(case)}
        elif test == EVERY_RECIPE:
            recipe, name = parameters_of(parameters)
            families.setdefault(name, {}).setdefault("recipes", {})[recipe] = outcome(case)
        elif test in CHECKS:
            families.setdefault(parameters, {})[CHECKS[test]] = outcome(case)
    return {"families": families, "refused": refused}


def parameters_of(parameters: str) -> tuple[str, str]:
    """Recipe and family of a test's name: both may hold dashes, so the family's names decide."""
    from kvcomp.testing.families import FAMILIES

    name = max((name for name in FAMILIES if parameters.endswith(f"-{name}")), key=len, default=None)
    if name is None:
        raise ValueError(f"a test must end with the name of a family, got {parameters!r}")
    return parameters.removesuffix(f"-{name}"), name


def main(results: str, target: str) -> None:
    """Write the document."""
    found = collect(ElementTree.parse(results).getroot())
    missing = [name for name, checks in found["families"].items() if "recipes" not in checks]
    if missing or not found["families"]:
        raise SystemExit(f"{results} must hold the slow tests too; without recipes: {', '.join(missing) or 'all'}")
    versions = {package: version(package) for package in ("kvcomp", "torch", "transformers")}
    Path(target).write_text(json.dumps({"versions": versions, **found}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
