"""Prefill overhead and decode time of compressed caches, as ratios to transformers' DynamicCache inside one run.

    python benchmarks/speed.py [--tokens 2048 4096 8192] [--repeats 5] [--decode 48] [--out benchmark-output/speed.json]

The model is a seeded random Llama (6 layers, 8 heads, 2 KV heads, head_dim 64). All work of a prefill is done when its
call returns. In every repeat each case runs once, in an order that rotates; a ratio is taken inside a repeat, and its
median over repeats is reported with the smallest and largest. Decode time is per token: the median (and the mean, since
buffers sometimes grow) over the tokens of a run.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from transformers import Cache, DynamicCache, LlamaConfig, LlamaForCausalLM, PreTrainedModel

import kvcomp

STOCK = "DynamicCache"
BUDGETS = {"snapkv": 0.2, "flowmm": 0.2, "h2o": 0.2, "streaming-llm": 0.2, "flowmm at 1.0": 1.0}
BARS = {
    ("prefill", "snapkv"): 1.05,
    ("prefill", "flowmm"): 1.15,
    ("decode", "snapkv"): 1.0,
    ("decode", "flowmm"): 1.0,
    ("decode", "flowmm at 1.0"): 1.03,
}


@dataclass(frozen=True)
class Timing:
    """Seconds of one run: the prefill, and the median and mean decode step."""

    prefill: float
    decode: float
    decode_mean: float


def build_model() -> PreTrainedModel:
    """Return the seeded random Llama."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=1024,
        hidden_size=512,
        intermediate_size=1408,
        num_hidden_layers=6,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=65536,
    )
    return LlamaForCausalLM(config).eval()


@torch.inference_mode()
def run(model: PreTrainedModel, ids: torch.Tensor, cache: Cache, decode: int) -> Timing:
    """Return the times of one prefill and `decode` steps of one token."""
    started = time.perf_counter()
    output = model(input_ids=ids, past_key_values=cache, logits_to_keep=1)
    prefill = time.perf_counter() - started
    steps = []
    for _ in range(decode):
        token = output.logits[:, -1:].argmax(-1)
        started = time.perf_counter()
        output = model(input_ids=token, past_key_values=cache, logits_to_keep=1)
        steps.append(time.perf_counter() - started)
    return Timing(prefill, statistics.median(steps), statistics.fmean(steps))


def cases(model: PreTrainedModel, ids: torch.Tensor, decode: int) -> dict[str, Callable[[], Timing]]:
    """Return what to time, by name: the stock cache, and each recipe at its budget."""

    def stock() -> Timing:
        return run(model, ids, DynamicCache(config=model.config), decode)

    def compressed(recipe: str, budget: float) -> Callable[[], Timing]:
        def timed() -> Timing:
            with kvcomp.compress(model, recipe, budget=budget) as cache:
                return run(model, ids, cache, decode)

        return timed

    recipes = {name: compressed(name.split()[0], budget) for name, budget in BUDGETS.items()}
    return {STOCK: stock, **recipes}


def measure(model: PreTrainedModel, tokens: int, repeats: int, decode: int) -> dict[str, list[Timing]]:
    """Return the timings of every case, one per repeat, the order of cases rotated; one more run of each warms up."""
    ids = torch.randint(0, 1024, (1, tokens), generator=torch.Generator().manual_seed(tokens))
    todo = cases(model, ids, decode)
    names = list(todo)
    timings: dict[str, list[Timing]] = {name: [] for name in names}
    for repeat in range(repeats + 1):
        start = repeat % len(names)
        for name in names[start:] + names[:start]:
            timing = todo[name]()
            if repeat:
                timings[name].append(timing)
    return timings


def ratios(timings: dict[str, list[Timing]], field: str) -> dict[str, dict[str, float]]:
    """Return for each case the median, smallest and largest ratio to the stock cache, taken repeat by repeat."""
    result = {}
    for name, runs in timings.items():
        pairs = zip(runs, timings[STOCK], strict=True)
        quotients = [getattr(mine, field) / getattr(stock, field) for mine, stock in pairs]
        result[name] = {"median": statistics.median(quotients), "min": min(quotients), "max": max(quotients)}
    return result


def main() -> None:
    """Measure, print a table, and write everything as JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, nargs="+", default=[2048, 4096, 8192])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--decode", type=int, default=48)
    parser.add_argument("--out", type=Path, default=Path("benchmark-output/speed.json"))
    arguments = parser.parse_args()
    model = build_model()
    document: dict[str, object] = {
        "machine": {"processor": platform.processor(), "threads": torch.get_num_threads()},
        "versions": {
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "kvcomp": kvcomp.__version__,
        },
    }
    for tokens in arguments.tokens:
        timings = measure(model, tokens, arguments.repeats, arguments.decode)
        stock = timings[STOCK]
        print(f"\n{tokens} tokens; stock prefill {statistics.median(run.prefill for run in stock):.3f} s, ", end="")
        print(f"decode {statistics.median(run.decode for run in stock) * 1e3:.2f} ms per token")
        fields = {field: ratios(timings, field) for field in ("prefill", "decode", "decode_mean")}
        for name in timings:
            print(f"  {name:15}", *(f"{field} {_show(fields, field, name)}" for field in fields))
        document[str(tokens)] = fields
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(document, indent=1))


def _show(fields: dict[str, dict[str, dict[str, float]]], field: str, name: str) -> str:
    ratio = fields[field][name]
    bar = BARS.get((field, name))
    return f"{ratio['median']:.3f} [{ratio['min']:.2f}, {ratio['max']:.2f}]" + (f" (bar {bar})" if bar else "")


if __name__ == "__main__":
    main()
