"""Peak memory of a prefill.

On a CUDA device its allocator knows. On a CPU every measurement is a fresh process, since memory that was freed is
taken again without the operating system noticing; there Linux's high-water mark of resident memory is read. In that
process the C library gives every large block back at once. As it comes it learns to keep blocks of up to 32 MiB once
one has been freed, and then the mark counts what nothing uses any more: up to a seventh, differently in every run.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kvcomp.core.config import strategy
from kvcomp.core.errors import InputError
from kvcomp.lab.bench.cases import Case
from kvcomp.lab.bench.shapes import Shape, build_model, find_shape
from kvcomp.lab.threads import torch_threads
from kvcomp.runtime.cache_argument import CACHE

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
GIVE_BACK = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
WARM_UP = 64  # tokens of a prompt that makes libraries take their own memory


def can_measure(device: torch.device) -> bool:
    """Return whether the peak is known here."""
    return device.type == "cuda" or (device.type == "cpu" and STATUS.exists() and CLEAR.exists())


def peak_on_cuda(model: nn.Module, shape: Shape, case: Case, tokens: int) -> int:
    """Return the bytes by which a prefill on a CUDA device grew at most."""
    parameter = next(model.parameters())
    prompt = shape.prompt(tokens, parameter.device, parameter.dtype)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    _prefill(model, prompt, case, tokens)
    return torch.cuda.max_memory_allocated() - before


def peak_on_cpu(shape: str, layers: int | None, case: Case, tokens: int, dtype: torch.dtype) -> int:
    """Return the bytes by which a prefill on the CPU grew at most, in a process of its own.

    Raises:
        InputError: the process failed.
    """
    made = None if case.strategy is None else case.strategy.dump()
    request = {"shape": shape, "layers": layers, "tokens": tokens, "strategy": made, "dtype": str(dtype)}
    request |= {"threads": torch.get_num_threads()}
    command = [sys.executable, "-m", "kvcomp.lab.bench.peak", json.dumps(request)]
    done = subprocess.run(command, check=False, capture_output=True, text=True, env=os.environ | GIVE_BACK)  # noqa: S603 (our own module)
    if done.returncode:
        lines = done.stderr.strip().splitlines() or ["it said nothing"]
        raise InputError(f"peak memory of {case.name!r} at {tokens} tokens cannot be measured: {lines[-1]}")
    return int(done.stdout.split()[-1])


def measure_here(request: Mapping[str, Any]) -> int:
    """Return the peak of a prefill in this process, which must be fresh."""
    dtype = getattr(torch, request["dtype"].removeprefix("torch."))
    shape = find_shape(request["shape"], request["layers"])
    made = request["strategy"]
    case = Case("measured", None if made is None else strategy(made))
    device = torch.device("cpu")
    with torch_threads(request["threads"]):
        model = build_model(shape, device, dtype)
        _prefill(model, shape.prompt(WARM_UP, device, dtype), _for_short_prompts(case), WARM_UP)
        prompt = shape.prompt(request["tokens"], device, dtype)
        CLEAR.write_text("5")  # the high-water mark starts anew
        before = _resident("VmRSS")
        _prefill(model, prompt, case, request["tokens"])
        return _resident("VmHWM") - before


def _for_short_prompts(case: Case) -> Case:
    if case.strategy is None:
        return case
    budget = replace(case.strategy.budget, or_smallest=True)
    return replace(case, strategy=replace(case.strategy, budget=budget))


@torch.inference_mode()
def _prefill(model: nn.Module, prompt: Mapping[str, Tensor], case: Case, tokens: int) -> None:
    with case.open(model, tokens, 1) as opened:
        model(**prompt, **{CACHE: opened.cache}, use_cache=True, logits_to_keep=1)


def _resident(field: str) -> int:
    """Return a line of the process's status, in bytes."""
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith(f"{field}:"))
    return int(line.split()[1]) * 1024


if __name__ == "__main__":
    sys.stdout.write(f"{measure_here(json.loads(sys.argv[1]))}\n")
