"""What a benchmark says of a tiny model, held against counts and against a clock that ticks."""

from __future__ import annotations

import json

import pytest
import torch
from models import TEXT, tiny_llama, tiny_qwen_vl
from transformers import LlamaConfig

from kvcomp.cli.bench import dtype_on
from kvcomp.core.errors import InputError, KVCompError, UnknownNameError
from kvcomp.core.stages import STAGES
from kvcomp.lab.bench import SHAPES, Bench, Case, Shape, build_model, find_shape, growth, make_cases
from kvcomp.lab.bench import measure as measure_module
from kvcomp.lab.bench.cases import COMPILED, STOCK
from kvcomp.lab.bench.measure import Spread
from kvcomp.lab.bench.peak import can_measure, measure_here, peak_on_cpu
from kvcomp.lab.bench.plot import figure, save_plot
from kvcomp.lab.bench.timing import Timing, clock_of, time_case
from kvcomp.lab.threads import torch_threads

LAYERS, KV_HEADS, HEAD_DIM = 3, 2, 16
TOKEN_BYTES = LAYERS * KV_HEADS * HEAD_DIM * 2 * 4
CPU = torch.device("cpu")


@pytest.fixture
def bench():
    model = tiny_llama()
    return Bench(Shape("tiny", model.config), model, make_cases(["snapkv", "full"], [0.25]), repeats=2, decoded=3)


# --- shapes ---


@pytest.mark.parametrize("name", SHAPES)
def test_a_known_shape_has_the_layers_that_are_asked_for(name):
    whole, short = find_shape(name), find_shape(name, layers=2)
    assert short.describe()["layers"] == 2 < whole.describe()["layers"]
    assert short.describe() | {"layers": 0} == whole.describe() | {"layers": 0}
    assert whole.describe()["head_dim"] in (64, 128)
    assert whole.multimodal == ("vl" in name)


def test_the_shape_of_a_folder_is_that_of_its_configuration(tmp_path):
    LlamaConfig(**TEXT).save_pretrained(tmp_path)
    shape = find_shape(str(tmp_path))
    assert (shape.describe()["layers"], shape.describe()["kv_heads"]) == (3, 2)
    first, again, other = (build_model(shape, CPU, torch.float32, seed) for seed in (0, 0, 1))
    weight = "model.layers.0.self_attn.q_proj.weight"
    assert torch.equal(first.state_dict()[weight], again.state_dict()[weight])
    assert not torch.equal(first.state_dict()[weight], other.state_dict()[weight])


def test_what_is_no_shape_says_so(tmp_path):
    with pytest.raises(UnknownNameError, match=r"Did you mean 'llama-6l-64'\?"):
        find_shape("llama-6l-46")
    with pytest.raises(InputError, match="must hold the configuration of a model"):
        find_shape(str(tmp_path))


def test_building_a_model_leaves_the_random_state_alone():
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    build_model(Shape("tiny", LlamaConfig(**TEXT)), CPU, torch.float32)
    assert torch.equal(torch.rand(2), expected)


def test_half_of_a_multimodal_prompt_is_visual_and_rho_is_measured():
    model = tiny_qwen_vl()
    shape = Shape("tiny", model.config)
    prompt = shape.prompt(64, CPU, torch.float32)
    assert prompt["mm_token_type_ids"].float().mean() == 0.5
    (_, case) = make_cases(["flowmm"], [0.5])
    with torch.inference_mode(), case.open(model, 64, 1) as opened:
        model(**prompt, past_key_values=opened.cache)
        assert all(0 < layer.rho[0] < 1 for layer in opened.cache.report().layers)


# --- cases ---


def test_the_stock_cache_comes_first_and_a_recipe_that_keeps_everything_once():
    names = [case.name for case in make_cases(["full", "snapkv"], [0.2, "64t"])]
    assert names == [STOCK, "full", "snapkv at 0.2", "snapkv at 64t"]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # the compiler's own
def test_compiled_caches_compile_once_and_decode(bench):
    cases = make_cases(["snapkv"], [0.5], compiled=True)
    prompt = bench.shape.prompt(16, CPU, torch.float32)
    for case in (case for case in cases if case.compiled):
        first, again = (time_case(bench.model, prompt, case, 2) for _ in range(2))
        assert again.decode_mean < first.decode_mean / 5  # no compiler in it
    found = Bench(bench.shape, bench.model, cases, 1, 2).run(16)
    assert [entry.skipped for entry in found] == [""] * 4
    assert [entry.throughput is None for entry in found] == [False, True, False, True]


