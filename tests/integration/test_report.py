"""`kvcomp report` from the command line to its files, and the page in a browser."""

import csv
import json

import pytest
from browser import needs_chromium, opened
from PIL import Image
from synthetic_results import synthetic_configurations, write_synthetic
from typer.testing import CliRunner

from kvcomp.cli import app
from kvcomp.lab.reporting.exports import CSV_COLUMNS


def report(*arguments: object):
    return CliRunner().invoke(app, ["report", *map(str, arguments)])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("study")
    write_synthetic(folder, synthetic_configurations(("full", "flowmm", "recency")), samples=20)
    return folder


@pytest.fixture(scope="module")
def made(folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("reports") / "new"
    result = report(folder, "--out", out)
    assert result.exit_code == 0, result.stderr
    return out, result.stdout


def test_every_file_is_there_and_every_figure_as_png_and_csv(made):
    out, _ = made
    names = {path.name for path in out.iterdir()} - {"results.parquet"}
    assert names == {"report.html", "report.md", "report.tex", "results.csv", "comparisons.csv", "figures"}
    figures = sorted(path.stem for path in (out / "figures").glob("*.png"))
    assert figures == sorted(path.stem for path in (out / "figures").glob("*.csv"))
    assert len(figures) == 5
    for path in (out / "figures").glob("*.png"):
        with Image.open(path) as image:
            assert image.width > 500
        assert f"](figures/{path.name})" in (out / "report.md").read_text()


def test_the_table_of_all_results_has_a_line_per_sample(made):
    with (made[0] / "results.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == list(CSV_COLUMNS)
    assert len(rows) == 2 * 20 * (1 + 2 * 3)
    assert all(row["sample"].isdigit() for row in rows)


def test_the_terminal_shows_the_main_tables(made):
    _, shown = made
    assert "Performance at a budget of 10%: minimile-xs, question seen" in shown
    assert "All 280 answers are there." in shown
    assert shown.rstrip().endswith(f"See {made[0] / 'report.html'}")


def test_json_is_one_document_with_every_comparison(folder, tmp_path):
    result = report(folder, "--out", tmp_path, "--baseline", "recency", "--json")
    document = json.loads(result.stdout)
    assert (document["baseline"], document["answered"], document["planned"]) == ("recency", 280, 280)
    flowmm = [row for row in document["comparisons"] if row["strategy"] == "flowmm"]
    assert {(row["against"], row["against_budget"] == row["budget"]) for row in flowmm} == {("recency", True)}
    assert all(row["p"] <= row["p_holm"] <= 1 for row in document["comparisons"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--baseline", "recensy"], "no strategy named 'recensy' in these results. Did you mean 'recency'?"),
        (["--out", "/dev/null/report"], "the report cannot be written to /dev/null/report"),
    ],
)
def test_faults_exit_with_2(folder, arguments, message):
    result = report(folder, *arguments)
    assert result.exit_code == 2
    assert message in result.stderr


def test_a_folder_without_results_is_named(tmp_path):
    result = report(tmp_path)
    assert result.exit_code == 2
    assert "holds results.sqlite" in result.stderr


def test_parquet_has_the_rows_of_the_table(folder, tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet", reason="pyarrow is not installed")
    report(folder, "--out", tmp_path)
    table = parquet.read_table(tmp_path / "results.parquet")
    assert table.column_names == list(CSV_COLUMNS)
    assert table.num_rows == 280


def test_without_pyarrow_the_report_says_how_to_get_it(folder, tmp_path, monkeypatch):
    monkeypatch.setattr("kvcomp.lab.reporting.writing.has_pyarrow", lambda: False)
    result = report(folder, "--out", tmp_path)
    assert "No results.parquet: it needs pyarrow, `pip install 'kvcomp[parquet]'`." in result.stdout
    assert not (tmp_path / "results.parquet").exists()


@needs_chromium
def test_the_page_in_a_browser(made, tmp_path):
    page = made[0] / "report.html"
    with opened(page, tmp_path) as tab:
        for width in (375, 1440):
            for dark in (False, True):
                tab.resize(width, dark=dark)
                assert tab.overflow() <= 0
        assert tab.evaluate("document.querySelectorAll('figure svg').length") == 5
        ink = tab.evaluate("getComputedStyle(document.querySelector('svg text')).fill")
        tab.resize(1440, dark=False)
        assert tab.evaluate("getComputedStyle(document.querySelector('svg text')).fill") != ink
        assert tab.evaluate("document.querySelectorAll('td.down').length") > 3
        assert tab.complaints == []
        assert [address for address in tab.requests if not address.startswith("data:")] == [page.as_uri()]
