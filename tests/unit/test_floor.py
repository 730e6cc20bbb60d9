"""The oldest transformers that the tests run with is the oldest that an installation may have."""

import tomllib
from pathlib import Path

from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[2]


def pinned(name: str) -> dict[str, str]:
    lines = (ROOT / name).read_text(encoding="utf-8").splitlines()
    return dict(line.split("==") for line in lines if not line.startswith("#"))


def test_the_floor_is_the_lower_bound_of_the_package():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    required = {made.name: made.specifier for made in map(Requirement, project["dependencies"])}
    floor = pinned("constraints-floor.txt")
    bounds = [bound.version for bound in required["transformers"] if bound.operator == ">="]
    assert [floor["transformers"].rsplit(".", 1)[0]] == bounds
    assert all(required[name].contains(version) for name, version in floor.items())


def test_the_floor_is_older_than_what_is_pinned():
    newest, floor = pinned("constraints.txt"), pinned("constraints-floor.txt")
    assert floor.keys() <= newest.keys()
    assert all(floor[name] != newest[name] for name in floor)
