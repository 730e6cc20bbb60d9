"""A third-party package, installed beside kvcomp, works through the command line, a file and `compress()`; a broken
one is named and skipped."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from kvcomp import PluginWarning
from kvcomp.core.registry import Registry

HELLO = Path(__file__).parents[2] / "examples" / "hello-plugin"


def run(*arguments: str | Path, path: Path) -> subprocess.CompletedProcess[str]:
    """Run Python in a process whose import path starts with `path`, every warning on stderr once."""
    environment = os.environ | {"PYTHONPATH": str(path), "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "default"}
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Install the plugin from a copy of its folder, with what the environment has: nothing is downloaded."""
    folder = tmp_path_factory.mktemp("hello")
    source = shutil.copytree(HELLO, folder / "source", ignore=shutil.ignore_patterns("__pycache__"))
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--no-build-isolation"]
    done = subprocess.run(
        [*pip, "--disable-pip-version-check", "--target", str(folder / "site"), str(source)],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return folder / "site"


def test_plugin_is_under_40_lines():
    lines = sum(len((HELLO / name).read_text().splitlines()) for name in ("pyproject.toml", "kvcomp_hello.py"))
    assert lines < 40


def test_list_names_the_parts_of_the_plugin_with_package_and_version(site: Path):
    done = run("-m", "kvcomp", "list", "--json", path=site)
    assert done.returncode == 0, done.stderr
    ours = [entry for entry in json.loads(done.stdout) if entry["package"] == "kvcomp-hello"]
    assert {(entry["kind"], entry["name"], entry["version"]) for entry in ours} == {
        ("scorer", "hello-key-norm", "0.1.0"),
        ("recipe", "hello", "0.1.0"),
    }


def test_a_file_that_uses_the_plugin_checks_out(site: Path):
    done = run("-m", "kvcomp", "check", HELLO / "flowmm-hello.yaml", path=site)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_same_file_without_the_plugin_is_refused(tmp_path: Path):
    done = run("-m", "kvcomp", "check", HELLO / "flowmm-hello.yaml", path=tmp_path)
    assert done.returncode == 2
    assert "no scorer named 'hello-key-norm'" in " ".join((done.stdout + done.stderr).split())


def test_compress_with_the_recipe_and_with_the_file(site: Path):
    done = run(HELLO / "use.py", path=site)
    assert done.returncode == 0, done.stderr
    assert "hello at budget 0.5" in done.stdout
    assert "flowmm-hello at budget 0.25" in done.stdout


def test_the_plugin_keeps_every_promise(site: Path):
    mine = ["--kvcomp-conformance", "kvcomp-hello", "-k", "every_promise or exact-slots or padded-batch"]
    options = ["-q", "-p", "no:cacheprovider", "-p", "kvcomp_pytest", *mine]
    done = run("-m", "pytest", *options, HELLO / "test_promises.py", path=site)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "5 passed" in done.stdout  # the file's own, and two promises each of the scorer and the recipe


@pytest.fixture
def broken(tmp_path: Path) -> Path:
    """Make an installed distribution whose entry point raises on import."""
    info = tmp_path / "kvcomp_broken-1.2.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: kvcomp-broken\nVersion: 1.2\n")
    (info / "entry_points.txt").write_text("[kvcomp]\nbroken = kvcomp_broken\n")
    (tmp_path / "kvcomp_broken.py").write_text("raise RuntimeError('no GPU on this farm')\n")
    return tmp_path


def test_a_broken_plugin_gives_one_warning_and_nothing_else_changes(broken: Path, monkeypatch: pytest.MonkeyPatch):
    before = Registry().entries()
    monkeypatch.syspath_prepend(broken)
    registry = Registry()
    with pytest.warns(PluginWarning) as caught:
        after = registry.entries()
    registry.entries()
    assert [str(warning.message) for warning in caught] == [
        "plugin 'broken' of kvcomp-broken 1.2 failed to load and was skipped: RuntimeError: no GPU on this farm"
    ]
    assert after == before


def test_the_command_line_survives_a_broken_plugin(broken: Path):
    done = run("-m", "kvcomp", "list", "--json", path=broken)
    assert done.returncode == 0, done.stderr
    assert "flowmm" in {entry["name"] for entry in json.loads(done.stdout)}
    assert " ".join(done.stderr.split()).count("kvcomp-broken 1.2 failed to load") == 1
