"""Peak memory of H2O's column sums over prompt lengths: it must grow at most linearly, never with tokens x tokens.

    python benchmarks/memory.py [--tokens 4096 8192 16384] [--out benchmark-output/memory.json]

Every measurement is a fresh process. It runs one layer's attention statistics over seeded random queries and keys
(8 heads, 2 KV heads, head_dim 64) and reads the operating system's peak resident memory before and after: the
difference is what observing took. The exponent is that of a line fitted to the logarithms.
"""

from __future__ import annotations

import argparse
import json
import math
import resource
import subprocess
import sys
from pathlib import Path

from kvcomp.lab.bench.growth import exponent

HEADS, KV_HEADS, HEAD_DIM = 8, 2, 64


def measure(tokens: int) -> int:
    """Return the bytes by which the peak of this process grew while H2O's sums were computed."""
    import torch
    from kvcomp_strategies.observations.received_attention import ReceivedSums

    from kvcomp.core.attention import AttentionInputs, observe

    torch.manual_seed(0)
    columns = torch.arange(tokens)
    text = torch.zeros(1, tokens, dtype=torch.int8)
    valid = torch.ones(1, tokens, dtype=torch.bool)
    inputs = AttentionInputs(
        queries=torch.randn(1, HEADS, tokens, HEAD_DIM),
        keys=torch.randn(1, KV_HEADS, tokens, HEAD_DIM),
        query_columns=columns,
        key_columns=columns[None, None],
        query_modality=text,
        query_valid=valid,
        modality=text[:, None].expand(1, KV_HEADS, tokens),
        valid=valid[:, None].expand(1, KV_HEADS, tokens),
        mask=None,
        scaling=HEAD_DIM**-0.5,
    )
    inputs.queries @ inputs.queries[:, :, :8].transpose(-1, -2)  # the matrix library takes its own memory now
    before = _peak()
    sums = observe(inputs, (ReceivedSums(),))[ReceivedSums()]
    after = _peak()
    assert math.isclose(float(sums.sum()), HEADS * tokens, rel_tol=1e-4)  # every row of attention sums to 1
    return after - before


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main() -> None:
    """Measure each length in its own process; print and write sizes and exponent."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, nargs="+", default=[4096, 8192, 16384])
    parser.add_argument("--out", type=Path, default=Path("benchmark-output/memory.json"))
    parser.add_argument("--one", type=int, help="measure this length in this process and print the bytes")
    arguments = parser.parse_args()
    if arguments.one:
        print(measure(arguments.one))
        return
    sizes = []
    for tokens in arguments.tokens:
        command = [sys.executable, __file__, "--one", str(tokens)]
        sizes.append(int(subprocess.run(command, check=True, capture_output=True, text=True).stdout))
        matrix = HEADS * tokens * tokens * 4 / 2**20
        print(f"{tokens:6} tokens: {sizes[-1] / 2**20:7.1f} MiB beyond the inputs (all attention: {matrix:.0f} MiB)")
    slope = exponent(arguments.tokens, sizes)
    print(f"fitted exponent {slope:.2f} (bar 1.1)")
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps({"tokens": arguments.tokens, "bytes": sizes, "exponent": slope}, indent=1))


if __name__ == "__main__":
    main()
