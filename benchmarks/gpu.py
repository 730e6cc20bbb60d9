"""What a GPU shows: the paper's Table 2 in our own rows, throughput at a fixed KV memory, prefill overhead, and floors.

    python benchmarks/gpu.py [--quick] [--out benchmark-output/gpu.json]
    python benchmarks/gpu.py --device cpu --shape llama-6l-64 --layers 1 --table 256 --throughput 128 --prefill 128

Random weights in the shape of Qwen2.5-VL-7B, half of the prompt visual, in bfloat16. It needs PyTorch with CUDA,
transformers, and kvcomp on the path; no network. `--parts` runs some of it. What is done is written after each part; a
part that fails keeps the rows that it has, and the others run.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from kvcomp.lab.bench import Bench, Case, Found, Shape, build_model, find_shape, make_cases
from kvcomp.lab.bench.peak import peak_on_cuda
from kvcomp.lab.bench.timing import clock_of
from kvcomp.lab.document import circumstances
from kvcomp.lab.threads import torch_threads

PARTS = ("floors", "table", "throughput", "prefill")
BUDGETS = (1.0, 0.5, 0.35, 0.2, 0.05)
COMPILED = 0.2  # each compiled row costs a minute of compiling
GIB = 2**30


class Machine:
    """How fast the device moves and multiplies, measured.

    Attributes:
        bandwidth: bytes that it reads and writes in a second.
        rate: operations of a matrix product in a second.
    """

    def __init__(self, device: torch.device, dtype: torch.dtype, size: int) -> None:
        source = torch.ones(size, device=device, dtype=dtype)
        side = int(size**0.5)
        square = source[: side * side].view(side, side)
        target = torch.empty_like(source)
        self.bandwidth = 2 * source.nbytes / _least_seconds(device, lambda: target.copy_(source))
        self.rate = 2 * side**3 / _least_seconds(device, lambda: square @ square)


def _least_seconds(device: torch.device, work: Callable[[], Any], repeats: int = 10) -> float:
    def once() -> float:
        _wait(device)
        started = time.perf_counter()
        work()
        _wait(device)
        return time.perf_counter() - started

    once()
    return min(once() for _ in range(repeats))


def _wait(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize()


def weight_bytes(model: nn.Module) -> int:
    """Return the bytes that a decoded token reads beside its cache: all weights but the embeddings."""
    embeddings = {id(parameter) for parameter in model.get_input_embeddings().parameters()}  # type: ignore[operator]
    return sum(parameter.nbytes for parameter in model.parameters() if id(parameter) not in embeddings)


def floor_of_decode(model: nn.Module, kv_bytes: int, machine: Machine) -> float:
    """Return the seconds that a token takes at least: weights and cache are read."""
    return (weight_bytes(model) + kv_bytes) / machine.bandwidth


def row(found: Found) -> dict[str, Any]:
    """Return what a table shows of one case."""
    if found.skipped or found.decode is None or found.prefill is None or found.prefill_ratio is None:
        return {"tokens": found.tokens, "case": found.case, "skipped": found.skipped}
    shown = {"tokens": found.tokens, "case": found.case, "decode_ms": 1000 * found.decode.median}
    shown |= {"decode_mean_ms": 1000 * found.decode_mean.median if found.decode_mean else None}
    shown |= {"prefill_s": found.prefill.median, "prefill_ratio": found.prefill_ratio.median}
    shown |= {"kv_gib": (found.kv_bytes or 0) / GIB, "stages": found.overhead}
    if found.throughput is not None:
        shown |= {"batch": found.throughput.batch, "largest_batch": found.throughput.largest_batch}
        shown |= {"tokens_per_second": found.throughput.tokens_per_second, "ratio": found.throughput.ratio.median}
    return shown


class Run:
    """What is measured, on one model.

    Args:
        arguments: of the command line.
    """

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments = arguments
        self.device = torch.device(arguments.device)
        self.dtype = torch.float32 if self.device.type == "cpu" else torch.bfloat16
        self.shape: Shape = find_shape(arguments.shape, arguments.layers)
        self.model = build_model(self.shape, self.device, self.dtype)
        self.machine = Machine(self.device, self.dtype, 2**22 if self.device.type == "cpu" else 2**28)

    def floors(self) -> Iterator[dict[str, Any]]:
        """Give what the device does at most."""
        yield {"bytes_per_second": self.machine.bandwidth, "operations_per_second": self.machine.rate}

    def table(self) -> Iterator[dict[str, Any]]:
        """Give time per token and bytes at the budgets of the paper's Table 2, and one of them compiled."""
        cases = make_cases(["flowmm"], BUDGETS)
        if not self.arguments.eager:
            cases += [case for case in make_cases(["flowmm"], [COMPILED], compiled=True) if case.compiled]
        for found in self._bench(cases, throughput=False).run(self.arguments.table):
            shown = row(found)
            if not found.skipped:
                floor = floor_of_decode(self.model, found.kv_bytes or 0, self.machine)
                shown |= {"floor_ms": 1000 * floor, "over_floor": shown["decode_ms"] / (1000 * floor)}
                shown |= {"peak_gib": self._peak(next(case for case in cases if case.name == found.case))}
            yield shown

    def throughput(self) -> Iterator[dict[str, Any]]:
        """Give tokens per second at a fixed KV memory: as many sequences as fit."""
        bench = self._bench(make_cases(["flowmm", "snapkv"], [0.2]), throughput=True)
        yield from self._rows(bench, self.arguments.throughput)

    def prefill(self) -> Iterator[dict[str, Any]]:
        """Give what compression adds to the prefill."""
        bench = self._bench(make_cases(["streaming-llm", "snapkv", "flowmm", "h2o"], [0.2]), throughput=False)
        yield from self._rows(replace(bench, decoded=8), self.arguments.prefill)

    def _rows(self, bench: Bench, lengths: list[int]) -> Iterator[dict[str, Any]]:
        for tokens in lengths:
            yield from map(row, bench.run(tokens))

    def _bench(self, cases: list[Case], *, throughput: bool) -> Bench:
        memory = None if self.arguments.kv_gib is None else int(self.arguments.kv_gib * GIB)
        quick = self.arguments.quick
        return Bench(
            self.shape, self.model, cases, 1 if quick else 2, 8 if quick else 32, throughput, memory, largest=512
        )

    def _peak(self, case: Case) -> float | None:
        if self.device.type != "cuda" or case.compiled:
            return None
        try:
            return peak_on_cuda(self.model, self.shape, case, self.arguments.table) / GIB
        except torch.OutOfMemoryError:
            return None


