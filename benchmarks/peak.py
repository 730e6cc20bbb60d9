"""Peak memory of a prefill with every recipe, beside transformers' DynamicCache.

    python benchmarks/peak.py [--tokens 16384] [--layers 2] [--budget 0.2] [--recipes flowmm,h2o]

Every measurement is a fresh process, as in `kvcomp bench --memory`. It ends with exit code 1 where a recipe takes more
than 1.05 times what the stock cache takes. Few layers are the hard case: a compressed layer gives back most of its
bytes, and the stock cache keeps those of all.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import torch

from kvcomp.core.config import strategy
from kvcomp.core.errors import KVCompError
from kvcomp.core.registry import registry
from kvcomp.lab.bench import Case
from kvcomp.lab.bench.cases import STOCK
from kvcomp.lab.bench.peak import peak_on_cpu
from kvcomp.lab.threads import torch_threads

BAR = 1.05
SHAPE = "llama-6l-64"


def main() -> None:
    """Measure each recipe; print a line for each, and write them as JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--budget", type=float, default=0.2)
    parser.add_argument("--recipes", help="names with commas between; all by default")
    parser.add_argument("--out", type=Path, default=Path("benchmark-output/peak.json"))
    arguments = parser.parse_args()
    names = (
        arguments.recipes.split(",")
        if arguments.recipes
        else sorted(entry.name for entry in registry.entries("recipe"))
    )
    sizes: dict[str, int | str] = {}
    with torch_threads(1):
        stock = peak_on_cpu(SHAPE, arguments.layers, Case(STOCK), arguments.tokens, torch.float32)
        for name in names:
            sizes[name] = peak(name, arguments)
            shown = f"{sizes[name] / stock:.3f}" if isinstance(sizes[name], int) else sizes[name]
            print(f"{name:24} {shown}", flush=True)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    found = {"tokens": arguments.tokens, "layers": arguments.layers, "budget": arguments.budget, "stock_bytes": stock}
    arguments.out.write_text(json.dumps(found | {"peak_bytes": sizes}, indent=1))
    missed = [name for name, size in sizes.items() if isinstance(size, int) and size > BAR * stock]
    sys.exit(f"bar missed: {', '.join(missed)}" if missed else 0)


def peak(name: str, arguments: argparse.Namespace) -> int | str:
    """Return the bytes, or why there are none."""
    try:
        case = Case(name, strategy(name, f"{arguments.budget} or smallest"))
        return peak_on_cpu(SHAPE, arguments.layers, case, arguments.tokens, torch.float32)
    except KVCompError as error:
        return str(error)


if __name__ == "__main__":
    main()
