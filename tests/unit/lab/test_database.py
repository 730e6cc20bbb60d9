from __future__ import annotations

import os
import signal
import sqlite3
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from synthetic_results import synthetic_configurations, synthetic_result, write_synthetic

from kvcomp.core.errors import ResultsError
from kvcomp.lab.database import FILE, ResultsWriter, holds_results, read_study
from kvcomp.lab.results import Planned

HOLD = """
import sys, time
from pathlib import Path
from kvcomp.lab.database import ResultsWriter
with ResultsWriter(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    configurations = synthetic_configurations(settings=({}, {"policy.threshold": 0.1}), seeds=(0, 1))
    study = write_synthetic(tmp_path / "new" / "folder", configurations, samples=3)
    expected = [synthetic_result(each, sample) for each in configurations for sample in range(3)]
    assert [replace(result, made="") for result in study.results] == expected
    assert all(result.made for result in study.results)
    assert [entry.configuration for entry in study.planned] == configurations
    assert study.missing() == []
    assert study.stale == 0
    assert study.run.finished is not None
    assert study.run.config == {"samples": 3}


def test_a_killed_run_says_what_is_missing(tmp_path: Path) -> None:
    configurations = synthetic_configurations(("full", "flowmm"), tasks=("mini/recall",), budgets=(0.5,))
    study = write_synthetic(tmp_path, configurations, samples=5, made=2)
    assert study.run.finished is None
    assert time.strptime(study.run.started[:10], "%Y-%m-%d")
    assert study.missing() == [(each, 3) for each in configurations]


def test_a_resumed_run_knows_what_is_there_and_writes_nothing_twice(tmp_path: Path) -> None:
    configurations = synthetic_configurations(tasks=("mini/recall",))
    write_synthetic(tmp_path, configurations, samples=4, made=2)
    with ResultsWriter(tmp_path) as writer:
        assert writer.latest() is not None
        writer.begin([Planned(each, 4) for each in configurations], {}, {})
        results = [synthetic_result(configurations[0], sample) for sample in range(4)]
        assert writer.known([result.key for result in results]) == {result.key for result in results[:2]}
        writer.add(results)
    study = read_study(tmp_path)
    assert [result.sample for result in study.results if result.configuration == configurations[0]] == [0, 1, 2, 3]


def test_results_of_another_plan_are_kept_and_not_shown(tmp_path: Path) -> None:
    old, new = synthetic_configurations(("flowmm",), tasks=("mini/recall",), budgets=(0.1, 0.2))
    write_synthetic(tmp_path, [old, new], samples=3)
    with ResultsWriter(tmp_path) as writer:
        writer.begin([Planned(new, 2)], {}, {})
    study = read_study(tmp_path)
    assert [(result.configuration, result.sample) for result in study.results] == [(new, 0), (new, 1)]
    assert study.stale == 4


def test_a_configuration_that_was_refused_late_has_no_results(tmp_path: Path) -> None:
    refused, whole = synthetic_configurations(("gear", "h2o"), tasks=("mini/recall",), budgets=(0.2,))
    with ResultsWriter(tmp_path) as writer:
        writer.begin([Planned(refused, 4), Planned(whole, 4)], {}, {})
        writer.add([synthetic_result(refused, sample) for sample in range(2)])  # the shorter prompts
        writer.add([synthetic_result(whole, sample) for sample in range(4)])
        writer.skip(refused, "the budget is too small")
    study = read_study(tmp_path)
    assert [result.configuration for result in study.results] == [whole] * 4
    assert (study.missing(), study.stale) == ([], 0)


def test_results_of_samples_that_have_changed_since_are_left_out(tmp_path: Path) -> None:
    one, other = synthetic_configurations(("full", "h2o"), tasks=("mini/recall",), budgets=(1.0,))
    write_synthetic(tmp_path, [one, other], samples=3)
    with ResultsWriter(tmp_path) as writer:
        writer.begin([Planned(one, 3), Planned(other, 3)], {}, {})
        writer.draw(one.model, one.task, one.seed, {0: "sample-0", 1: "changed", 2: "sample-2"})
        writer.add([synthetic_result(one, 1, digest="changed")])
    study = read_study(tmp_path)
    assert [(result.configuration, result.sample) for result in study.results] == [
        (one, 0), (one, 1), (one, 2), (other, 0), (other, 2)
    ]  # fmt: skip
    assert [result.digest for result in study.results if result.sample == 1] == ["changed"]
    assert (study.missing(), study.stale) == ([(other, 1)], 2)
    with ResultsWriter(tmp_path) as writer:  # and back again
        writer.begin([Planned(one, 3), Planned(other, 3)], {}, {})
        writer.draw(one.model, one.task, one.seed, {sample: f"sample-{sample}" for sample in range(3)})
    assert (len(read_study(tmp_path).results), read_study(tmp_path).missing()) == (6, [])


def test_a_folder_that_an_earlier_version_wrote_is_read(tmp_path: Path) -> None:
    configurations = synthetic_configurations(tasks=("mini/recall",))
    write_synthetic(tmp_path, configurations, samples=2)
    connection = sqlite3.connect(tmp_path / FILE)
    connection.execute("DROP TABLE drawn")
    connection.close()
    assert len(read_study(tmp_path).results) == 2 * len(configurations)
    with ResultsWriter(tmp_path) as writer:
        writer.begin([Planned(configurations[0], 2)], {}, {})
        writer.draw("minimile-xs", "mini/recall", 0, {0: "sample-0"})


def test_the_view_holds_everything_for_other_tools(tmp_path: Path) -> None:
    study = write_synthetic(tmp_path, samples=2)
    connection = sqlite3.connect(tmp_path / FILE)
    found = connection.execute("SELECT task, strategy, budget, seed, sample, exact_match FROM rows").fetchall()
    mode = connection.execute("PRAGMA journal_mode").fetchone()
    connection.close()
    assert sorted(found) == sorted(
        (
            result.configuration.task,
            result.configuration.strategy,
            result.configuration.budget,
            0,
            result.sample,
            int(result.exact_match),
        )
        for result in study.results
    )
    assert mode == ("wal",)


def test_a_second_run_is_refused_until_the_first_ends_even_if_it_is_killed(tmp_path: Path) -> None:
    write_synthetic(tmp_path, samples=1)
    holder = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(ResultsError, match="another run is writing to"):
            ResultsWriter(tmp_path)
        assert len(read_study(tmp_path).results) > 0
    finally:
        os.kill(holder.pid, signal.SIGKILL)
        holder.wait()
        holder.stdout.close()
    with ResultsWriter(tmp_path):
        pass


def test_a_database_that_another_program_locked_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_synthetic(tmp_path, samples=1)
    monkeypatch.setattr("kvcomp.lab.database.WAIT_SECONDS", 0.05)
    other = sqlite3.connect(tmp_path / FILE, isolation_level=None)
    other.execute("BEGIN EXCLUSIVE")
    with ResultsWriter(tmp_path) as writer, pytest.raises(ResultsError, match="another program has locked"):
        writer.begin([], {}, {})
    other.close()


def test_a_full_disk_loses_nothing_that_was_written(tmp_path: Path) -> None:
    configurations = synthetic_configurations(tasks=("mini/recall",))
    write_synthetic(tmp_path, configurations, samples=50, made=1)
    before = len(read_study(tmp_path).results)
    with ResultsWriter(tmp_path) as writer:
        writer.begin([Planned(each, 50) for each in configurations], {}, {})
        (pages,) = writer._connection.execute("PRAGMA page_count").fetchone()
        writer._connection.execute(f"PRAGMA max_page_count = {pages}")
        long = [synthetic_result(configurations[0], sample, prediction="x" * 5000) for sample in range(1, 50)]
        with pytest.raises(ResultsError, match=r"disk is full.*--resume"):
            writer.add(long)
    assert len(read_study(tmp_path).results) == before


def test_a_folder_that_takes_no_new_file_is_named_and_can_be_read(tmp_path: Path) -> None:
    write_synthetic(tmp_path, samples=1)
    for name in (f"{FILE}-shm", f"{FILE}-wal"):  # in the way of what SQLite makes, as root may write to any folder
        (tmp_path / name).unlink(missing_ok=True)
        (tmp_path / name).symlink_to("nowhere")
    assert read_study(tmp_path).results
    with pytest.raises(ResultsError, match="cannot be written"):
        ResultsWriter(tmp_path)


def test_what_is_no_folder_of_results_is_named(tmp_path: Path) -> None:
    assert not holds_results(tmp_path)
    with pytest.raises(ResultsError, match=r"holds results\.sqlite, and .* does not"):
        read_study(tmp_path)
    (tmp_path / FILE).write_text("something else entirely, long enough to be looked at" * 10)
    with pytest.raises(ResultsError, match="no database of kvcomp"):
        read_study(tmp_path)
    with pytest.raises(ResultsError, match="no database of kvcomp"):
        ResultsWriter(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(ResultsError, match="cannot be written"):
        ResultsWriter(tmp_path / "file" / "inside")


def test_a_file_of_another_format_is_refused(tmp_path: Path) -> None:
    write_synthetic(tmp_path, samples=1)
    connection = sqlite3.connect(tmp_path / FILE)
    connection.execute("PRAGMA user_version = 7")
    connection.close()
    with pytest.raises(ResultsError, match="format 7, and this version of kvcomp reads 1"):
        read_study(tmp_path)


def test_a_run_that_never_began_is_named(tmp_path: Path) -> None:
    with ResultsWriter(tmp_path) as writer:
        assert writer.latest() is None
    with pytest.raises(ResultsError, match="never began"):
        read_study(tmp_path)
