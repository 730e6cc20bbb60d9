"""`kvcomp bench` from the command line, in the shape of a tiny configuration."""

import json
from functools import partial

import commands
import pytest
from models import TEXT
from transformers import LlamaConfig

from kvcomp.lab.bench import Bench

call = partial(commands.call, "bench")


@pytest.fixture(scope="module")
def shape(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shape")
    LlamaConfig(**TEXT).save_pretrained(folder)
    return folder


def test_a_quick_run_is_a_table_a_file_and_a_picture(shape, tmp_path):
    options = ("--shape", shape, "--layers", 2, "--quick", "--prompt-lengths", "32,64", "--strategies", "snapkv,flowmm")
    result = call(*options, "--decode", 2, "--repeats", 1, "--json", tmp_path / "b.json", "--plot", tmp_path / "b.png")
    assert result.exit_code == 0, result.stderr
    lines = result.stdout.splitlines()
    assert lines[0].split()[:9] == [
        "tokens",
        "case",
        "prefill",
        "observe",
        "score",
        "select",
        "match",
        "merge",
        "store",
    ]
    assert [line.split()[:2] for line in lines[1:7:3]] == [["32", "DynamicCache"], ["64", "DynamicCache"]]
    assert "2 layers, float32 on cpu, 1 threads, CPU time of one thread; medians over 1 turns" in lines[-1]
    document = json.loads((tmp_path / "b.json").read_text())
    assert [entry["case"] for entry in document["found"]] == ["DynamicCache", "snapkv at 0.2", "flowmm at 0.2"] * 2
    assert document["strategies"]["flowmm at 0.2"]["name"] == "flowmm"
    assert document["interrupted"] is False
    assert set(document["found"][1]) == {"tokens", "case", "budget", *document["fields"]} | {
        *("decode_ratio", "decode_mean_ratio")
    }
    assert (tmp_path / "b.png").stat().st_size > 1000


@pytest.mark.parametrize("asked", [("--json", "-"), ("--json",), ("--json", "--seed", 1)], ids=str)
def test_stdout_is_one_document_where_it_is_asked_for(shape, asked):
    options = ("--shape", shape, "--quick", "--prompt-lengths", 16, "--strategies", "full", "--repeats", 1)
    result = call(*options, "--decode", 1, "--budgets", "0.5,0.2", "--no-throughput", *asked)
    document = json.loads(result.stdout)
    assert [entry["case"] for entry in document["found"]] == ["DynamicCache", "full"]
    assert {entry["throughput"] for entry in document["found"]} == {None}


def test_every_fault_comes_at_once(tmp_path):
    options = (
        "--shape",
        "lama",
        "--strategies",
        "snapkw",
        "--budgets",
        "2",
        "--prompt-lengths",
        "1k",
        "--kv-memory",
        "3",
    )
    result = call(*options, "--json", tmp_path / "none" / "x.json", "--plot", tmp_path / "x.bmp")
    assert (result.exit_code, result.stdout) == (2, "")
    for fault in (
        "--shape: no shape named 'lama'",
        "--strategies: no recipe named 'snapkw'",
        "--budgets:",
        "--prompt-lengths: must be numbers of tokens",
        "--kv-memory:",
        "x.json: must be a file in a folder that exists",
        "--plot: must end with one of .png, .svg, .pdf",
    ):
        assert fault in result.stderr, result.stderr


def test_what_was_measured_before_ctrl_c_is_written(shape, tmp_path, monkeypatch):
    run = Bench.run

    def stop(self, tokens, on_step):
        if tokens == 32:
            raise KeyboardInterrupt
        return run(self, tokens, on_step)

    monkeypatch.setattr(Bench, "run", stop)
    options = ("--shape", shape, "--quick", "--prompt-lengths", "16,32", "--strategies", "snapkv", "--repeats", 1)
    result = call(*options, "--decode", 1, "--json", tmp_path / "b.json")
    assert result.exit_code == 130
    assert "interrupted: what is written is what was done until then" in result.stderr
    document = json.loads((tmp_path / "b.json").read_text())
    assert document["interrupted"] is True
    assert {entry["tokens"] for entry in document["found"]} == {16}
