"""The pytest plugin and `kvcomp verify`: what a plugin author and a user run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from kvcomp.cli import app

PLUGIN = '''
import kvcomp
from kvcomp_strategies.selectors.top_k import TopK


class Greedy(TopK, use="greedy"):
    """One slot more than allotted."""

    def select(self, layer, scores, slots):
        return super().select(layer, scores, (slots + 1).minimum(layer.valid.sum(dim=-1)))


class Needy(TopK, use="needy"):
    """Needs a number."""

    depth: int


@kvcomp.hookimpl
def kvcomp_parts():
    return [Greedy, Needy]
'''


@pytest.fixture
def installed(tmp_path: Path) -> Path:
    """Make an installed distribution that registers a part which keeps too much, and one that needs settings."""
    info = tmp_path / "kvcomp_greedy-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: kvcomp-greedy\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[kvcomp]\ngreedy = kvcomp_greedy\n")
    (tmp_path / "kvcomp_greedy.py").write_text(PLUGIN)
    (tmp_path / "empty").mkdir()
    return tmp_path


def conformance(site: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join([str(site), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    options = ["-q", "-p", "no:cacheprovider", "-p", "kvcomp_pytest", "--rootdir", str(site / "empty")]
    command = [sys.executable, "-m", "pytest", *options, *arguments, str(site / "empty")]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, cwd=site)


def test_every_promise_of_every_thing_of_a_package_is_one_test(installed: Path) -> None:
    done = conformance(
        installed, "--kvcomp-conformance", "kvcomp-greedy", "-k", "exact-slots or finite or needy", "-rs"
    )
    assert done.returncode == 1, done.stdout + done.stderr
    assert "1 failed, 1 passed, 1 skipped" in done.stdout
    assert "Greedy on seed 0" in done.stdout
    assert "breaks the promise 'exact-slots'" in done.stdout
    assert "see it again with seeds=[0] or make_sample(0, (" in done.stdout
    assert "gives depth; pass an instance" in done.stdout
    assert "Traceback" not in done.stdout


def test_the_setting_of_pytest_does_the_same_and_names_who_registers_something(installed: Path) -> None:
    (installed / "empty" / "pytest.ini").write_text("[pytest]\nkvcomp_conformance = kvcomp-gredy\n")
    done = conformance(installed)
    assert done.returncode == 4, done.stdout + done.stderr
    assert "no installed package 'kvcomp-gredy' has parts or recipes; these have: kvcomp, kvcomp-greedy" in done.stderr


def test_without_a_package_it_does_nothing_and_imports_nothing(installed: Path) -> None:
    (installed / "empty" / "test_it.py").write_text("import sys\ndef test():\n    assert 'kvcomp' not in sys.modules\n")
    done = conformance(installed)
    assert "1 passed" in done.stdout, done.stdout + done.stderr


def verify(*arguments: str) -> Any:
    return CliRunner().invoke(app, ["verify", *arguments])


def test_verify_writes_one_json_document_and_exits_with_0_where_nothing_is_broken() -> None:
    done = verify("h2o", "--feature", "bytes", "--feature", "new-media", "--json")
    assert done.exit_code == 0, done.stderr
    document = json.loads(done.stdout)
    assert [(cell["feature"], cell["verdict"]) for cell in document["cells"]] == [
        ("bytes", "green"),
        ("new-media", "dash"),
    ]
    assert document["versions"]["transformers"]


def test_verify_shows_a_table_with_the_reason_of_each_dash() -> None:
    done = verify("h2o", "snapkv", "--feature", "new-media")
    assert done.exit_code == 0, done.stderr
    assert done.stdout.splitlines()[:3] == ["llama", "feature    h2o  snapkv", "new-media  -    -"]
    assert "new-media (llama: every method): the family takes text alone" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("h2oo",), "Did you mean 'h2o'"),
        (("h2o", "--model", "lama"), "Did you mean 'llama'"),
        (("h2o", "--feature", "byte"), "Did you mean 'bytes'"),
    ],
)
def test_verify_refuses_unknown_names(arguments: tuple[str, ...], message: str) -> None:
    done = verify(*arguments)
    assert done.exit_code == 2
    assert message in " ".join(done.stderr.split())
