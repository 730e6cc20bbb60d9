"""Running an ablation: what is left to do is done, written down as it comes, and told to whoever watches."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from kvcomp.core.errors import ResultsError
from kvcomp.lab.database import ResultsWriter, holds_results, read_study
from kvcomp.lab.engines import Engine
from kvcomp.lab.jobs import Job, Skipped, Worker
from kvcomp.lab.plan import Plan
from kvcomp.lab.provenance import differences
from kvcomp.lab.results import Result

PROBED = 4  # configurations that an estimate answers under


@dataclass
class Progress:
    """How far a sweep is.

    Attributes:
        total: answers that there are to be.
        known: of these, how many were there before.
        made: how many were made now.
        skipped: of configurations that cannot be, and why.
        right: per task, how many answers were made now, and how many of them are right to the last token.
        lost: why workers were lost.
    """

    total: int
    known: int = 0
    made: int = 0
    skipped: dict[str, Skipped] = field(default_factory=dict)
    right: dict[str, tuple[int, int]] = field(default_factory=dict)
    lost: list[str] = field(default_factory=list)
    started: float = field(default_factory=time.monotonic)

    @property
    def seconds_left(self) -> float | None:
        """Return how long the rest takes at the pace so far, None before anything was made."""
        if not self.made:
            return None
        return (time.monotonic() - self.started) / self.made * max(0, self.total - self.known - self.made)

    def add(self, results: Sequence[Result]) -> None:
        """Take note of what was made."""
        self.made += len(results)
        for result in results:
            asked, right = self.right.get(result.configuration.task, (0, 0))
            self.right[result.configuration.task] = asked + 1, right + result.exact_match


OnStep = Callable[[Progress], None]


def changes(folder: Path, plan: Plan) -> list[str]:
    """Return in what a folder's latest run differs from what is to be run now, each as `path: before -> now`.

    Raises:
        ResultsError: the results cannot be read.
    """
    if not holds_results(folder):
        return []
    try:
        run = read_study(folder).run
    except ResultsError as error:
        if "never began" in str(error):
            return []
        raise
    before = {"file": run.config, **run.environment}
    now = {"file": plan.file.model_dump(mode="json"), **plan.environment}
    return list(differences(before, now))


def sweep(plan: Plan, writer: ResultsWriter, engine: Engine, on_step: OnStep = lambda progress: None) -> Progress:
    """Do what a plan asks for and the folder does not hold yet.

    Args:
        plan: see `make_plan`.
        writer: of the folder.
        engine: who does it.
        on_step: told after every batch of answers, which is then on the disk.

    Raises:
        KVCompError: a model cannot be loaded, a sample cannot be made, or results cannot be written. What was written
            stays, and the next run goes on from there.
    """
    writer.begin(plan.planned, plan.file.model_dump(mode="json"), dict(plan.environment))
    progress = Progress(plan.answers)

    def on_known(count: int) -> None:
        progress.known += count
        on_step(progress)

    def again(job: Job) -> list[Job]:
        return plan.lacking(job.cells, job.samples, writer.known)

    for message in engine.run(plan.work, plan.jobs(writer.known, on_known, writer.draw), again, progress.lost.append):
        if isinstance(message, Skipped):
            _skip(writer, progress, message)
        else:
            writer.add(message)
            progress.add(message)
        on_step(progress)
    writer.finish()
    return progress


def estimate(plan: Plan) -> float:
    """Return the seconds that all answers of a plan may take one worker here, from a batch that is answered now.

    Raises:
        KVCompError: the model cannot be loaded, or a sample cannot be made.
    """
    group, worker = plan.groups[0], Worker(plan.work)
    size = min(plan.work.models[group.model].batch, plan.count(group))
    samples = tuple((number, "") for number in range(size))
    spread = group.cells[:: max(1, len(group.cells) // PROBED)][:PROBED]
    alone = min(_seconds(worker, Job(spread[:1], samples)) for _ in range(2))  # the first loads the model
    each = (_seconds(worker, Job(spread, samples)) - alone) / max(1, len(spread) - 1)
    each = each if len(spread) > 1 else 0.0
    return sum((alone + each * (len(own.cells) - 1)) * plan.count(own) / size for own in plan.groups)


def _seconds(worker: Worker, job: Job) -> float:
    started = time.perf_counter()
    for _ in worker.run(job):
        pass
    return time.perf_counter() - started


def _skip(writer: ResultsWriter, progress: Progress, skipped: Skipped) -> None:
    key = skipped.configuration.id
    if key in progress.skipped:
        return
    progress.skipped[key] = skipped
    writer.skip(skipped.configuration, skipped.reason)