def test_what_is_compiled_is_kept_for_all_turns_of_a_length_and_what_cannot_be_is_named(bench, monkeypatch):
    compiled = []

    def fake(model, **options):
        compiled.append(options)
        return lambda **arguments: model(**arguments)

    monkeypatch.setattr(torch, "compile", fake)
    cases = make_cases(["snapkv", "kivi"], [0.5], compiled=True)
    names = [STOCK, COMPILED, "snapkv at 0.5", "snapkv at 0.5, compiled", "kivi at 0.5", "kivi at 0.5, compiled"]
    assert [case.name for case in cases] == names
    made = Bench(bench.shape, bench.model, cases, 2, 2)
    found = {entry.case: entry for tokens in (64, 96) for entry in made.run(tokens)}
    assert compiled == [{"dynamic": False, "fullgraph": True}] * 2 * 3  # per length and case
    assert "store" in found["kivi at 0.5, compiled"].skipped
    assert found["snapkv at 0.5, compiled"].kv_bytes == found["snapkv at 0.5"].kv_bytes
    assert found[COMPILED].kv_bytes == 98 * TOKEN_BYTES


def test_one_run_counts_bytes_and_stages(bench):
    stock, snapkv, full = (
        time_case(bench.model, bench.shape.prompt(40, CPU, torch.float32), case, 3) for case in bench.cases
    )
    assert (stock.kv_bytes, stock.held_bytes, stock.bookkeeping_bytes) == (40 * TOKEN_BYTES, 43 * TOKEN_BYTES, 0)
    assert (snapkv.kv_bytes, snapkv.held_bytes) == (10 * TOKEN_BYTES, 13 * TOKEN_BYTES)
    assert (full.kv_bytes, full.held_bytes) == (40 * TOKEN_BYTES, 43 * TOKEN_BYTES)
    assert stock.stages == {}
    assert set(snapkv.stages) == set(STAGES)
    assert min(snapkv.prefill, snapkv.decode, snapkv.stages["observe"]) > 0
    assert sum(snapkv.stages.values()) < snapkv.prefill


def test_the_clock_is_the_threads_own_where_it_is_alone(bench):
    with torch_threads(1):
        assert clock_of(bench.model)[1] == "CPU time of one thread"
    with torch_threads(2):
        assert clock_of(bench.model)[1] == "wall"


# --- measuring ---


def test_ratios_are_taken_inside_a_turn_and_the_first_turn_does_not_count(bench, monkeypatch):
    calls = []

    def timed(model, prompt, case, decoded):
        turn = len(calls) // 3 + 1
        calls.append(case.name)
        seconds = turn * (1.0 if case.strategy is None else 3.0)
        return Timing(seconds, dict.fromkeys(STAGES, 0.5 * turn) if case.strategy else {}, seconds, seconds, 8, 8, 0)

    monkeypatch.setattr(measure_module, "time_case", timed)
    stock, snapkv, full = Bench(bench.shape, bench.model, bench.cases, 2, 3, throughput=False).run(16)
    assert calls == [STOCK, *(names := ["snapkv at 0.25", "full"]), *names, STOCK, "full", STOCK, "snapkv at 0.25"]
    assert stock.prefill == Spread(2.5, 2.5, 2.0, 3.0)
    assert stock.prefill_ratio == Spread(1.0, 1.0, 1.0, 1.0)
    assert snapkv.prefill_ratio == full.decode_ratio == Spread(3.0, 3.0, 3.0, 3.0)
    assert snapkv.stages == dict.fromkeys(STAGES, 1.25)
    assert snapkv.overhead == dict.fromkeys(STAGES, 0.5)
    assert stock.overhead is None


