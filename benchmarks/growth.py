"""How each stage of a compression grows with the prompt: exponents fitted over lengths, one layer.

    python benchmarks/growth.py [--tokens 1024 2048 4096 8192 16384 32768] [--device cpu] [--out FILE]
    python benchmarks/growth.py --device cuda --shape qwen2.5-vl-7b --tokens 4096 8192 16384 32768 65536 131072

The cases are snapkv, flowmm, flowmm with the matcher `nearby`, and h2o, at a budget of 0.2.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import asdict
from pathlib import Path

import torch

from kvcomp.core.config import strategy
from kvcomp.lab.bench import Case, build_model, find_shape
from kvcomp.lab.bench.growth import Growth, measure_growth
from kvcomp.lab.bench.timing import clock_of
from kvcomp.lab.document import circumstances
from kvcomp.lab.threads import torch_threads

BUDGET = 0.2


def cases() -> list[Case]:
    """Return what is timed."""
    near = Case("flowmm, nearby", strategy("flowmm", BUDGET, matcher="nearby"))
    return [Case(name, strategy(name, BUDGET)) for name in ("snapkv", "flowmm")] + [
        near,
        Case("h2o", strategy("h2o", BUDGET)),
    ]


def main() -> None:
    """Measure, print a table, and write everything as JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--tokens", type=int, nargs="+", default=[2**power for power in range(10, 16)])
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--shape", default="llama-6l-64")
    parser.add_argument("--out", type=Path, default=Path("benchmark-output/growth.json"))
    arguments = parser.parse_args()
    tokens = sorted(set(arguments.tokens))
    if len(tokens) < 2:
        parser.error(f"--tokens must name two lengths or more, got {arguments.tokens}")
    started = time.monotonic()
    shape = find_shape(arguments.shape, layers=1)
    dtype = torch.float32 if arguments.device.type == "cpu" else torch.bfloat16
    with torch_threads(1):
        model = build_model(shape, arguments.device, dtype)
        grown = measure_growth(model, shape, cases(), tokens, arguments.repeats)
        document = {"clock": clock_of(model)[1], "shape": shape.describe()}
        document |= circumstances(time.monotonic() - started)
    print_table(tokens, grown)
    document |= {"tokens": tokens, "stages": [asdict(entry) for entry in grown]}
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(document, indent=1))


def print_table(tokens: list[int], grown: list[Growth]) -> None:
    """Write a line of Markdown for each stage that has an exponent, in milliseconds."""
    print("| case | stage | " + " | ".join(f"{count:,}" for count in tokens) + " | exponent |")
    print("|---|---|" + "---|" * (len(tokens) + 1))
    for entry in grown:
        if entry.exponent is not None:
            times = " | ".join(f"{1000 * seconds:.1f}" for seconds in entry.seconds)
            print(f"| `{entry.case}` | {entry.stage} | {times} | {entry.exponent:.2f} |")


if __name__ == "__main__":
    main()
