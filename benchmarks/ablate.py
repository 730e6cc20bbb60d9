"""A grid of 42 configurations: one prefill for all of them, and one for each.

    python benchmarks/ablate.py [--model minimile-xs] [--tokens 500] [--new 8] [--samples 8] [--rounds 3]
                                [--out benchmark-output/ablate.json]

Six recipes at seven budgets answer the same prompts, in one batch. In every round both ways run once, and the ratio is
taken inside the round; the median over rounds is reported, with the smallest and the largest. Every answer of the one
way is compared with that of the other.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from dataclasses import replace
from pathlib import Path

import torch

import kvcomp
from kvcomp.core.registry import registry
from kvcomp.lab.answers import SharedPrompt, answer
from kvcomp.lab.batches import Batch, QueryMode, make_batches
from kvcomp.lab.tasks import Sample
from kvcomp.lab.testbed import LoadedTestbed, load_testbed

RECIPES = ("streaming-llm", "h2o", "snapkv", "look-m", "d2o", "flowmm")
BUDGETS = (0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6)
BAR = 5.0


def long_batch(bed: LoadedTestbed, tokens: int, samples: int) -> Batch:
    """Return samples whose prompts are made as long as wanted by more context in front."""
    task = registry.find("task", "mini/recall").value
    made = []
    for index in range(samples):
        own: Sample = task.sample("benchmark", index)
        sample, rest = own, [part for more in range(9) for part in task.sample("filler", 9 * index + more).context]
        while bed.encode([sample])["input_ids"].shape[1] < tokens:
            sample = replace(sample, context=(rest.pop(), *sample.context), evidence=())
        made.append(sample)
    (batch,) = make_batches(bed, "sample {} of recall".format, made, samples, QueryMode.question_seen)
    return batch


def run(model: Path, tokens: int, new: int, samples: int, rounds: int) -> dict[str, object]:
    """Return what was measured."""
    bed = load_testbed(model)
    bed.model.generation_config.eos_token_id = None  # every answer has the same length
    batch = long_batch(bed, tokens, samples)
    grid = [kvcomp.strategy(name, budget) for name in RECIPES for budget in BUDGETS]
    shared_seconds, own_seconds, same = [], [], 0
    session = kvcomp.attach(bed.model)
    for _ in range(rounds):
        started = time.perf_counter()
        prompt = SharedPrompt(session, batch, grid, max_new_tokens=new)
        shared = [prompt.answer(strategy).predictions for strategy in grid]
        shared_seconds.append(time.perf_counter() - started)
        started = time.perf_counter()
        own = [answer(batch, strategy, max_new_tokens=new).predictions for strategy in grid]
        own_seconds.append(time.perf_counter() - started)
        same = sum(mine == theirs for mine, theirs in zip(shared, own, strict=True))
    session.detach()
    gains = [own / shared for own, shared in zip(own_seconds, shared_seconds, strict=True)]
    return {
        "configurations": len(grid),
        "prompt_tokens": batch.inputs["attention_mask"].sum(dim=1).tolist(),
        "new_tokens": new,
        "samples": samples,
        "gain": statistics.median(gains),
        "gain_range": [min(gains), max(gains)],
        "shared_seconds": shared_seconds,
        "own_seconds": own_seconds,
        "same_answers": same,
        "bar": BAR,
        "machine": f"{platform.system()} {platform.machine()}",
        "torch_threads": torch.get_num_threads(),
    }


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="minimile-xs", help="name of a testbed")
    parser.add_argument("--tokens", type=int, default=500)
    parser.add_argument("--new", type=int, default=8)
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("benchmark-output/ablate.json"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    folder = Path(registry.find("testbed", arguments.model).value)
    found = run(folder, arguments.tokens, arguments.new, arguments.samples, arguments.rounds)
    print(f"{found['configurations']} configurations: {found['gain']:.1f} times faster (at least {BAR:g})")
    print(f"{found['same_answers']} of {found['configurations']} give the same answers to all samples")
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
