"""The scripts in `benchmarks/`, on small shapes: they run, and what they write says what they found."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[2] / "benchmarks"


def run(name, out, *arguments):
    command = [sys.executable, str(FOLDER / f"{name}.py"), *map(str, arguments), "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout, json.loads(out.read_text())


def test_gpu_runs_all_its_parts_on_a_cpu(tmp_path):
    small = ("--device", "cpu", "--shape", "llama-6l-64", "--layers", 1, "--eager", "--quick")
    lengths = ("--table", 96, "--throughput", 64, "--prefill", 64)
    stdout, found = run("gpu", tmp_path / "gpu.json", *small, *lengths)
    assert found["floors"][0]["bytes_per_second"] > 1e8
    assert not found["failed"]
    assert [row["case"] for row in found["table"]][:3] == ["DynamicCache", "flowmm at 1.0", "flowmm at 0.5"]
    kept = {row["case"]: row["kv_gib"] for row in found["table"]}
    assert kept["flowmm at 0.05"] < kept["flowmm at 0.2"] < kept["DynamicCache"] == kept["flowmm at 1.0"]
    assert all(row["over_floor"] > 0 for row in found["table"])
    assert next(row for row in found["throughput"] if row["case"] == "flowmm at 0.2")["largest_batch"] > 4
    assert {row["case"] for row in found["prefill"]} >= {"DynamicCache", "h2o at 0.2"}
    assert stdout.count("| tokens | case |") == 3


def test_a_part_that_fails_keeps_its_rows():
    spec = importlib.util.spec_from_file_location("gpu", FOLDER / "gpu.py")
    gpu = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(gpu)

    def rows():
        yield {"tokens": 1}
        raise RuntimeError("CUDA error")

    assert gpu.gather(rows()) == ([{"tokens": 1}], "RuntimeError: CUDA error")


def test_bounds_are_bytes_over_bandwidth(tmp_path):
    options = ("--shape", "llama-6l-64", "--bandwidth", 1, "--tokens", 1000, "--throughput", 500)
    _, found = run("bounds", tmp_path / "bounds.json", *options)
    layer = 512 * (512 + 2 * 128 + 512) + 3 * 512 * 1408 + 2 * 512  # projections, feed-forward, norms
    assert found["weight_bytes"] == 2 * (6 * layer + 512 + 1024 * 512)
    slot = 6 * 2 * 64 * 2 * 2
    alone = {row["budget"]: row["ms"] for row in found["one sequence"]}
    assert alone[0.2] == pytest.approx(1e-6 * (found["weight_bytes"] + 200 * slot))
    together = {row["budget"]: row for row in found["fixed memory"]}
    assert (together[0.35]["batch"], together[0.2]["batch"], together[0.2]["ratio"]) == (11, 20, pytest.approx(5))


@pytest.mark.slow
def test_growth_fits_an_exponent_to_what_h2o_observes(tmp_path):
    stdout, found = run("growth", tmp_path / "growth.json", "--tokens", 1024, 4096)
    exponents = {(entry["case"], entry["stage"]): entry["exponent"] for entry in found["stages"]}
    assert 1.5 < exponents["h2o", "observe"] < 2.5
    assert "| `h2o` | observe |" in stdout


@pytest.mark.slow
def test_one_number_end_to_end_for_each_recipe(tmp_path):
    options = ("--recipes", "snapkv,kivi", "--budget", 0.3, "--repeats", 1, "--new-tokens", 4)
    stdout, found = run("end_to_end", tmp_path / "end.json", *options)
    assert set(found["ratios"]) | set(found["left_out"]) == {"snapkv", "kivi"}
    assert found["ratios"]["snapkv"]["8"].keys() == {"whole", "token"}
    assert "| `snapkv` |" in stdout


@pytest.mark.slow
def test_decoding_is_split_into_what_grows_and_what_does_not(tmp_path):
    out = tmp_path / "decode.json"
    command = [sys.executable, str(FOLDER / "decode.py"), "--tokens", "256", "--decode", "4", "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode in (0, 1), done.stderr  # bars are not for four tokens
    assert set(json.loads(out.read_text())["seconds"]) == {"64", "256"}
    assert "| tokens | DynamicCache | snapkv at 0.2 |" in done.stdout


@pytest.mark.slow
def test_a_prefill_with_flowmm_takes_hardly_more_memory_than_stock(tmp_path):
    stdout, found = run("peak", tmp_path / "peak.json", "--tokens", 8192, "--recipes", "flowmm")
    assert 0 < found["peak_bytes"]["flowmm"] <= 1.05 * found["stock_bytes"]
    assert stdout.startswith("flowmm")
