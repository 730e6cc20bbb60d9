"""The ready-made ablations are sound files that name what is there."""

from __future__ import annotations

import pytest

from kvcomp.core.errors import InputError
from kvcomp.lab.ablation import make_variants, read_file
from kvcomp.lab.milebench.source import TaskFolder
from kvcomp.lab.studies import FOLDER, find_study, study_names

SMALL = [name for name in study_names() if "-" not in name]
REAL = [name for name in study_names() if "-" in name]


@pytest.mark.parametrize("name", study_names())
def test_a_study_has_no_fault(name: str) -> None:
    faults: list[str] = []
    file = read_file(find_study(name))
    variants = make_variants(file, FOLDER, faults)
    assert faults == []
    assert variants[0].name == "full"
    assert file.note


def test_every_study_has_one_for_a_real_model_with_the_same_grid() -> None:
    assert [f"{name}-qwen2.5-vl" for name in SMALL] == REAL
    for small, real in zip(SMALL, REAL, strict=True):
        one, other = read_file(find_study(small)), read_file(find_study(real))
        assert (one.strategies, one.grid) == (other.strategies, other.grid)


@pytest.mark.parametrize("name", REAL)
def test_a_real_study_states_its_context_policy(name: str) -> None:
    (folder,) = read_file(find_study(name)).tasks
    assert isinstance(folder, TaskFolder)
    assert folder.cuts


def test_a_study_is_found_by_name_and_a_file_by_path() -> None:
    assert find_study("table1") == FOLDER / "table1.yaml"
    assert find_study(str(FOLDER / "table3.yaml")) == FOLDER / "table3.yaml"
    with pytest.raises(InputError, match="Did you mean 'table1'"):
        find_study("tabel1")
