"""The most that a smaller cache can gain on a device, from bytes and bandwidth alone: nothing is run.

    python benchmarks/bounds.py [--shape qwen2.5-vl-7b] [--bandwidth 4800] [--tokens 38000] [--out FILE]

A decoded token reads all weights but the embeddings once for the whole batch, and the slots of every sequence. The
first table is of one sequence; the second of as many as fit where four stock caches do. `gpu.py` measures the same
cases, and divides by such a floor with the bandwidth that it finds.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from gpu import BUDGETS, GIB, show, weight_bytes

from kvcomp.lab.bench import Shape, build_model, find_shape

SEQUENCES = 4  # stock caches that the memory of the second table holds


def slot_bytes(shape: Shape, dtype: torch.dtype) -> int:
    """Return the bytes of keys and values of one token in all layers."""
    sizes = shape.describe()
    return int(sizes["layers"] * sizes["kv_heads"] * sizes["head_dim"] * 2 * dtype.itemsize)


def one_sequence(weights: int, slot: int, tokens: int, bandwidth: float) -> list[dict[str, Any]]:
    """Return the least milliseconds of a token at each budget, and how they compare with the full cache's."""
    least = {budget: (weights + budget * tokens * slot) / bandwidth for budget in BUDGETS}
    return [
        {"budget": budget, "KV GiB": budget * tokens * slot / GIB, "ms": 1000 * seconds, "ratio": seconds / least[1.0]}
        for budget, seconds in least.items()
    ]


def fixed_memory(weights: int, slot: int, lengths: list[int], bandwidth: float) -> list[dict[str, Any]]:
    """Return the most tokens per second at each budget in the memory of four stock caches, and how they compare."""
    rows = []
    for tokens in lengths:
        memory = SEQUENCES * tokens * slot
        for budget in BUDGETS:
            batch = int(SEQUENCES / budget)
            seconds = (weights + batch * budget * tokens * slot) / bandwidth
            rows.append({"tokens": tokens, "KV GiB": memory / GIB, "budget": budget, "batch": batch})
            rows[-1] |= {"tokens per second": batch / seconds}
            rows[-1] |= {"ratio": rows[-1]["tokens per second"] / rows[-1 - BUDGETS.index(budget)]["tokens per second"]}
    return rows


def main() -> None:
    """Print both tables as Markdown, and write them as JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--shape", default="qwen2.5-vl-7b")
    parser.add_argument("--bandwidth", type=float, default=4800, help="GB (10^9 bytes) read in a second")
    parser.add_argument("--tokens", type=int, default=38000)
    parser.add_argument("--throughput", type=int, nargs="+", default=[8192, 16384, 32768])
    parser.add_argument("--out", type=Path, default=Path("benchmark-output/bounds.json"))
    arguments = parser.parse_args()
    shape, bandwidth = find_shape(arguments.shape), 1e9 * arguments.bandwidth
    weights = weight_bytes(build_model(shape, torch.device("meta"), torch.bfloat16))
    slot = slot_bytes(shape, torch.bfloat16)
    found = {
        "one sequence": one_sequence(weights, slot, arguments.tokens, bandwidth),
        "fixed memory": fixed_memory(weights, slot, arguments.throughput, bandwidth),
    }
    print(f"{weights / GIB:.2f} GiB of weights, {slot:,} bytes per token")
    for title, rows in found.items():
        show(title, rows)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    document = {"shape": shape.describe(), "bytes_per_second": bandwidth, "weight_bytes": weights, **found}
    arguments.out.write_text(json.dumps(document, indent=1))


if __name__ == "__main__":
    main()
