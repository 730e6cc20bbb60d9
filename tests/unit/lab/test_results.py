from __future__ import annotations

import json
from dataclasses import replace

from synthetic_results import synthetic_configurations, synthetic_result


def test_everything_that_determines_a_result_is_in_its_key() -> None:
    (base,) = synthetic_configurations(("flowmm",), tasks=("mini/recall",), budgets=(0.5,))
    changes: list[dict[str, object]] = [
        {"model": "other"},
        {"task": "other"},
        {"query_mode": "question_later"},
        {"strategy": "other"},
        {"budget": 0.25},
        {"budget": "512t"},
        {"seed": 1},
        {"settings": {"policy.threshold": 0.1}},
        {"details": {"checkpoint": "abd"}},
    ]
    keys = {synthetic_result(replace(base, **change), 0).key for change in changes}  # type: ignore[arg-type]
    keys |= {synthetic_result(base, 0).key, synthetic_result(base, 1).key, synthetic_result(base, 0, digest="x").key}
    assert len(keys) == len(changes) + 3
    same = replace(base, details=dict(base.details))
    assert synthetic_result(same, 0, prediction="other").key == synthetic_result(base, 0).key


def test_rows_are_plain() -> None:
    (configuration,) = synthetic_configurations(("flowmm",), tasks=("a",), budgets=(0.5,), settings=({"x.y": 1},))
    row = synthetic_result(configuration, 3, retention=((0.5, 1.0),)).row()
    assert json.loads(row["retention"]) == [[0.5, 1.0]]
    assert json.loads(row["settings"]) == {"x.y": 1}
    assert configuration.label == "flowmm x.y=1"
    assert all(isinstance(value, str | int | float | None) for value in row.values())
