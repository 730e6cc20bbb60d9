"""SnapKV at 20 %, ours and that of kvpress, each beside DynamicCache in a run of its own environment.

    python benchmarks/speed_peers.py [--environment build/peers] [--tokens 2048 4096 8192 16384] [--out FILE]
    python benchmarks/speed_peers.py --device cuda --tokens 8192 16384 32768

kvpress needs an older transformers than kvcomp, so the script makes a virtual environment with it (as
`envelope_peers.py` does) and runs itself there, on the same random Llama and the same prompts, with one thread.
Seconds of two environments are not compared: each number is a ratio to the DynamicCache of the same environment, whose
tokens are decoded in turns with the compressed ones. On a GPU the model has the shape of Llama 3.1 8B, in bfloat16.
Where packages cannot be fetched, `--inside kvpress` and `--inside kvcomp`, each run by a Python that has the library,
print one side.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

ROOT = Path(__file__).parents[1]
REMOVED = 0.8
SHAPE = {"vocab_size": 1024, "hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 6}
SHAPE |= {"num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 64}
LARGE = {"vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32}
LARGE |= {"num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128}

Open = Callable[[Any], AbstractContextManager[Any]]


@contextmanager
def opened_by_kvpress(model: Any) -> Any:
    """Give a cache that kvpress compresses while the block is open: its presses wrap the prefill alone."""
    from kvpress import SnapKVPress

    with SnapKVPress(compression_ratio=REMOVED)(model):
        yield DynamicCache(config=model.config)


@contextmanager
def opened_by_kvcomp(model: Any) -> Any:
    """Give a cache that kvcomp compresses."""
    from kvcomp import compress

    with compress(model, "snapkv", 1 - REMOVED) as cache:
        yield cache


@contextmanager
def opened_by_transformers(model: Any) -> Any:
    """Give the stock cache."""
    yield DynamicCache(config=model.config)


def build(device: str) -> Any:
    """Return the model with seeded random weights."""
    torch.manual_seed(0)
    on_cpu = device == "cpu"
    config = LlamaConfig(**(SHAPE if on_cpu else LARGE), max_position_embeddings=131072, eos_token_id=None)
    torch.set_default_dtype(torch.float32 if on_cpu else torch.bfloat16)
    with torch.device(device):
        return LlamaForCausalLM(config).eval()


def now(device: str) -> float:
    """Return the CPU time of this thread; of a device the time, once all that it was given is done."""
    if device == "cpu":
        return time.thread_time()
    torch.accelerator.synchronize()
    return time.perf_counter()


class Side:
    """One kind of cache with a model of its own, so that what a library does to its model slows no other.

    Args:
        model: for it alone.
        opens: gives the cache.
        inside: whether decoding belongs inside the block too.
    """

    def __init__(self, model: Any, opens: Open, *, inside: bool) -> None:
        self.model, self.opens, self.inside = model, opens, inside
        self.token: Any = None
        self.cache: Any = None
        self.block: Any = None

    def read(self, prompt: Any) -> float:
        """Read a prompt into a new cache, and return the seconds until its first token."""
        self.close()
        self.block = self.opens(self.model)
        self.cache = self.block.__enter__()
        started = now(prompt.device.type)
        self._step(prompt)
        seconds = now(prompt.device.type) - started
        if not self.inside:
            self.close()
        return seconds

    def decode(self) -> float:
        """Decode one token, and return its seconds."""
        started = now(self.token.device.type)
        self._step(self.token)
        return now(self.token.device.type) - started

    def close(self) -> None:
        """Leave the block, if it is open."""
        if self.block is not None:
            self.block.__exit__(None, None, None)
            self.block = None

    def _step(self, ids: Any) -> None:
        output = self.model(input_ids=ids, past_key_values=self.cache, use_cache=True, logits_to_keep=1)
        self.token = output.logits[:, -1:].argmax(dim=-1)


@torch.inference_mode()
def measure(library: str, device: str, tokens: list[int], repeats: int, decoded: int) -> list[dict[str, float]]:
    """Return, for each length, prefill and decode of SnapKV and what the stock cache takes, in this environment."""
    torch.set_num_threads(1)
    opens, inside = (opened_by_kvpress, False) if library == "kvpress" else (opened_by_kvcomp, True)
    mine, stock = Side(build(device), opens, inside=inside), Side(build(device), opened_by_transformers, inside=False)
    return [_measure_at(count, mine, stock, repeats, decoded) for count in (min(tokens), *tokens)][1:]


def _measure_at(tokens: int, mine: Side, stock: Side, repeats: int, decoded: int) -> dict[str, float]:
    prompt = torch.randint(0, 1024, (1, tokens), generator=torch.Generator().manual_seed(tokens)).to(mine.model.device)
    prefills, steps = [], []
    for turn in range(repeats):
        order = (mine, stock) if turn % 2 else (stock, mine)
        seconds = {side: side.read(prompt) for side in order}
        prefills.append(seconds[mine] / seconds[stock])
        for step in range(decoded):
            order = (mine, stock) if step % 2 else (stock, mine)
            taken = {side: side.decode() for side in order}
            steps.append((taken[mine], taken[stock]))
        mine.close()
    ours, theirs = (statistics.median(step[place] for step in steps) for place in (0, 1))
    return {
        "tokens": tokens,
        "prefill_ratio": statistics.median(prefills),
        "decode_ratio": ours / theirs,
        "decode_seconds": ours,
        "stock_decode_seconds": theirs,
    }


def make_environment(folder: Path) -> Path:
    """Return the Python of a virtual environment with kvpress; it is made where there is none."""
    from envelope_peers import make_environment as made

    return made(folder)


def run_inside(python: Path, library: str, arguments: argparse.Namespace) -> list[dict[str, float]]:
    """Return what `measure` finds in the environment of a Python."""
    path = os.pathsep.join(str(ROOT / name) for name in ("", "strategies", "adapters"))
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path if library == "kvcomp" else ""}
    command = [str(python), str(Path(__file__).resolve()), "--inside", library]
    command += ["--repeats", str(arguments.repeats), "--decode", str(arguments.decode), "--device", arguments.device]
    command += ["--tokens", *map(str, arguments.tokens)]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    found: list[dict[str, float]] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> None:
    """Run what the command line asks for."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--environment", type=Path, default=ROOT / "build" / "peers")
    parser.add_argument("--tokens", type=int, nargs="+", default=[2048, 4096, 8192, 16384])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--decode", type=int, default=32)
    parser.add_argument("--out", type=Path, default=Path("benchmark-output/speed_peers.json"))
    parser.add_argument("--inside", choices=("kvcomp", "kvpress"), help="measure here; for the environments themselves")
    arguments = parser.parse_args()
    if arguments.inside:
        settings = (arguments.device, arguments.tokens, arguments.repeats, arguments.decode)
        print(json.dumps(measure(arguments.inside, *settings)))
        return
    peer = make_environment(arguments.environment.resolve())
    found = {"kvcomp": run_inside(Path(sys.executable), "kvcomp", arguments)}
    found["kvpress"] = run_inside(peer, "kvpress", arguments)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(found, indent=1))
    print("| tokens | prefill, kvcomp | prefill, kvpress | decode, kvcomp | decode, kvpress |")
    print("|---|---|---|---|---|")
    for ours, theirs in zip(found["kvcomp"], found["kvpress"], strict=True):
        cells = [side[name] for name in ("prefill_ratio", "decode_ratio") for side in (ours, theirs)]
        print(f"| {ours['tokens']:,} | " + " | ".join(f"{cell:.3f}" for cell in cells) + " |")


if __name__ == "__main__":
    main()