def test_throughput_is_at_as_many_sequences_as_fit(bench):
    told = []
    stock, snapkv, full = bench.run(40, told.append)
    memory = 4 * 43 * TOKEN_BYTES
    assert len(told) == bench.steps
    assert stock.throughput.kv_memory == snapkv.throughput.kv_memory == memory
    assert [entry.throughput.largest_batch for entry in (stock, snapkv, full)] == [4, memory // (13 * TOKEN_BYTES), 4]
    assert snapkv.throughput.batch == 13
    assert stock.throughput.ratio == Spread(1.0, 1.0, 1.0, 1.0)
    assert snapkv.throughput.tokens_per_second > 0


def test_a_batch_is_no_larger_than_allowed_and_memory_may_be_given(bench):
    made = Bench(bench.shape, bench.model, bench.cases, 1, 3, kv_memory=200 * TOKEN_BYTES, largest=5)
    rates = [entry.throughput for entry in made.run(40)]
    assert [rate.largest_batch for rate in rates] == [4, 15, 4]
    assert [rate.batch for rate in rates] == [4, 5, 4]


def test_a_case_that_cannot_run_is_left_out_with_its_reason(bench, monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda model, **options: _broken)
    cases = [*make_cases(["snapkv"], ["10B"]), Case(COMPILED, compiled=True)]
    stock, snapkv, compiled = Bench(bench.shape, bench.model, cases, 1, 2).run(16)
    assert "below one slot" in snapkv.skipped
    assert compiled.skipped == "the compiler says no"
    assert (stock.skipped, snapkv.prefill, compiled.throughput) == ("", None, None)


def _broken(**arguments):
    raise RuntimeError("the compiler\nsays no\n\nand more")


def test_what_is_found_is_plain_data(bench):
    found = [entry.to_dict() for entry in bench.run(16)]
    assert json.loads(json.dumps(found)) == found


# --- memory ---


@pytest.mark.skipif(not can_measure(CPU), reason="only Linux tells it")
def test_peak_memory_holds_at_least_the_cache(tmp_path):
    config = LlamaConfig(**TEXT | {"num_hidden_layers": 2, "num_key_value_heads": 4, "head_dim": 128})
    config.save_pretrained(tmp_path)
    stock = Case(STOCK)
    peak = peak_on_cpu(str(tmp_path), None, stock, 4096, torch.float32)
    held = 2 * 4 * 128 * 2 * 4 * 4096
    assert held <= peak < 8 * held


def test_a_measurement_that_fails_says_why():
    with pytest.raises(InputError, match=r"peak memory of 'DynamicCache' at 8 tokens cannot be measured: .*no shape"):
        peak_on_cpu("no-such-shape", None, Case(STOCK), 8, torch.float32)
    with pytest.raises(KVCompError):
        measure_here(
            {"shape": "no", "layers": None, "tokens": 8, "strategy": None, "dtype": "torch.float32", "threads": 1}
        )


# --- the picture ---


def test_the_picture_has_a_panel_per_length_and_one_for_decoding(bench, tmp_path):
    found = [entry.to_dict() for tokens in (16, 32) for entry in bench.run(tokens)]
    found.append({"tokens": 64, "case": "x", "skipped": "no"})
    drawn = figure(found)
    assert [axes.get_title(loc="left") for axes in drawn.axes] == ["prefill of 16 tokens", "prefill of 32 tokens", ""]
    bars = drawn.axes[0].containers
    assert [bar.get_label() for bar in bars] == list(STAGES)
    widths = sum(bar[0].get_width() for bar in bars)
    assert widths == pytest.approx(100 * sum(found[1]["overhead"].values()))
    save_plot(found, tmp_path / "plot.svg")
    assert "snapkv at 0.25" in (tmp_path / "plot.svg").read_text()


# --- growth ---


def test_growth_is_fitted_to_the_stages_that_take_time(monkeypatch):
    asked = []

    def timed(model, prompt, case, decoded):
        tokens = next(iter(prompt.values())).shape[1]
        asked.append(tokens)
        stages = dict.fromkeys(STAGES, 0.0) | {"observe": 1e-6 * tokens**2, "match": 1e-3 * tokens, "merge": 1e-9}
        return Timing(1.0, stages, 1.0, 1.0, 1, 1, 1)

    monkeypatch.setattr(growth, "time_case", timed)
    model = tiny_llama()
    grown = growth.measure_growth(
        model, Shape("tiny", model.config), make_cases(["snapkv"], [0.2])[1:], [16, 32, 64], 2
    )
    assert asked == [16] * 4 + [32] * 2 + [64] * 2
    exponents = {entry.stage: entry.exponent for entry in grown}
    assert exponents["observe"] == pytest.approx(2.0)
    assert exponents["match"] == pytest.approx(1.0)
    assert exponents["merge"] is exponents["store"] is None
    assert next(entry for entry in grown if entry.stage == "match").seconds == pytest.approx((0.016, 0.032, 0.064))


@pytest.mark.parametrize(("device", "dtype"), [("cpu", torch.float32), ("meta", torch.bfloat16)])
def test_random_weights_are_made_for_the_device_where_nobody_says(device, dtype):
    assert dtype_on(torch.device(device)) is dtype
