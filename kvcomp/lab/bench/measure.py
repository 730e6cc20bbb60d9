"""Every case on the same prompts, in turns, and ratios to the stock cache taken inside each turn."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from kvcomp.core.errors import KVCompError
from kvcomp.core.stages import STAGES
from kvcomp.lab.bench.cases import Case
from kvcomp.lab.bench.shapes import Shape
from kvcomp.lab.bench.timing import Timing, time_case, tokens_per_second

FAILURES = (KVCompError, torch.OutOfMemoryError, NotImplementedError)
"""Keep one case from running, and not the others."""
SEQUENCES = 4
"""How many sequences of the stock cache fit into the KV memory that throughput is measured at, where nobody says."""


FIELDS = {
    "prefill": "seconds until the first token is known",
    "prefill_ratio": "to the stock cache in the same turn; so are all ratios",
    "stages": "seconds of the prefill that each stage of the compression took, medians over turns",
    "overhead": "the same as shares of the stock cache's prefill",
    "decode": "seconds per token, the median token of each turn",
    "decode_mean": "seconds per token, the mean token of each turn: what a growing buffer costs belongs to it",
    "kv_bytes": "bytes of keys and values after the prefill, one sequence",
    "held_bytes": "bytes of keys, values and room for more once all tokens are decoded, one sequence",
    "bookkeeping_bytes": "bytes of indices, counts and positions beside them",
    "throughput": "decoding with as many sequences as fit into kv_memory bytes by held_bytes (largest_batch), or as "
    "were allowed (batch); the prompt is read once and its cache repeated",
    "peak_bytes": "bytes by which memory grew at most during a prefill, beyond the model and the prompt",
    "skipped": "why there are no numbers; empty where there are",
}


@dataclass(frozen=True)
class Spread:
    """A number that was taken several times."""

    median: float
    mean: float
    least: float
    most: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Return the spread of at least one number.

        >>> Spread.of([3.0, 1.0, 2.0])
        Spread(median=2.0, mean=2.0, least=1.0, most=3.0)
        """
        return cls(statistics.median(values), statistics.fmean(values), min(values), max(values))


@dataclass(frozen=True)
class Throughput:
    """Decoding at a fixed KV memory.

    Attributes:
        kv_memory: bytes that are there for caches.
        largest_batch: how many sequences fit, with what they decode.
        batch: how many were decoded: as many as fit, or the most that was allowed.
        tokens_per_second: median over turns.
        ratio: to the stock cache in the same turn.
    """

    kv_memory: int
    largest_batch: int
    batch: int
    tokens_per_second: float
    ratio: Spread


