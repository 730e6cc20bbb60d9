"""Who does the jobs of an ablation: this process, or several on this machine. One alone writes results."""

from __future__ import annotations

import multiprocessing
import signal
import threading
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import Any

import torch
from transformers.utils import logging

from kvcomp.core.errors import KVCompError, WorkerError
from kvcomp.lab.jobs import Job, Message, Work, Worker

RETRIES = 3  # of a job whose worker was lost
Again = Callable[[Job], Sequence[Job]]
OnLost = Callable[[str], None]


@dataclass(frozen=True)
class Done:
    """The end of a job."""


@dataclass(frozen=True)
class Lost:
    """The end of a worker, and why if that is known."""

    reason: str


class Engine(ABC):
    """Does jobs, and yields what they give as it comes."""

    @abstractmethod
    def run(self, work: Work, jobs: Iterable[Job], again: Again, on_lost: OnLost) -> Iterator[Message]:
        """Yield the messages of all jobs.

        Args:
            work: what workers share.
            jobs: asked for one by one, when there is somebody to do them.
            again: returns what is left of a job whose worker was lost.
            on_lost: told why.

        Raises:
            KVCompError: a model cannot be loaded or a sample cannot be made; workers die again and again.
        """


class Inline(Engine):
    """This process does everything."""

    def run(self, work: Work, jobs: Iterable[Job], again: Again, on_lost: OnLost) -> Iterator[Message]:
        """Yield the messages of all jobs."""
        worker = Worker(work)
        for job in jobs:
            yield from worker.run(job)


class Crew(Engine):
    """Several workers, each of which does one job at a time. One that is lost is replaced, and its job done again."""

    def __init__(self, workers: int) -> None:
        self.workers = workers

    @abstractmethod
    def hire(self, work: Work) -> Any:
        """Return a new worker."""

    @abstractmethod
    def give(self, worker: Any, job: Job) -> None:
        """Have a worker do a job."""

    @abstractmethod
    def listen(self, workers: Sequence[Any]) -> Iterator[tuple[Any, Message | Done | Lost]]:
        """Yield what busy workers have to say, waiting until one of them has."""

    @abstractmethod
    def dismiss(self, worker: Any) -> None:
        """End a worker at once."""

    def run(self, work: Work, jobs: Iterable[Job], again: Again, on_lost: OnLost) -> Iterator[Message]:
        """Yield the messages of all jobs."""
        shift = _Shift(self, work, iter(jobs), again, on_lost)
        try:
            while shift.assign():
                for worker, message in self.listen(list(shift.busy)):
                    if isinstance(message, Done):
                        shift.finish(worker)
                    elif isinstance(message, Lost):
                        shift.replace(worker, message.reason)
                    else:
                        shift.tries = 0
                        yield message
        finally:
            shift.end()


class _Shift:
    """Who of a crew does what, and what is left to do."""

    def __init__(self, crew: Crew, work: Work, jobs: Iterator[Job], again: Again, on_lost: OnLost) -> None:
        self.crew, self.work, self.jobs, self.again, self.on_lost = crew, work, jobs, again, on_lost
        self.left: deque[Job] = deque()  # of workers that were lost
        self.busy: dict[Any, Job] = {}
        self.idle: list[Any] = []
        self.tries = 0  # workers lost since the last result

    def assign(self) -> bool:
        """Give everybody something to do; return whether anybody has."""
        while len(self.busy) < self.crew.workers and (job := self._next()) is not None:
            worker = self.idle.pop() if self.idle else self.crew.hire(self.work)
            self.busy[worker] = job
            self.crew.give(worker, job)
        return bool(self.busy)

    def finish(self, worker: Any) -> None:
        """Take note that a job is done."""
        del self.busy[worker]
        self.idle.append(worker)

    def replace(self, worker: Any, reason: str) -> None:
        """Put back what a lost worker has not done.

        Raises:
            WorkerError: several were lost, and nothing was done in between.
        """
        self.tries += 1
        self.left.extend(self.again(self.busy.pop(worker)))
        self.crew.dismiss(worker)
        if self.tries > RETRIES:
            raise WorkerError(
                f"{self.tries} workers were lost, the last one because {reason}; fewer --workers need less memory. Run "
                "the same command with --resume to go on"
            )
        self.on_lost(reason)

    def end(self) -> None:
        """Dismiss everybody."""
        for worker in (*self.busy, *self.idle):
            self.crew.dismiss(worker)

    def _next(self) -> Job | None:
        return self.left.popleft() if self.left else next(self.jobs, None)


class Processes(Crew):
    """Processes on this machine, one torch thread each."""

    def hire(self, work: Work) -> _Process:
        """Start a process."""
        return _Process(work)

    def give(self, worker: _Process, job: Job) -> None:
        """Send a job."""
        worker.pipe.send(job)

    def listen(self, workers: Sequence[_Process]) -> Iterator[tuple[_Process, Message | Done | Lost]]:
        """Yield one message of each process that has sent one, or has ended."""
        by_pipe = {worker.pipe: worker for worker in workers}
        for pipe in wait(list(by_pipe)):
            worker = by_pipe[pipe]  # type: ignore[index]
            try:
                message = worker.pipe.recv()
            except (EOFError, ConnectionError):
                worker.process.join()
                yield worker, Lost(f"its process ended with exit code {worker.process.exitcode}")
                continue
            if isinstance(message, KVCompError):
                raise message
            yield worker, message

    def dismiss(self, worker: _Process) -> None:
        """Kill the process."""
        worker.process.kill()
        worker.process.join()
        worker.pipe.close()


class _Process:
    """A process that does jobs, and our end of the pipe to it."""

    def __init__(self, work: Work) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=serve, args=(theirs, work), daemon=True)
        with _deaf():
            self.process.start()
        theirs.close()


@contextmanager
def _deaf() -> Iterator[None]:
    """Let processes that are started inside the block ignore Ctrl-C: it is for the one that writes, which ends them."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def prepare_process() -> None:
    """Make this process one that works for another: one torch thread, and nothing on the terminal but errors."""
    torch.set_num_threads(1)
    log: Any = logging
    log.set_verbosity_error()
    log.disable_progress_bar()


def serve(pipe: Connection, work: Work) -> None:
    """Do the jobs that come through a pipe, until it is closed or nobody listens any more."""
    prepare_process()
    worker = Worker(work)
    while True:
        try:
            job = pipe.recv()
        except EOFError:
            return
        try:
            for message in worker.run(job):
                pipe.send(message)
            pipe.send(Done())
        except KVCompError as error:
            pipe.send(error)
        except ConnectionError:
            return
