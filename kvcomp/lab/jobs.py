"""The work of an ablation in pieces that any process can do: some samples of a task, under some configurations."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from itertools import groupby
from pathlib import Path
from typing import Any

from kvcomp.core.errors import InputError, KVCompError
from kvcomp.core.strategy import Strategy
from kvcomp.lab.ablation import in_mode
from kvcomp.lab.answers import Answers, SharedPrompt, answer
from kvcomp.lab.batches import Batch, QueryMode, make_batches
from kvcomp.lab.codec import Codec
from kvcomp.lab.controls import Method
from kvcomp.lab.outcomes import Outcome, judge
from kvcomp.lab.results import Configuration, Result
from kvcomp.lab.tasks import Sample, Task
from kvcomp.lab.testbed import LoadedTestbed, load_codec, load_testbed
from kvcomp.runtime.session import Session, attach


@dataclass(frozen=True)
class ModelSource:
    """A model that is not loaded yet: its name in results, its folder, how it is loaded, and samples per batch."""

    name: str
    folder: Path
    batch: int
    device: str = "cpu"
    dtype: str = "float32"
    device_map: str | None = None
    min_pixels: int | None = None
    max_pixels: int | None = None

    def codec(self) -> Codec:
        """Return its processor.

        Raises:
            InputError: it cannot be loaded.
        """
        return load_codec(self.folder, min_pixels=self.min_pixels, max_pixels=self.max_pixels)

    def load(self) -> LoadedTestbed:
        """Return the model.

        Raises:
            InputError: it cannot be loaded.
        """
        codec = self.codec()
        bed = load_testbed(self.folder, self.device, dtype=self.dtype, codec=codec, device_map=self.device_map)
        return replace(bed, name=self.name)


@dataclass(frozen=True)
class Cell:
    """A configuration with what it takes to answer under it: places in the lists of a `Work`."""

    configuration: Configuration
    model: int
    task: int
    seed: int
    mode: QueryMode
    method: Method


@dataclass(frozen=True)
class Work:
    """Everything that workers share. It can be sent to another process.

    Attributes:
        models: not loaded yet.
        tasks: see `Task`.
        cells: every configuration.
        max_new_tokens: length of an answer at most; None for what each task allows.
        forced: also measure likelihood, divergence and retention.
    """

    models: tuple[ModelSource, ...]
    tasks: tuple[Task, ...]
    cells: tuple[Cell, ...]
    max_new_tokens: int | None
    forced: bool


@dataclass(frozen=True)
class Job:
    """Samples to be answered under the same configurations, of one model, task, seed and query mode.

    Attributes:
        cells: places in `Work.cells`.
        samples: number and digest of each.
    """

    cells: tuple[int, ...]
    samples: tuple[tuple[int, str], ...]


@dataclass(frozen=True)
class Skipped:
    """A configuration that cannot be answered under: the strategy refuses the model or the budget."""

    configuration: Configuration
    reason: str


Message = list[Result] | Skipped


def split_of(seed: int) -> str:
    """Return the split of a task that a seed stands for; no training run has seen any of them."""
    return f"eval-{seed}"


class Worker:
    """Does jobs, one model in memory at a time. Its results are written by somebody else."""

    def __init__(self, work: Work) -> None:
        self.work = work
        self.skipped: set[int] = set()  # cells that failed, which are not tried again
        self._load = lru_cache(maxsize=1)(lambda model: work.models[model].load())

    def run(self, job: Job) -> Iterator[Message]:
        """Yield the results of one batch under one configuration after the other."""
        cells = {place: self.work.cells[place] for place in job.cells if place not in self.skipped}
        if not cells:
            return
        bed = self._load(self.work.cells[job.cells[0]].model)
        session = attach(bed.model)
        try:
            # What asks otherwise is read apart.
            for _, group in groupby(cells.items(), key=lambda entry: type(entry[1].method).ask):
                yield from self._run(session, bed, dict(group), dict(job.samples))
        finally:
            session.detach()

    def _run(
        self, session: Session, bed: LoadedTestbed, cells: Mapping[int, Cell], digests: Mapping[int, str]
    ) -> Iterator[Message]:
        first = next(iter(cells.values()))
        task, split, size = self.work.tasks[first.task], split_of(first.seed), self.work.models[first.model].batch
        drawn = [task.sample(split, number) for number in digests]
        try:
            samples = [first.method.ask(sample) for sample in drawn]
        except InputError as error:  # a control that has nothing to ask; the other configurations go on
            self.skipped |= cells.keys()
            yield from (Skipped(cell.configuration, str(error)) for cell in cells.values())
            return
        name = partial(task.name_sample, split)
        for batch in make_batches(bed, name, samples, size, first.mode, tuple(digests)):
            yield from self._answer(session, task, batch, cells, digests)

    def _answer(
        self, session: Session, task: Task, batch: Batch, cells: Mapping[int, Cell], digests: Mapping[int, str]
    ) -> Iterator[Message]:
        reader = _Reader(session, batch, list(cells.values()), self._settings(task))
        for place, cell in cells.items():
            if place in self.skipped:
                continue
            try:
                answers = reader.answer(cell)
                outcomes = list(judge(task, batch, answers, cell.mode))
            except KVCompError as error:
                self.skipped.add(place)
                yield Skipped(cell.configuration, str(error))
            else:
                yield [
                    make_result(cell.configuration, seen, sample, digests[seen.number], answers)
                    for seen, sample in zip(outcomes, batch.samples, strict=True)
                ]

    def _settings(self, task: Task) -> dict[str, Any]:
        return {"max_new_tokens": self.work.max_new_tokens or task.max_new_tokens, "forced": self.work.forced}


class _Reader:
    """A batch that is read once for all configurations; by each on its own where one of them cannot be served so."""

    def __init__(self, session: Session, batch: Batch, cells: Sequence[Cell], settings: Mapping[str, Any]) -> None:
        self.batch, self.settings = batch, {"mode": cells[0].mode, **settings}
        self.shared: SharedPrompt | None = None
        with suppress(KVCompError):  # the one that it is about says so when it is answered
            self.shared = SharedPrompt(session, batch, [self._strategy(cell) for cell in cells], **self.settings)

    def answer(self, cell: Cell) -> Answers:
        strategy = self._strategy(cell)
        if self.shared is not None:
            return self.shared.answer(strategy)
        return answer(self.batch, strategy, **self.settings)

    def _strategy(self, cell: Cell) -> Strategy:
        return in_mode(cell.method, cell.mode).strategy_for(self.batch)


def make_result(configuration: Configuration, seen: Outcome, sample: Sample, digest: str, answers: Answers) -> Result:
    """Return what is written down of one sample."""
    rows = len(answers.predictions)
    return Result(
        configuration=configuration,
        sample=seen.number,
        digest=digest,
        prediction=seen.prediction,
        reference=sample.answer,
        exact_match=seen.exact_match,
        score=seen.score,
        slot_accuracy=seen.slot_accuracy,
        prompt_tokens=seen.prompt_tokens,
        new_tokens=seen.new_tokens,
        kv_bytes=seen.kv_bytes,
        full_bytes=seen.full_bytes,
        slots=seen.slots,
        depth=sample.depth,
        compress_seconds=answers.compress_seconds / rows,
        decode_seconds=None if answers.decode_seconds is None else answers.decode_seconds / rows,
        answer_nll=seen.answer_nll,
        kl_to_full=seen.kl_to_full,
        rho=seen.rho,
        retention=seen.retention,
    )
