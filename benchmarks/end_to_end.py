"""Every recipe on the trained testbed: a prompt and 128 tokens through `generate()`, at batch 1 and 8.

    python benchmarks/end_to_end.py [--testbed minimile-xs] [--recipes flowmm,snapkv] [--repeats 3] [--out FILE]

Each number is a ratio to DynamicCache in the same turn, of the whole generation and of its median token. The testbed
has a million parameters and prompts of a few hundred tokens: what is measured is mostly what a cache costs per step,
and not what it saves.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList

from kvcomp.core.config import strategy
from kvcomp.core.errors import KVCompError
from kvcomp.core.registry import registry
from kvcomp.lab.bench import Case
from kvcomp.lab.bench.cases import STOCK
from kvcomp.lab.document import circumstances
from kvcomp.lab.testbed import LoadedTestbed, load_testbed
from kvcomp.lab.threads import torch_threads
from kvcomp.runtime.cache_argument import CACHE

BATCHES = (1, 8)
TASK = "mini/text_needle"


class Taken(NamedTuple):
    """What one `generate()` took, in seconds of this thread's CPU time, or the ratio of two such."""

    whole: float
    token: float


class Clock(LogitsProcessor):
    """Notes when each token's logits were there."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        """Return the logits as they are."""
        self.times.append(time.thread_time())
        return scores

    @property
    def token(self) -> float:
        """Return the median time between two tokens."""
        return statistics.median(later - earlier for earlier, later in pairwise(self.times))


def inputs_of(bed: LoadedTestbed, batch: int) -> Mapping[str, Tensor]:
    """Return the prompts of that many samples."""
    task: Any = registry.find("task", TASK).value
    return bed.encode([task.sample("test", index) for index in range(batch)])


def taken_by(bed: LoadedTestbed, inputs: Mapping[str, Tensor], case: Case, tokens: int) -> Taken:
    """Return the time of one `generate()`."""
    clock, started = Clock(), time.thread_time()
    options: dict[str, Any] = {"min_new_tokens": tokens, "max_new_tokens": tokens, "do_sample": False}
    with case.open(bed.model, inputs["input_ids"].shape[1], tokens) as opened:
        options[CACHE] = opened.cache
        bed.model.generate(**inputs, logits_processor=LogitsProcessorList([clock]), **options)
    return Taken(time.thread_time() - started, clock.token)


def ratios(bed: LoadedTestbed, name: str, budget: float, repeats: int, tokens: int) -> dict[int, Taken]:
    """Return the median ratios of a recipe at each batch size."""
    case, stock, found = Case(name, strategy(name, budget)), Case(STOCK), {}
    for batch in BATCHES:
        inputs, taken = inputs_of(bed, batch), []
        for turn in range(repeats + 1):  # the first warms up
            order = (case, stock) if turn % 2 else (stock, case)
            seconds = {one.name: taken_by(bed, inputs, one, tokens) for one in order}
            pairs = zip(seconds[name], seconds[STOCK], strict=True)
            taken += [Taken(*(mine / stocks for mine, stocks in pairs))] if turn else []
        found[batch] = Taken(*map(statistics.median, zip(*taken, strict=True)))
    return found


def main() -> None:
    """Measure each recipe; print a line of Markdown for each, and write everything as JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--testbed", default="minimile-xs")
    parser.add_argument("--budget", type=float, default=0.2)
    parser.add_argument("--recipes", help="names with commas between; all by default")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--out", type=Path, default=Path("benchmark-output/end_to_end.json"))
    arguments = parser.parse_args()
    names = arguments.recipes.split(",") if arguments.recipes else sorted(e.name for e in registry.entries("recipe"))
    started, found, left_out = time.monotonic(), {}, {}
    print("| recipe | batch 1 | its token | batch 8 | its token |\n|---|---|---|---|---|")
    with torch_threads(1):
        bed = load_testbed(Path(registry.find("testbed", arguments.testbed).value))
        for name in names:
            try:
                found[name] = ratios(bed, name, arguments.budget, arguments.repeats, arguments.new_tokens)
            except KVCompError as error:
                left_out[name] = str(error)
                continue
            cells = [f"{ratio:.2f}" for taken in found[name].values() for ratio in taken]
            print(f"| `{name}` | " + " | ".join(cells) + " |", flush=True)
        prompt = inputs_of(bed, 1)["input_ids"].shape[1]
        measured = circumstances(time.monotonic() - started)
    for name, reason in left_out.items():
        print(f"{name} was left out: {reason}")
    print(f"prompt of {prompt} tokens, {measured['torch_threads']} thread")
    shown = {name: {batch: taken._asdict() for batch, taken in each.items()} for name, each in found.items()}
    document = {"ratios": shown, "left_out": left_out, "budget": arguments.budget, "prompt_tokens": prompt}
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(document | measured, indent=1))


if __name__ == "__main__":
    main()
