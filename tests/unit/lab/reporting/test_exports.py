from __future__ import annotations

import csv
from pathlib import Path

from synthetic_results import write_synthetic

from kvcomp.lab.reporting.exports import write_csv


def test_the_table_has_one_line_per_result_and_survives_hostile_text(tmp_path: Path) -> None:
    hostile = '<script>, "quoted"\n\\textbf{x} \u202eabc'
    study = write_synthetic(tmp_path, samples=2, prediction=hostile)
    write_csv(study.results, tmp_path / "results.csv")
    with (tmp_path / "results.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    head = ["model", "task", "query_mode", "strategy", "budget", "seed", "sample", "prediction", "reference"]
    head += ["exact_match", "kv_bytes"]
    assert list(rows[0])[: len(head)] == head
    assert [int(row["sample"]) for row in rows] == [result.sample for result in study.results]
    assert {row["prediction"] for row in rows} == {hostile}
    assert {float(row["budget"]) for row in rows if row["strategy"] == "full"} == {1.0}
    assert sum(int(row["exact_match"]) for row in rows) == sum(result.exact_match for result in study.results)
    assert rows[0]["answer_nll"] == ""
