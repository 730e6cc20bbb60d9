"""The report is one page: nothing is loaded, everything is escaped."""

import json
import re

from pages import parse

from kvcomp.lab.comparison_page import format_rho, render_report


def test_the_page_shows_every_recipe_budget_and_task(document):
    text = " ".join(parse(render_report(document)).text)
    for shown in ("full", "good", "bad", "budget 0.2", "0.25", "rho", "0.1.0", "2 hardware"):
        assert shown in text


def test_names_are_escaped_wherever_they_appear(document):
    renamed = json.loads(json.dumps(document).replace('"good"', '"<script>alert(1)</script>"'))
    renamed["testbed"] = renamed["tasks"][0] = "<b>&"
    renamed["skipped"] = [{"recipe": "<i>", "budget": 0.1, "reason": "<img src=x>"}]
    page = render_report(renamed)
    parser = parse(page)
    assert not parser.tags & {"script", "b", "i", "img"}
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page


def test_the_page_loads_nothing_and_follows_the_colour_scheme(document):
    page = render_report(document)
    assert not re.search(r'(?:src|href)="(?!#)', page)
    assert "@import" not in page
    assert not re.search(r"url\((?!#)", page)
    assert "prefers-color-scheme: dark" in page
    assert "currentColor" in page


def test_without_rho_there_is_no_section_for_it(document):
    document["rows"] = [row | {"rho": [None, None]} for row in document["rows"]]
    assert "Flow between modalities" not in render_report(document)


def test_the_same_document_gives_the_same_page(document):
    assert render_report(document) == render_report(document)


def test_rho_is_short():
    assert format_rho([0.126, None, 1.0]) == "0.13 - 1.00"
