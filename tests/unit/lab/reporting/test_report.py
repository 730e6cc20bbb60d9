"""Tables, figures and pages of a report, from results that a seed made."""

import csv
import html
import re
from dataclasses import replace

import pytest
from pages import parse
from synthetic_results import synthetic_configurations, write_synthetic

from kvcomp.lab.reporting.findings import find
from kvcomp.lab.reporting.forms import to_latex, to_markdown
from kvcomp.lab.reporting.tables import Entry
from kvcomp.lab.reporting.web import to_html
from kvcomp.lab.reporting.writing import write_report

VARIANTS = ("full", "flowmm", "flowmm-no-flow", "flowmm-no-gate")
HOSTILE = (
    "</td></table><script>alert(1)</script><img src=http://example.org/a.png>",
    "\\input{/etc/passwd} $x$ 50 % & | `a` \\end{tabular}",
    "\u202e\u05e9\u05dc\u05d5\u05dd\u202d ![a](http://example.org/b.png)",
    "x" * 100_000,
)


@pytest.fixture(scope="module")
def findings(tmp_path_factory):
    folder = tmp_path_factory.mktemp("study")
    return find(write_synthetic(folder, synthetic_configurations(VARIANTS), samples=30))


def named(findings, start):
    return [table for table in findings.tables if table.name.startswith(start)]


def test_the_main_table_has_a_column_per_task_their_average_and_the_distance_to_full(findings):
    tables = named(findings, "main ")
    assert [re.search(r"of ([\d.]+%)", table.title)[1] for table in tables] == ["10%", "20%", "50%"]
    table = tables[0]
    assert table.head == ("Method", "mini/recall", "mini/needle", "Average", "Δ to full")
    assert [row[0].text for row in table.body] == list(VARIANTS)
    shown = {row[0].text: row for row in table.body}
    right = [
        result.exact_match
        for result in findings.study.results
        if (result.configuration.strategy, result.configuration.budget) == ("flowmm", 0.1)
        and result.configuration.task == "mini/recall"
    ]
    assert shown["flowmm"][1].text == f"{100 * sum(right) / 30:.1f}"
    average = (float(shown["flowmm"][1].text) + float(shown["flowmm"][2].text)) / 2
    assert float(shown["flowmm"][3].text) == pytest.approx(average, abs=0.06)
    assert float(shown["flowmm"][4].text) == pytest.approx(average - 100, abs=0.06)
    assert shown["flowmm"][3].mark == -1
    assert shown["full"][4] == Entry("-")


def test_a_task_that_was_not_learned_is_marked_and_left_out_of_the_average(tmp_path):
    found = find(write_synthetic(tmp_path, unlearned=["mini/needle"]))
    table = found.tables[0]
    assert table.head[1:4] == ("mini/recall", "mini/needle†", "Average")
    assert "† Not learned by the model" in table.caption
    assert all(line[1].text == line[3].text for line in table.body)
    assert "mini/needle$\\dagger$" in to_latex(found)


def test_nothing_is_bold_among_arms_that_a_coin_decides(findings):
    assert not any(entry.bold for table in findings.tables for row in table.body for entry in row)


def test_variants_of_a_strategy_have_a_table_with_intervals(findings):
    table = named(findings, "ablation flowmm")[0]
    assert [row[0].text for row in table.body] == list(VARIANTS)
    assert re.fullmatch(r"[+-]\d+\.\d to [+-]\d+\.\d", table.body[2][1].note)
    assert table.body[1][1].note == ""


def test_a_field_with_several_values_has_a_table_of_its_own(tmp_path):
    settings = ({"policy.threshold": 0.1}, {"policy.threshold": 0.3})
    made = synthetic_configurations(("full", "flowmm"), budgets=(0.2,), settings=settings)
    (table,) = named(find(write_synthetic(tmp_path, made, samples=5)), "sweep")
    assert table.head == ("policy.threshold", "0.1", "0.3")
    assert [row[0].text for row in table.body] == ["mini/recall", "mini/needle", "Average"]


def test_figures_hold_the_numbers_that_they_draw(findings):
    plots = {plot.name.partition("-")[0]: plot for plot in findings.plots}
    assert set(plots) == {"budget", "rho", "pareto", "time", "depth"}
    assert {row["layer"] for row in plots["rho"].rows} == {0, 1, 2, 3}
    assert {row["depth"] for row in plots["depth"].rows} == {0.0, 0.25, 0.5, 0.75, 1.0}
    assert all(row["low"] <= row["score"] <= row["high"] for row in plots["budget"].rows)
    drawn = plots["budget"].draw()
    lines = {line.get_label(): line for line in drawn.get_axes()[0].get_lines()}
    own = [row for row in plots["budget"].rows if (row["task"], row["strategy"]) == ("mini/recall", "flowmm")]
    assert list(lines["flowmm"].get_xdata()) == [10, 20, 50]
    assert list(lines["flowmm"].get_ydata()) == pytest.approx([100 * row["score"] for row in own])


