"""`kvcomp ablate`: the answers of one prefill per configuration, once each, whatever happens on the way."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
from ablations import Echo, register_fake_tasks, unregister_fake_tasks, write_file
from commands import save_untrained
from milebench_folders import record, write_task
from typer.testing import CliRunner

from kvcomp.cli.ablate import read_plan
from kvcomp.cli.app import app
from kvcomp.core.errors import ConfigError, ResultsError, WorkerError
from kvcomp.lab.ablation import in_mode
from kvcomp.lab.batches import QueryMode
from kvcomp.lab.controls import find_method
from kvcomp.lab.database import ResultsWriter, read_study
from kvcomp.lab.engines import Inline, Processes
from kvcomp.lab.evaluation import Evaluation
from kvcomp.lab.jobs import Worker
from kvcomp.lab.sweep import sweep
from kvcomp.lab.testbed import load_testbed
from kvcomp.lab.threads import torch_threads

TESTS = Path(__file__).parents[1]
RUN = """
import sys
sys.path.insert(0, sys.argv.pop(1))
from commands import save_untrained
from ablations import register_fake_tasks
register_fake_tasks()
from kvcomp.cli.app import app
app()
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_untrained(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module", autouse=True)
def _fake_tasks() -> Iterator[None]:
    register_fake_tasks()
    with torch_threads(1):
        yield
    unregister_fake_tasks()


def invoke(*arguments: object, code: int = 0) -> Any:
    done = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert done.exit_code == code, done.output + repr(done.exception)
    return done


def answered(out: Path) -> list[tuple[Any, ...]]:
    rows = [each.row() for each in read_study(out).results]
    names = ("task", "query_mode", "strategy", "settings", "budget", "sample", "prediction", "exact_match", "kv_bytes")
    return [tuple(row[name] for name in names) for row in rows]


def test_answers_are_those_of_one_prefill_per_configuration(model: Path, tmp_path: Path) -> None:
    strategies = ["full", "flowmm", "h2o", "kvzip", "meda", "kivi", "oracle", "no-context"]
    modes = ["question_seen", "question_later"]
    file = write_file(
        tmp_path / "a.yaml",
        models=str(model),
        strategies=strategies,
        query_modes=modes,
        grid={"budget": [0.4]},
        metrics="all",
    )
    invoke("ablate", file, "--out", tmp_path / "out", "--batch", 5)
    study = read_study(tmp_path / "out")
    assert study.missing() == []
    bed = load_testbed(model)
    for mode in QueryMode:
        for name in strategies:
            budget = None if name in ("full", "no-context") else 0.4
            method = in_mode(find_method(name, budget), mode)
            own = Evaluation(bed, method, samples=5, split="eval-0", mode=mode, batch=5, forced=True)
            expected = sorted(own.outcomes(Echo()), key=lambda seen: seen.number)
            found = [
                each
                for each in study.results
                if (each.configuration.strategy, each.configuration.query_mode) == (name, mode)
            ]
            assert [each.sample for each in found] == [0, 1, 2, 3, 4]
            assert {each.configuration.budget for each in found} == {budget or 1.0}
            for mine, seen in zip(found, expected, strict=True):
                assert (mine.prediction, mine.exact_match, mine.new_tokens) == (
                    seen.prediction,
                    seen.exact_match,
                    seen.new_tokens,
                )
                assert (mine.kv_bytes, mine.slots) == pytest.approx((seen.kv_bytes, seen.slots))
                assert mine.answer_nll == pytest.approx(seen.answer_nll, abs=1e-4)
                assert mine.kl_to_full == pytest.approx(seen.kl_to_full, abs=1e-4)
                assert mine.retention == seen.retention


def test_a_prompt_is_read_once_for_all_configurations(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = write_file(tmp_path / "a.yaml", models=str(model), strategies=["full", "flowmm", "snapkv"])
    reads = []
    load = load_testbed

    def counting(*args: Any, **settings: Any) -> Any:
        bed = load(*args, **settings)

        def note(module: Any, args: Any, inputs: Any) -> None:
            reads.append(inputs["input_ids"].shape[1])

        bed.model.register_forward_pre_hook(note, with_kwargs=True)
        return bed

    monkeypatch.setattr("kvcomp.lab.jobs.load_testbed", counting)
    invoke("ablate", file, "--out", tmp_path / "out", "--batch", 5)
    assert sum(tokens > 1 for tokens in reads) == 1
    assert sum(tokens == 1 for tokens in reads) > 5


def test_a_folder_with_results_is_gone_on_with_only_where_that_is_asked_for(model: Path, tmp_path: Path) -> None:
    file, out = write_file(tmp_path / "a.yaml", models=str(model)), tmp_path / "out"
    invoke("ablate", file, "--out", out, "--resume")  # an absent folder is started
    before = answered(out)
    assert "holds results already: add --resume" in invoke("ablate", file, "--out", out, code=2).stderr
    done = json.loads(invoke("ablate", file, "--out", out, "--resume", "--json").stdout)
    assert (done["made"], done["known"]) == (0, 15)
    assert answered(out) == before


def test_what_changed_is_said_and_only_that_is_answered(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    invoke("ablate", write_file(tmp_path / "a.yaml", models=str(model)), "--out", out)
    more = write_file(tmp_path / "b.yaml", models=str(model), grid={"budget": [0.3, 0.9]}, samples=6)
    done = invoke("ablate", more, "--out", out, "--resume", "--json")
    assert "results are of a run that differs" in done.stderr
    assert "file.samples: 5 -> 6" in done.stderr
    counts = json.loads(done.stdout)
    assert (counts["made"], counts["known"]) == (3 * 6 - 10, 10)
    study = read_study(out)
    assert (len(study.results), study.stale) == (18, 5)


def test_another_checkpoint_or_code_is_noticed(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import shutil

    mine, out = tmp_path / "tiny", tmp_path / "out"
    shutil.copytree(model, mine)
    file = write_file(tmp_path / "a.yaml", models=str(mine), samples=2, strategies=["full"], grid={})
    invoke("ablate", file, "--out", out)
    config = json.loads((mine / "generation_config.json").read_text())
    (mine / "generation_config.json").write_text(json.dumps(config | {"note": "another"}))
    done = invoke("ablate", file, "--out", out, "--resume", "--json")
    assert "models.tiny.checkpoint" in done.stderr
    assert json.loads(done.stdout)["made"] == 2
    monkeypatch.setattr("kvcomp.lab.provenance.code_version", lambda: "9.9+other")
    done = invoke("ablate", file, "--out", out, "--resume", "--json")
    assert "versions.kvcomp" in done.stderr
    assert "9.9+other" in done.stderr
    assert json.loads(done.stdout)["made"] == 2
    assert read_study(out).stale == 4


def test_all_faults_come_before_a_model_is_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvcomp.lab.jobs.load_testbed", lambda *_, **__: pytest.fail("a model was loaded"))
    file = write_file(
        tmp_path / "a.yaml",
        models=["minmile-xs", "minimile-xs"],
        tasks=["echoo", "milebench:nowhere"],
        strategies=["flowm"],
        grid={"budgt": [0.1]},
    )
    with pytest.raises(ConfigError) as error:
        read_plan(file, 4)
    text = str(error.value)
    for part in ("models[0]:", "'minimile-xs'", "tasks[0]: no task named 'echoo'", "tasks[1]:", "strategies[0]:"):
        assert part in text
    assert invoke("ablate", file, "--out", tmp_path / "out", code=2).stderr.startswith("error: ")
    assert not (tmp_path / "out").exists()
    assert "name of a study" in invoke("ablate", "tabel1", "--out", tmp_path / "out", code=2).stderr


def test_models_and_tasks_of_one_name_are_refused(model: Path, tmp_path: Path) -> None:
    """Results go by names: the second would be taken for the first, or answered and never shown."""
    write_task(
        tmp_path / "data", "IEdit", [record(number, "{image#1} which ?", [f"{number}.png"]) for number in (4, 7)]
    )
    folder = {"folder": str(tmp_path / "data"), "max_context_len": 900, "tokens_per_image": 4}
    models = [str(model), {"model": str(model), "dtype": "bfloat16"}]
    file = write_file(
        tmp_path / "a.yaml", models=models, tasks=[f"milebench:{tmp_path / 'data'}", folder, "echo", "echo"]
    )
    with pytest.raises(ConfigError) as error:
        read_plan(file, 4)
    first, second = error.value.faults
    assert first.startswith(
        f"models[1]: is called {model.name!r} in results, as models[0] is; give it a name of its own"
    )
    assert second.startswith("tasks[1]: gives another 'IEdit' than tasks[0], and results go by names")
    models = [str(model), {"model": str(model), "dtype": "bfloat16", "name": "half"}]
    plan = read_plan(write_file(tmp_path / "a.yaml", models=models, tasks=["echo"]), 4)
    assert [source.name for source in plan.work.models] == [model.name, "half"]


def test_a_folder_of_tasks_is_asked_and_a_control_that_cannot_be_is_skipped(model: Path, tmp_path: Path) -> None:
    samples = [record(number, "{image#1} which ?", [f"{number}.png"]) for number in (4, 7, 9)]
    write_task(tmp_path / "data", "IEdit", samples)
    file = write_file(
        tmp_path / "a.yaml",
        models=str(model),
        tasks=[f"milebench:{tmp_path / 'data'}"],
        strategies=["full", "oracle", "no-context", "recency"],
        grid={"budget": [0.4]},
        max_new_tokens=2,
    )
    done = json.loads(invoke("ablate", file, "--out", tmp_path / "out", "--json").stdout)
    asked = {(each.configuration.strategy, each.sample) for each in read_study(tmp_path / "out").results}
    assert asked == {(name, number) for name in ("full", "recency") for number in range(3)}
    reasons = {each["strategy"]: each["reason"] for each in done["skipped"]}
    assert "IEdit.json: sample 4" in reasons["oracle"]
    assert "no-context asks the question alone" in reasons["no-context"]


def test_a_budget_that_a_recipe_refuses_is_skipped_and_said(model: Path, tmp_path: Path) -> None:
    file = write_file(tmp_path / "a.yaml", models=str(model), strategies=["full", "kivi"], grid={"budget": [0.01, 0.9]})
    done = invoke("ablate", file, "--out", tmp_path / "out", "--json")
    (skipped,) = json.loads(done.stdout)["skipped"]
    assert (skipped["strategy"], skipped["budget"]) == ("kivi", 0.01)
    assert "smallest budget" in skipped["reason"]
    study = read_study(tmp_path / "out")
    assert list(study.skipped.values()) == [skipped["reason"]]
    assert study.missing() == []
    assert len(study.results) == 10


def test_a_dry_run_shows_the_grid_and_writes_nothing(model: Path, tmp_path: Path) -> None:
    file = write_file(tmp_path / "a.yaml", models=str(model), tasks=["echo", "other"])
    shown = invoke("ablate", file, "--out", tmp_path / "out", "--dry-run").stdout
    assert "3 configurations, 5 samples of each task: 30 answers, about" in shown
    assert not (tmp_path / "out").exists()
    document = json.loads(invoke("ablate", file, "--out", tmp_path / "out", "--dry-run", "--json").stdout)
    assert document["configurations"][0] == {"strategy": "full", "budget": "1.0"}
    assert document["answers"] == 30
    assert document["estimated_seconds"] >= 0


def test_a_run_notes_which_tasks_its_model_has_not_learned(tmp_path: Path) -> None:
    file = write_file(tmp_path / "a.yaml", models="minimile-xs", tasks=["recall", "spot_diff"])
    assert read_plan(file, 1).environment["models"]["minimile-xs"]["unlearned"] == ["mini/spot_diff"]


@pytest.mark.slow
def test_several_processes_give_the_same_answers(model: Path, tmp_path: Path) -> None:
    file = write_file(tmp_path / "a.yaml", models=str(model), tasks=["echo", "other"])
    invoke("ablate", file, "--out", tmp_path / "one", "--batch", 1)
    plan = read_plan(file, 1)
    with ResultsWriter(tmp_path / "two") as writer:
        progress = sweep(plan, writer, Processes(2))
    assert (progress.made, progress.lost) == (30, [])
    assert answered(tmp_path / "two") == answered(tmp_path / "one")


@pytest.mark.slow
def test_a_worker_that_is_killed_is_replaced_and_repeats_nothing(model: Path, tmp_path: Path) -> None:
    plan = read_plan(write_file(tmp_path / "a.yaml", models=str(model), tasks=["echo", "other"]), 1)
    killed, engine = [], Processes(1)
    hire = engine.hire

    def watched(work: Any) -> Any:
        engine.last = hire(work)  # type: ignore[attr-defined]
        return engine.last  # type: ignore[attr-defined]

    engine.hire = watched  # type: ignore[method-assign]

    def kill(progress: Any) -> None:
        if progress.made >= 4 and not killed:
            killed.append(progress.made)
            engine.last.process.kill()  # type: ignore[attr-defined]

    with ResultsWriter(tmp_path / "out") as writer:
        progress = sweep(plan, writer, engine, kill)
    assert progress.lost == ["its process ended with exit code -9"]
    assert len(read_study(tmp_path / "out").results) == 30


@pytest.mark.slow
def test_workers_that_die_again_and_again_end_the_run(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = read_plan(write_file(tmp_path / "a.yaml", models=str(model)), 1)
    monkeypatch.setattr("kvcomp.lab.engines.serve", os.getpid)  # a target that cannot be called with arguments
    with (
        ResultsWriter(tmp_path / "out") as writer,
        pytest.raises(WorkerError, match=r"4 workers were lost.*--resume"),
    ):
        sweep(plan, writer, Processes(1))


def test_ctrl_c_says_how_to_go_on(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, out, run = write_file(tmp_path / "a.yaml", models=str(model)), tmp_path / "out", Worker.run

    def interrupted(self: Worker, job: Any) -> Iterator[Any]:
        yield from islice(run(self, job), 2)
        raise KeyboardInterrupt

    monkeypatch.setattr(Worker, "run", interrupted)
    done = invoke("ablate", file, "--out", out, code=130)
    assert f"kvcomp ablate {file} --out {out} --resume" in done.stderr
    assert len(read_study(out).results) == 10
    monkeypatch.undo()
    assert json.loads(invoke("ablate", file, "--out", out, "--resume", "--json").stdout)["made"] == 5


def test_a_failing_disk_ends_the_run_and_says_how_to_go_on(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, out, add = write_file(tmp_path / "a.yaml", models=str(model)), tmp_path / "out", ResultsWriter.add

    def full(self: ResultsWriter, results: Any) -> None:
        (pages,) = self._connection.execute("PRAGMA page_count").fetchone()
        self._connection.execute(f"PRAGMA max_page_count = {pages}")
        for _ in range(50):
            add(self, results)
            self._connection.execute("UPDATE results SET key = key || sample || random()")
            self._connection.commit()

    monkeypatch.setattr(ResultsWriter, "add", full)
    done = invoke("ablate", file, "--out", out, code=2)
    assert "the disk is full" in done.stderr
    assert "--resume" in done.stderr


def _start(file: Path, out: Path, *more: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", RUN, str(TESTS), "ablate", str(file), "--out", str(out), "--batch", "1", *more]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_a_run_that_is_killed_loses_at_most_the_sample_in_flight(model: Path, tmp_path: Path) -> None:
    file, out = write_file(tmp_path / "a.yaml", models=str(model), samples=40), tmp_path / "out"
    running = _start(file, out)
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline and running.poll() is None:
        try:
            if len(read_study(out).results) >= 20:
                break
        except ResultsError:
            pass
        time.sleep(0.05)
    os.kill(running.pid, signal.SIGKILL)
    running.communicate()
    study = read_study(out)
    assert study.run.finished is None
    before = {each.key: each.made for each in study.results}
    assert 20 <= len(before) < 120
    complete = len(before) // 3
    assert len({each.sample for each in study.results}) <= complete + 1  # at most one sample is in part
    done = json.loads(invoke("ablate", file, "--out", out, "--batch", 1, "--resume", "--json").stdout)
    assert (done["known"], done["made"]) == (len(before), 120 - len(before))
    after = {each.key: each.made for each in read_study(out).results}
    assert {key: after[key] for key in before} == before
    invoke("ablate", file, "--out", tmp_path / "whole", "--batch", 1)
    assert answered(out) == answered(tmp_path / "whole")


def test_inline_is_the_engine_of_one_worker() -> None:
    from kvcomp.cli.ablate import EngineName, make_engine

    assert isinstance(make_engine(EngineName.local, 1), Inline)
    assert isinstance(make_engine(EngineName.local, 2), Processes)


@pytest.mark.slow
def test_a_ray_cluster_gives_the_same_answers_though_an_actor_is_killed_on_the_way(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ray = pytest.importorskip("ray", reason="Ray is not installed")
    from kvcomp.lab.ray_engine import RayActors

    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(TESTS), *filter(None, sys.path)]))
    monkeypatch.setenv("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")
    plan = read_plan(write_file(tmp_path / "a.yaml", models=str(model), tasks=["echo", "other"]), 1)
    hired, killed, engine = [], [], RayActors(2)
    hire = engine.hire

    def watched(work: Any) -> Any:
        hired.append(hire(work))
        return hired[-1]

    monkeypatch.setattr(engine, "hire", watched)

    def kill(progress: Any) -> None:
        if progress.made >= 4 and not killed:
            killed.append(progress.made)
            ray.kill(hired[0].handle)

    ray.init(num_cpus=2, log_to_driver=False, logging_level="ERROR", include_dashboard=False)
    try:
        with warnings.catch_warnings(), ResultsWriter(tmp_path / "out") as writer:
            warnings.simplefilter("ignore")
            progress = sweep(plan, writer, engine, kill)
    finally:
        ray.shutdown()
    assert len(hired) == 3
    assert len(progress.lost) == 1
    assert len(read_study(tmp_path / "out").results) == 30
    invoke("ablate", tmp_path / "a.yaml", "--out", tmp_path / "one", "--batch", 1)
    assert answered(tmp_path / "out") == answered(tmp_path / "one")


def test_ray_that_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch, model: Path, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    file = write_file(tmp_path / "a.yaml", models=str(model))
    done = invoke("ablate", file, "--out", tmp_path / "out", "--engine", "ray", code=2)
    assert "pip install 'kvcomp[ray]'" in done.stderr
