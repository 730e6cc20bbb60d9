"""What its author says of a recipe."""

from __future__ import annotations

from pathlib import Path

import pytest

from kvcomp.core.about import About
from kvcomp.core.registry import registry

BUILT_IN = [entry for entry in registry.entries("recipe") if entry.package == "kvcomp"]


def test_title_source_and_idea_come_from_the_first_line_and_the_rest_are_notes(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("# Mine (arXiv:2400.00000): the best tokens.\n# Slowly,\n# but well.\nscorer: random # no head\n")
    assert About.of(file) == About("Mine", "arXiv:2400.00000", "the best tokens.", "Slowly, but well.")


def test_the_page_is_the_file_beside(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("scorer: random\n")
    file.with_suffix(".md").write_text("## Equations\n")
    assert About.of(file) == About(page="## Equations\n")


def test_a_first_line_of_another_form_is_the_idea(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("# The best tokens\nscorer: random\n")
    assert About.of(file) == About(idea="The best tokens")


@pytest.mark.parametrize("recipe", [{"name": "mine"}, Path("nowhere.yaml")], ids=["mapping", "missing file"])
def test_where_nothing_is_said_nothing_is_returned(recipe: Path | dict[str, str]) -> None:
    assert About.of(recipe) == About()


@pytest.mark.parametrize("entry", BUILT_IN, ids=lambda entry: entry.name)
def test_every_built_in_recipe_says_what_it_is(entry) -> None:
    about = About.of(entry.value)
    assert about.title
    assert about.source
    assert about.idea.endswith(".")
    assert about.page.startswith("## Equations\n\n```text\n")
