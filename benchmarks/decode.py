"""What of a decoded token's time depends on the length of the cache, beside transformers' DynamicCache.

    python benchmarks/decode.py [--tokens 2048 4096 8192] [--decode 40] [--out benchmark-output/decode.json]

All caches of one length are alive together and decode in turns of one token, the stock cache with a model of its own.
What a token takes at 64 tokens is what does not depend on the length. It ends with exit code 1 where at a budget b the
rest is more than 1.2 b of the stock cache's, or, from 4,096 tokens on, a token at a budget of 1.0 takes longer than the
stock cache's.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import nn

from kvcomp.lab.bench import Case, Shape, build_model, find_shape, make_cases
from kvcomp.lab.bench.cases import STOCK
from kvcomp.lab.threads import torch_threads
from kvcomp.runtime.cache_argument import CACHE

BASE = 64  # tokens of a cache so short that its length does not matter
BUDGET = 0.2
LONG = 4096  # tokens from which on a budget of 1.0 is to be no slower


@torch.inference_mode()
def medians(shape: Shape, models: dict[bool, nn.Module], cases: list[Case], tokens: int, decoded: int) -> list[float]:
    """Return the median seconds of a token of each case; `models` says whose it is by whether the cache is stock."""
    prompt = shape.prompt(tokens, torch.device("cpu"), torch.float32)
    seconds: list[list[float]] = [[] for _ in cases]
    with ExitStack() as stack:
        caches, last = [], []
        for case in cases:
            model: Any = models[case.strategy is None]
            caches.append(stack.enter_context(case.open(model, tokens, decoded)).cache)
            last.append(_next(model(**prompt, **{CACHE: caches[-1]}, use_cache=True, logits_to_keep=1)))
        for step in range(decoded):
            for place in range(len(cases)):
                number = (place + step) % len(cases)
                model = models[cases[number].strategy is None]
                started = time.thread_time()
                last[number] = _next(model(input_ids=last[number], **{CACHE: caches[number]}, use_cache=True))
                seconds[number].append(time.thread_time() - started)
    return [statistics.median(each) for each in seconds]


def _next(output: Any) -> Any:
    return output.logits[:, -1:].argmax(dim=-1)


def main() -> None:
    """Measure each length, print a table, and write everything as JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--tokens", type=int, nargs="+", default=[2048, 4096, 8192])
    parser.add_argument("--decode", type=int, default=40)
    parser.add_argument("--out", type=Path, default=Path("benchmark-output/decode.json"))
    arguments = parser.parse_args()
    shape = find_shape("llama-6l-64")
    cases = make_cases(["snapkv", "flowmm"], [BUDGET]) + make_cases(["flowmm"], [1.0])[1:]
    names, missed = [case.name for case in cases], []
    with torch_threads(1):
        models = {stock: build_model(shape, torch.device("cpu"), torch.float32) for stock in (True, False)}
        medians(shape, models, cases, BASE, arguments.decode)  # warms up, so that no length is measured cold
        found = {
            tokens: dict(zip(names, medians(shape, models, cases, tokens, arguments.decode), strict=True))
            for tokens in (BASE, *arguments.tokens)
        }
    print("| tokens | " + " | ".join(names) + " | parts of the length |\n" + "|---" * (len(names) + 2) + "|")
    for tokens, times in found.items():
        grown = {name: times[name] - found[BASE][name] for name in names}
        parts = {name: grown[name] / grown[STOCK] for name in names} if tokens != BASE else {}
        shown = ", ".join(f"{part:.2f}" for part in parts.values())
        print(f"| {tokens:,} | " + " | ".join(f"{1000 * times[name]:.1f}" for name in names) + f" | {shown} |")
        missed += [name for name, part in parts.items() if str(BUDGET) in name and part > 1.2 * BUDGET]
        missed += [name for name in parts if tokens >= LONG and name.endswith("1.0") and times[name] > times[STOCK]]
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps({"decoded": arguments.decode, "seconds": found}, indent=1))
    sys.exit(f"bars missed: {', '.join(dict.fromkeys(missed))}" if missed else 0)


if __name__ == "__main__":
    main()
