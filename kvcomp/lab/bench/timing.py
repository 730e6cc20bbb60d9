"""One run: a prompt is read, tokens are decoded, and every part of it is timed."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache

from kvcomp.core.stages import STAGES, Stage, watching
from kvcomp.lab.bench.cases import Case, Forward
from kvcomp.runtime.cache import CompressedCache
from kvcomp.runtime.cache_argument import CACHE

Clock = Callable[[], float]


@dataclass(frozen=True)
class Timing:
    """What one run showed; times in seconds.

    Attributes:
        prefill: until the first token is known.
        stages: of the prefill, what each stage of the compression took; empty where nothing is compressed.
        decode: median time of a token.
        decode_mean: mean time of a token, which growth of a buffer belongs to.
        kv_bytes: keys and values after the prefill.
        held_bytes: keys, values and room for more once all tokens are decoded.
        bookkeeping_bytes: what is held beside them then.
    """

    prefill: float
    stages: Mapping[Stage, float]
    decode: float
    decode_mean: float
    kv_bytes: int
    held_bytes: int
    bookkeeping_bytes: int


def clock_of(model: Any) -> tuple[Clock, str]:
    """Return the clock that times are read from, and its name.

    On a CPU with one thread it is the thread's own time, which what else the machine does hardly moves. On a device
    that works on its own it waits for the device first.
    """
    if model.device.type != "cpu":
        return _device_clock, "wall, after synchronising"
    return (time.thread_time, "CPU time of one thread") if torch.get_num_threads() == 1 else (time.perf_counter, "wall")


def _device_clock() -> float:
    torch.accelerator.synchronize()
    return time.perf_counter()


@torch.inference_mode()
def time_case(model: nn.Module, prompt: Mapping[str, Tensor], case: Case, decoded: int) -> Timing:
    """Return the times of one prefill and of `decoded` tokens."""
    clock, _ = clock_of(model)
    tokens = _count(prompt)
    with case.open(model, tokens, decoded) as opened:
        watched: Any = nullcontext() if case.strategy is None else watching(clock)
        started = clock()
        with watched as watch:
            token = _next(model(**prompt, **{CACHE: opened.cache}, use_cache=True, logits_to_keep=1))
        prefill = clock() - started
        kv_bytes = _kv_bytes(opened.cache)
        steps = _decode(opened.step, opened.cache, token, decoded, clock)
        held, bookkeeping = _held_bytes(opened.cache)
    stages = {} if watch is None else {name: watch.seconds[name] for name in STAGES}
    return Timing(prefill, stages, statistics.median(steps), statistics.fmean(steps), kv_bytes, held, bookkeeping)


@torch.inference_mode()
def tokens_per_second(model: nn.Module, prompt: Mapping[str, Tensor], case: Case, decoded: int, batch: int) -> float:
    """Return how many tokens a batch of sequences decodes in a second. The prompt is read once, and its cache repeated
    for each sequence.
    """
    clock, _ = clock_of(model)
    with case.open(model, _count(prompt), decoded) as opened:
        token = _next(model(**prompt, **{CACHE: opened.cache}, use_cache=True, logits_to_keep=1))
        opened.cache.batch_repeat_interleave(batch)
        steps = _decode(opened.step, opened.cache, token.repeat_interleave(batch, dim=0), decoded, clock)
    return batch * decoded / sum(steps)


def _decode(step: Forward, cache: Cache, token: Tensor, decoded: int, clock: Clock) -> list[float]:
    """Return the seconds of each token."""
    seconds = []
    for _ in range(decoded):
        started = clock()
        token = _next(step(input_ids=token, **{CACHE: cache}, use_cache=True))
        seconds.append(clock() - started)
    return seconds


def _next(output: Any) -> Tensor:
    token: Tensor = output.logits[:, -1:].argmax(dim=-1)
    return token


def _count(prompt: Mapping[str, Tensor]) -> int:
    return int(next(iter(prompt.values())).shape[1])


def _kv_bytes(cache: Cache) -> int:
    return cache.report().allocated_bytes if isinstance(cache, CompressedCache) else _stock_bytes(cache)


def _held_bytes(cache: Cache) -> tuple[int, int]:
    """Return the bytes of keys, values and room, and those of everything beside."""
    if not isinstance(cache, CompressedCache):
        return _stock_bytes(cache), 0
    report = cache.report()
    return report.allocated_bytes + report.reserved_bytes, report.bookkeeping_bytes


def _stock_bytes(cache: Cache) -> int:
    layers: Any = cache.layers
    return sum(layer.keys.nbytes + layer.values.nbytes for layer in layers)
