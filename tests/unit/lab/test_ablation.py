from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from kvcomp.core.errors import ConfigError
from kvcomp.lab.ablation import AblationFile, Variant, make_variants, parse_document
from kvcomp.lab.batches import QueryMode

GOOD = {"models": ["m"], "tasks": ["recall"], "samples": 3, "strategies": ["flowmm"]}


def variants(tmp_path: Path, **settings: Any) -> list[Variant]:
    faults: list[str] = []
    found = make_variants(parse_document(GOOD | settings, "file"), tmp_path, faults)
    if faults:
        raise ConfigError(faults, "file")
    return found


def points(found: list[Variant]) -> list[tuple[str, dict[str, Any], float | str]]:
    return [(each.name, dict(each.settings), each.budget) for each in found]


def test_what_is_left_out_has_a_default() -> None:
    file = parse_document(GOOD, "file")
    assert (file.seed, file.modes, file.grid, file.max_new_tokens) == ([0], [QueryMode.question_seen], {}, None)


def test_one_thing_is_a_list_of_one() -> None:
    file = parse_document(GOOD | {"models": "m", "tasks": "all", "seed": 3, "query_modes": "question_later"}, "file")
    assert (file.models, file.tasks, file.seed, file.query_modes) == (["m"], ["all"], [3], ["question_later"])


def test_every_strategy_is_asked_at_every_point_that_changes_it(tmp_path: Path) -> None:
    found = variants(
        tmp_path,
        strategies=["full", "flowmm", "snapkv"],
        grid={"budget": [0.1, "64t"], "policy.threshold": [0.2, 0.4]},
    )
    assert points(found) == [
        ("full", {}, 1.0),
        *[("flowmm", {"policy.threshold": t}, b) for b in (0.1, "64t") for t in (0.2, 0.4)],
        ("snapkv", {}, 0.1),
        ("snapkv", {}, "64t"),
    ]
    flowmm = found[2].method.strategy
    assert (float(flowmm.budget.ratio), flowmm.policy.threshold) == (0.1, 0.4)  # type: ignore[arg-type, union-attr]


def test_without_a_budget_in_the_grid_each_strategy_has_its_own(tmp_path: Path) -> None:
    assert points(variants(tmp_path, strategies=["flowmm", "no-context", "oracle"])) == [
        ("flowmm", {}, 0.2),
        ("no-context", {}, 1.0),
        ("oracle", {}, 0.2),
    ]


def test_a_strategy_is_a_name_a_file_or_a_mapping(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("base: flowmm\nset: {policy: {use: uniform}}\n")
    inline = {"base": "flowmm", "name": "flowmm-no-gate-here", "set": {"matcher": {"use": "nearest"}}}
    found = variants(tmp_path, strategies=["mine.yaml", inline], grid={"budget": [0.5]})
    assert [each.name for each in found] == ["mine", "flowmm-no-gate-here"]
    assert found[0].method.strategy.policy.use == "uniform"
    assert found[1].method.strategy.matcher.use == "nearest"


def test_a_part_can_be_replaced_by_the_grid(tmp_path: Path) -> None:
    found = variants(tmp_path, grid={"merger": ["mean", "pivot-mean"]})
    assert [each.method.strategy.merger.use for each in found] == ["mean", "pivot-mean"]


def test_points_that_come_to_the_same_are_one(tmp_path: Path) -> None:
    assert len(variants(tmp_path, grid={"budget": [0.2, 0.2], "turns": ["recompress"]})) == 1


def test_all_faults_of_the_form_come_at_once() -> None:
    wrong: dict[str, Any] = {
        "model": "m",
        "tasks": [],
        "samples": 0,
        "seed": -1,
        "strategies": [3],
        "query_modes": ["seen"],
        "grid": {"budget": []},
        "models": [{"model": "m", "devise": "cpu"}],
        "budgets": [0.2],
    }
    with pytest.raises(ConfigError) as error:
        parse_document(wrong, "file.yaml")
    text = str(error.value)
    assert "file.yaml has" in text
    for part in (
        "model: no such key. Did you mean 'models'?",
        "models[0].devise: no such key. Did you mean 'device'?",
        "budgets: no such key; budgets are part of the grid, as `grid: {budget: [0.1, 0.2]}`",
        "tasks:",
        "samples: input should be greater than or equal to 1, got 0",
        "seed[0]:",
        "strategies[0]:",
        "query_modes[0]: must be 'question_seen' or 'question_later', got 'seen'",
        "grid.budget:",
    ):
        assert part in text


def test_what_must_be_given_is_named() -> None:
    with pytest.raises(ConfigError) as error:
        parse_document({"models": ["m"]}, "file")
    assert error.value.faults == ("samples: must be given", "strategies: must be given", "tasks: must be given")


def test_all_faults_of_strategies_and_grid_come_at_once(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as error:
        variants(tmp_path, strategies=["flowm", {"base": "flowmm", "set": {"scorer.proxis": 3}}, {"policy": "unifrm"}])
    text = str(error.value)
    assert "strategies[0]: no strategy named 'flowm'. Did you mean 'flowmm'?" in text
    assert "strategies[1]: scorer" in text
    assert "'proxies'" in text
    assert "strategies[2]: policy" in text
    with pytest.raises(ConfigError) as error:
        variants(tmp_path, grid={"policy.treshold": [0.1], "policy.threshold": [0.1, 7], "budget": [0.1, 3]})
    text = str(error.value)
    assert "grid.policy.treshold: no strategy of this file has such a field. Did you mean 'policy.threshold'?" in text
    assert "grid.policy.threshold[1]" in text
    assert "grid.budget[1]" in text


def test_two_strategies_of_one_name_are_a_fault(tmp_path: Path) -> None:
    same = {"base": "flowmm", "name": "flowmm", "set": {"matcher": "nearest"}}
    with pytest.raises(ConfigError, match="2 of them are named 'flowmm'"):
        variants(tmp_path, strategies=["flowmm", same])


def test_the_file_survives_its_own_json() -> None:
    file = parse_document(GOOD | {"tasks": ["milebench:data#IEdit", {"folder": "data"}]}, "file")
    assert AblationFile.model_validate(file.model_dump(mode="json")) == file
