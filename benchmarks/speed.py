"""Prefill overhead and decode time against their bars, as ratios to transformers' DynamicCache inside one run.

    python benchmarks/speed.py [--tokens 2048 4096 8192] [--repeats 5] [--decode 48] [--out benchmark-output/speed.json]

The same as `kvcomp bench` with the shape, cases and bars of this repository. It ends with exit code 1 where a bar is
missed.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import torch

from kvcomp.lab.bench import Bench, Found, build_model, find_shape, make_cases
from kvcomp.lab.bench.measure import Spread
from kvcomp.lab.threads import torch_threads

BARS = {
    ("prefill_ratio", "snapkv at 0.2"): 1.05,
    ("prefill_ratio", "flowmm at 0.2"): 1.15,
    ("decode_ratio", "snapkv at 0.2"): 1.0,
    ("decode_ratio", "flowmm at 0.2"): 1.0,
    ("decode_ratio", "flowmm at 1.0"): 1.03,
}
RATIOS = ("prefill_ratio", "decode_ratio", "decode_mean_ratio")


def main() -> None:
    """Measure, print a table, and write everything as JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, nargs="+", default=[2048, 4096, 8192])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--decode", type=int, default=48)
    parser.add_argument("--out", type=Path, default=Path("benchmark-output/speed.json"))
    arguments = parser.parse_args()
    shape = find_shape("llama-6l-64")
    cases = make_cases(["snapkv", "flowmm", "h2o", "streaming-llm"], [0.2]) + make_cases(["flowmm"], [1.0])[1:]
    with torch_threads(1):
        model = build_model(shape, torch.device("cpu"), torch.float32)
        bench = Bench(shape, model, cases, arguments.repeats, arguments.decode, throughput=False)
        found = [entry for tokens in arguments.tokens for entry in bench.run(tokens)]
    for entry in found:
        print(f"{entry.tokens:6} {entry.case:22}", *(f"{name} {_show(entry, name)}" for name in RATIOS))
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps([entry.to_dict() for entry in found], indent=1))
    missed = [entry.case for entry in found for name in RATIOS if _misses(entry, name)]
    sys.exit(f"bars missed: {', '.join(sorted(set(missed)))}" if missed else 0)


def _ratio(entry: Found, name: str) -> Spread:
    ratio: Spread = getattr(entry, name)
    return ratio


def _misses(entry: Found, name: str) -> bool:
    return _ratio(entry, name).median > BARS.get((name, entry.case), float("inf"))


def _show(entry: Found, name: str) -> str:
    ratio, bar = _ratio(entry, name), BARS.get((name, entry.case))
    return f"{ratio.median:.3f} [{ratio.least:.2f}, {ratio.most:.2f}]" + (f" (bar {bar})" if bar else "")


if __name__ == "__main__":
    main()