def test_the_front_is_what_nothing_beats(findings):
    (plot,) = (plot for plot in findings.plots if plot.name.startswith("pareto"))
    for row in plot.rows:
        better = [o for o in plot.rows if o["share_of_bytes"] <= row["share_of_bytes"] and o["score"] >= row["score"]]
        strictly = [o for o in better if (o["share_of_bytes"], o["score"]) != (row["share_of_bytes"], row["score"])]
        assert row["front"] == (not strictly)


def test_following_the_flow_is_held_against_defying_it(tmp_path):
    made = []
    for entry in synthetic_configurations(("full", "flowmm", "flowmm-misaligned"), budgets=(0.2,)):
        use = {"flowmm": "flow-guided", "flowmm-misaligned": "misaligned"}.get(entry.strategy, "uniform")
        entry.details["strategy"] = {"policy": {"use": use, "threshold": 0.25}}
        made.append(entry)
    found = find(write_synthetic(tmp_path, made, samples=10))
    (plot,) = (plot for plot in found.plots if plot.name.startswith("alignment"))
    assert [(row["strategy"], row["against"], row["task"]) for row in plot.rows] == [
        ("flowmm", "flowmm-misaligned", "mini/recall"),
        ("flowmm", "flowmm-misaligned", "mini/needle"),
    ]


def test_a_killed_run_makes_a_report_that_says_what_is_missing(tmp_path):
    study = write_synthetic(tmp_path, samples=20, made=7)
    found = find(study)
    assert "This report is partial: 98 of 280 answers are there" in found.state
    for text in (to_markdown(found), " ".join(parse(to_html(found)).text)):
        assert "13 lacking" in text
        assert "Incomplete" in text
    none = find(write_synthetic(tmp_path / "none", samples=20, made=0))
    assert "0 of 280" in none.state
    assert none.tables == ()
    assert parse(to_html(none)).text


def test_results_of_another_plan_are_counted_and_left_out(findings):
    assert "left out" not in findings.state
    earlier = replace(findings, study=replace(findings.study, stale=1200))
    assert earlier.state.endswith("the folder holds 1,200 of another plan, model, version or sample, left out here.")
    assert earlier.state in html.unescape(to_html(earlier))


def test_what_was_refused_is_named_with_its_reason(tmp_path):
    study = write_synthetic(tmp_path, samples=2)
    refused = study.planned[1].configuration
    study.skipped[refused.id] = "at least 0.3"
    found = find(study)
    assert found.refused == ((refused, "at least 0.3"),)
    assert "at least 0.3" in to_html(found)
    assert "at least 0.3" in to_markdown(found)


@pytest.mark.parametrize("text", HOSTILE, ids=["html", "latex", "right-to-left", "long"])
def test_hostile_texts_neither_break_nor_escape_the_report(text, tmp_path):
    made = synthetic_configurations(
        ("full", "flowmm", text[:3000]), tasks=("mini/recall", text[:3000]), model=text[:3000]
    )
    study = write_synthetic(tmp_path, made, samples=4, prediction=text, reference=text)
    written = write_report(study, tmp_path / "out")
    page = (tmp_path / "out" / "report.html").read_text()
    parser = parse(page)
    assert not parser.tags & {"script", "img", "iframe", "a href"}
    assert not re.search(r'(?:src|href)="(?!#)', page)
    assert "\u202e" not in page
    assert len(page) < 2_000_000
    tables = (tmp_path / "out" / "report.tex").read_text()
    assert tables.count("\\begin{tabular}") == tables.count("\\end{tabular}") == len(written.findings.tables)
    assert "\\input" not in tables.replace("\\textbackslash{}input", "")
    lines = (tmp_path / "out" / "report.md").read_text().splitlines()
    rows = [line for line in lines if line.startswith("|")]
    assert rows
    assert max(map(len, rows)) < 2000
    assert "http://example.org/a.png>" not in "\n".join(lines)
    assert not re.search(r"(?<!\\)!\[a", "\n".join(lines))
    with (tmp_path / "out" / "results.csv").open(newline="") as file:
        assert {row["prediction"] for row in csv.DictReader(file)} == {text}
    outside = [path for path in tmp_path.rglob("*.png") if path.parent != tmp_path / "out" / "figures"]
    assert outside == []


def test_the_same_results_give_the_same_report(findings):
    again = find(findings.study)
    assert to_html(findings) == to_html(again)
    assert to_latex(findings) == to_latex(again)
