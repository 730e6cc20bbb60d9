"""Results of the tests of families, as the page of models reads them."""

import json
from xml.etree import ElementTree

import family_results
import pytest

from kvcomp.testing.families import FAMILIES

CASES = """
<testsuites><testsuite>
  <testcase name="test_a_full_budget_is_stock_to_the_bit[qwen2.5-vl]"/>
  <testcase name="test_a_second_turn_follows_the_first[qwen2.5-vl]"><skipped/></testcase>
  <testcase name="test_every_recipe_runs_on_every_family[streaming-llm-qwen2.5-vl]"/>
  <testcase name="test_every_recipe_runs_on_every_family[look-m-qwen2.5-vl]"><failure/></testcase>
  <testcase name="test_every_recipe_runs_on_every_family[kvzip-qwen2.5-vl]"><skipped/></testcase>
  <testcase name="test_what_cannot_work_is_refused_with_the_reason[mllama-settings2-cross-attention]"/>
  <testcase name="test_there_are_families_enough"/>
</testsuite></testsuites>"""


def test_outcomes_are_told_by_family_and_recipe(tmp_path) -> None:
    (tmp_path / "results.xml").write_text(CASES)
    family_results.main(str(tmp_path / "results.xml"), str(tmp_path / "families.json"))
    document = json.loads((tmp_path / "families.json").read_text())
    assert document["families"] == {
        "qwen2.5-vl": {
            "stock": "passed",
            "turns": "skipped",
            "recipes": {"streaming-llm": "passed", "look-m": "failed", "kvzip": "skipped"},
        }
    }
    assert document["refused"] == {"mllama": {"reason": "cross-attention", "outcome": "passed"}}
    assert set(document["versions"]) == {"kvcomp", "torch", "transformers"}


def test_results_without_the_slow_tests_are_refused(tmp_path) -> None:
    fast = ElementTree.fromstring(CASES)
    for case in list(fast[0]):
        if "every_recipe" in case.attrib["name"]:
            fast[0].remove(case)
    ElementTree.ElementTree(fast).write(tmp_path / "results.xml")
    with pytest.raises(SystemExit, match=r"slow tests too; without recipes: qwen2\.5-vl"):
        family_results.main(str(tmp_path / "results.xml"), str(tmp_path / "families.json"))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_recipe_and_a_family_with_dashes_are_told_apart(family) -> None:
    assert family_results.parameters_of(f"kvcomp-global-merge-{family}") == ("kvcomp-global-merge", family)