@dataclass(frozen=True)
class Found:
    """One case at one prompt length; `FIELDS` says what the numbers are."""

    tokens: int
    case: str
    budget: float | str
    prefill: Spread | None = None
    prefill_ratio: Spread | None = None
    stages: dict[str, float] | None = None
    overhead: dict[str, float] | None = None
    decode: Spread | None = None
    decode_ratio: Spread | None = None
    decode_mean: Spread | None = None
    decode_mean_ratio: Spread | None = None
    kv_bytes: int | None = None
    held_bytes: int | None = None
    bookkeeping_bytes: int | None = None
    throughput: Throughput | None = None
    peak_bytes: int | None = None
    skipped: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Return it as plain data."""
        return asdict(self)


@dataclass(frozen=True)
class Bench:
    """What is measured.

    In every turn each case runs once, in an order that rotates; one turn more, which is not counted, warms up. So what
    else the machine does hits all cases alike, and a ratio never compares two runs.

    Attributes:
        shape: of the model.
        model: in evaluation mode.
        cases: the first is what ratios are to.
        repeats: turns that count.
        decoded: tokens per turn.
        throughput: whether decoding at a fixed KV memory is measured too.
        kv_memory: bytes for it; None for what `SEQUENCES` of the stock cache take.
        largest: the largest batch that is decoded, however many fit.
    """

    shape: Shape
    model: nn.Module
    cases: Sequence[Case]
    repeats: int = 5
    decoded: int = 32
    throughput: bool = True
    kv_memory: int | None = None
    largest: int = 64

    @property
    def steps(self) -> int:
        """Return how many times `run` calls `on_step` for one length."""
        return len(self.cases) * (self.repeats + 1) * (2 if self.throughput else 1)

    def run(self, tokens: int, on_step: Callable[[str], None] = lambda what: None) -> list[Found]:
        """Return what each case showed with a prompt of this length; `on_step` is told of each run before it."""
        if any(case.compiled for case in self.cases):
            self._forget_compiled()  # another length means other shapes, and the compiler keeps a limited number
        parameter = next(self.model.parameters())
        prompt = self.shape.prompt(tokens, parameter.device, parameter.dtype)

        def timed(case: Case) -> Timing:
            return time_case(self.model, prompt, case, self.decoded)

        timings, failures = self._in_turns(timed, f"{tokens} tokens", on_step)
        found = [self._summarize(tokens, case, timings, failures) for case in self.cases]
        if not self.throughput or 0 not in timings:
            return found
        return self._with_throughput(tokens, prompt, found, on_step)

    def _with_throughput(
        self, tokens: int, prompt: Mapping[str, Tensor], found: Sequence[Found], on_step: Callable[[str], None]
    ) -> list[Found]:
        """Return what was found with the throughput of every case that ran."""
        held = {number: entry.held_bytes for number, entry in enumerate(found) if entry.held_bytes is not None}
        memory = self.kv_memory or SEQUENCES * held[0]
        fits = {number: memory // size for number, size in held.items()}

        def counted(case: Case) -> float:
            batch = self._batch(fits[self.cases.index(case)])
            return tokens_per_second(self.model, prompt, case, self.decoded, batch)

        runnable = {number for number in held if not self.cases[number].compiled}
        rates, _ = self._in_turns(counted, f"{tokens} tokens, throughput", on_step, runnable)
        if 0 not in rates:
            return list(found)
        return [
            replace(entry, throughput=self._rate(rates[number], rates[0], memory, fits[number]))
            if number in rates
            else entry
            for number, entry in enumerate(found)
        ]

    def _forget_compiled(self) -> None:
        for case in self.cases:
            case.forget()
        torch.compiler.reset()

    def _rate(self, rates: Sequence[float], stock: Sequence[float], memory: int, fits: int) -> Throughput:
        ratio = Spread.of([mine / other for mine, other in zip(rates, stock, strict=True)])
        return Throughput(memory, fits, self._batch(fits), statistics.median(rates), ratio)

    def _batch(self, fits: int) -> int:
        return max(1, min(self.largest, fits))

    def _in_turns(
        self,
        run: Callable[[Case], Any],
        what: str,
        on_step: Callable[[str], None],
        numbers: set[int] | None = None,
    ) -> tuple[dict[int, list[Any]], dict[int, str]]:
        """Return what each case gave in each turn that counts, by its number, and why others gave nothing."""
        order = [number for number in range(len(self.cases)) if numbers is None or number in numbers]
        given: dict[int, list[Any]] = {number: [] for number in order}
        failures: dict[int, str] = {}
        for turn in range(self.repeats + 1):
            start = turn % len(order)
            for number in order[start:] + order[:start]:
                on_step(f"{what}: {self.cases[number].name}")
                if number in failures:
                    continue
                try:
                    value = run(self.cases[number])
                except FAILURES as error:
                    failures[number] = _reason(error)
                except Exception as error:
                    if not self.cases[number].compiled:
                        raise
                    failures[number] = _reason(error)  # compilers raise what they like
                else:
                    given[number] += [value] if turn else []
        return {number: values for number, values in given.items() if number not in failures}, failures

    def _summarize(self, tokens: int, case: Case, timings: dict[int, list[Timing]], failures: dict[int, str]) -> Found:
        number = self.cases.index(case)
        stock = timings.get(0)
        if number in failures or stock is None:
            return Found(tokens, case.name, case.budget, skipped=failures.get(number) or f"{failures[0]} (stock cache)")
        runs = timings[number]

        def ratio(name: str) -> Spread:
            return Spread.of([_at(mine, name) / _at(other, name) for mine, other in zip(runs, stock, strict=True)])

        compressed = case.strategy is not None
        return Found(
            tokens=tokens,
            case=case.name,
            budget=case.budget,
            prefill=Spread.of([run.prefill for run in runs]),
            prefill_ratio=ratio("prefill"),
            stages={name: statistics.median(run.stages[name] for run in runs) for name in STAGES}
            if compressed
            else None,
            overhead=_overhead(runs, stock) if compressed else None,
            decode=Spread.of([run.decode for run in runs]),
            decode_ratio=ratio("decode"),
            decode_mean=Spread.of([run.decode_mean for run in runs]),
            decode_mean_ratio=ratio("decode_mean"),
            kv_bytes=runs[0].kv_bytes,
            held_bytes=runs[0].held_bytes,
            bookkeeping_bytes=runs[0].bookkeeping_bytes,
        )


def _overhead(runs: Sequence[Timing], stock: Sequence[Timing]) -> dict[str, float]:
    pairs = list(zip(runs, stock, strict=True))
    return {name: statistics.median(run.stages[name] / other.prefill for run, other in pairs) for name in STAGES}


def _at(timing: Timing, name: str) -> float:
    value: float = getattr(timing, name)
    return value


def _reason(error: BaseException) -> str:
    """Return what an error says, without the traces that compilers add."""
    return " ".join(str(error).split("\n\n")[0].split()) or type(error).__name__