def gather(rows: Iterator[dict[str, Any]]) -> tuple[list[dict[str, Any]], str]:
    """Return the rows that a part gave, and what ended it before its end; empty where nothing did."""
    given = []
    try:
        given.extend(rows)
    except Exception as error:  # one part must not cost the others' results
        traceback.print_exc()
        return given, f"{type(error).__name__}: {error}"
    return given, ""


def show(title: str, rows: list[dict[str, Any]]) -> None:
    """Print the rows of a part as Markdown."""
    names = [name for name in dict.fromkeys(name for entry in rows for name in entry) if name != "stages"]
    print(f"\n{title}\n\n| " + " | ".join(names) + " |\n" + "|---" * len(names) + "|")
    for entry in rows:
        print("| " + " | ".join(_cell(entry.get(name)) for name in names) + " |", flush=True)


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return "" if value is None else str(value)


def parse() -> argparse.Namespace:
    """Return the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--shape", default="qwen2.5-vl-7b")
    parser.add_argument("--layers", type=int)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--table", type=int, default=38000, help="tokens of Table 2's prompt")
    parser.add_argument("--throughput", type=int, nargs="+", default=[8192, 16384, 32768])
    parser.add_argument("--prefill", type=int, nargs="+", default=[8192, 16384, 32768])
    parser.add_argument("--kv-gib", type=float, help="KV memory of throughput; by default four stock sequences")
    parser.add_argument("--eager", action="store_true", help="leave the compiled rows out")
    parser.add_argument("--quick", action="store_true", help="one turn and few tokens")
    parser.add_argument("--out", type=Path, default=Path("benchmark-output/gpu.json"))
    return parser.parse_args()


def main() -> int:
    """Measure each part, print it, and write everything as JSON; return 1 where a part failed."""
    arguments, started = parse(), time.monotonic()
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    with torch_threads(1):
        run = Run(arguments)
        document: dict[str, Any] = {"shape": run.shape.describe(), "clock": clock_of(run.model)[1]}
        document |= {"device": torch.cuda.get_device_name() if run.device.type == "cuda" else "cpu"}
        document["failed"] = {}
        for part in arguments.parts:
            document[part], failure = gather(getattr(run, part)())
            document["failed"] |= {part: failure} if failure else {}
            show(part, document[part])
            written = document | circumstances(time.monotonic() - started)
            arguments.out.write_text(json.dumps(written, indent=1))
    return 1 if document["failed"] else 0


if __name__ == "__main__":
    sys.exit(main())
