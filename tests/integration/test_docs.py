"""What the documentation shows is what runs: every snippet is a file, every file runs, every output is compared."""

from __future__ import annotations

import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import kvcomp

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
SNIPPETS = DOCS / "snippets"
PAGES = sorted(path for path in DOCS.rglob("*.md") if SNIPPETS not in path.parents)
SCRIPTS = sorted(SNIPPETS.glob("*.py"))
NUMBER = re.compile(r"\d+(?:\.\d+)?")


@pytest.fixture
def output(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """Return a function that runs a script in this process, as `python script.py` would, and gives what it printed."""

    def run(script: Path) -> str:
        monkeypatch.syspath_prepend(script.parent)
        capsys.readouterr()
        runpy.run_path(str(script), run_name="__main__")
        return capsys.readouterr().out

    return run


def masked(text: str) -> str:
    """Return text without its times, its numbers replaced, and its white space and rules made even."""
    text = re.sub(r"compressed in [\d.]+ ms", "compressed in - ms", text)
    return " ".join(re.sub(r"[━─┏┓┗┛┃│┡┩└┘┳┻╇┴╈]+", " ", NUMBER.sub("0", text)).split())


def numbers(text: str) -> list[float]:
    """Return all numbers in a text but the times."""
    return [float(found) for found in NUMBER.findall(re.sub(r"compressed in [\d.]+ ms", "", text))]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_snippet_runs_and_prints_what_the_page_shows(script: Path, output):
    printed = output(script)
    shown = script.with_suffix(".txt")
    if shown.exists():
        same = masked(printed) == masked(shown.read_text())
        same = same and numbers(printed) == pytest.approx(numbers(shown.read_text()), rel=0.02)
        assert same, f"{shown.name} is out of date; look at this output, then run `make snippets`:\n{printed}"


@pytest.mark.parametrize("script", sorted(SNIPPETS.glob("*.sh")), ids=lambda path: path.stem)
def test_shell_snippet_runs(script: Path, tmp_path: Path):
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = os.environ | {"PATH": path, "OMP_NUM_THREADS": "1", "SNIPPETS": str(SNIPPETS)}
    done = subprocess.run(
        ["bash", "-euo", "pipefail", str(script)], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("path", sorted(SNIPPETS.glob("*.yaml")), ids=lambda path: path.stem)
def test_strategy_snippet_is_a_strategy(path: Path):
    assert kvcomp.strategy(path).selector is not None


@pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(DOCS)))
def test_pages_include_code_and_never_retype_it(page: Path):
    blocks = re.findall(r"^ *```(?:python|yaml|toml|bash)[^\n]*\n(.*?)```", page.read_text(), re.DOTALL | re.MULTILINE)
    typed = [block for block in blocks if "--8<--" not in block]
    assert not typed, f"put this into docs/snippets or examples, and include it: {typed}"


def test_every_snippet_is_shown():
    text = "".join(page.read_text() for page in PAGES)
    helpers = {"tiny_model.py"}  # imported by snippets
    hidden = [path.name for path in SNIPPETS.iterdir() if path.is_file() and path.name not in text]
    assert sorted(set(hidden) - helpers) == []


def readme_blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", (ROOT / "README.md").read_text(), re.DOTALL | re.MULTILINE)


def test_readme_example_runs(tmp_path: Path, output):
    (block,) = readme_blocks("python")
    assert len([line for line in block.splitlines() if line.strip()]) <= 12
    script = tmp_path / "readme.py"
    script.write_text(block)
    assert "flowmm at budget 0.2" in output(script)


def test_readme_yaml_is_the_recipe_flowmm():
    (block,) = readme_blocks("yaml")
    document = yaml.safe_load(block)
    assert kvcomp.strategy({"name": "flowmm"} | document) == kvcomp.strategy("flowmm")


def test_readme_names_every_recipe():
    text = (ROOT / "README.md").read_text()
    recipes = [path.stem for path in (ROOT / "strategies/kvcomp_strategies/recipes").glob("*.yaml")]
    assert [name for name in recipes if f"`{name}`" not in text] == []


def test_readme_shows_the_averages_of_the_results_page():
    """There the average stands in front of the last column, and the two tables follow each other."""
    page = (DOCS / "explanation" / "results.md").read_text().split("## Table 1")[1].split("\n## ")[0]
    averages = re.findall(r"^\| `(\S+)` \|.*\| \**([\d.]+)\**(?: ▼)? \| [^|]+\|$", page, re.MULTILINE)
    half = len(averages) // 2
    found = [(name, seen, dict(averages[half:])[name]) for name, seen in averages[:half]]
    readme = (ROOT / "README.md").read_text()
    assert sorted(re.findall(r"^\| `([^`]+)`.* \| ([\d.]+) \| ([\d.]+) \|$", readme, re.MULTILINE)) == sorted(found)


@pytest.mark.parametrize("name", ["README.md", "CONTRIBUTING.md", "CHANGELOG.md"])
def test_relative_links_of_the_root_pages_lead_somewhere(name: str):
    links = re.findall(r"\]\((?!https?:|#)([^)#]+)", (ROOT / name).read_text())
    assert [link for link in links if not (ROOT / link).exists()] == []
