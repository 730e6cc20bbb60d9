"""An ablation on a Ray cluster: one actor per replica of the model, jobs streamed to whoever is free.

Ray is an optional dependency (`pip install 'kvcomp[ray]'`). Without a running cluster one is started on this machine;
`RAY_ADDRESS` names another. Every machine of a cluster needs kvcomp, its plugins, and the models and data at the same
paths. Results travel to the one process that writes them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from kvcomp.core.errors import InputError, KVCompError, WorkerError
from kvcomp.lab.engines import Again, Crew, Done, Lost, OnLost, prepare_process
from kvcomp.lab.jobs import Job, Message, Work, Worker


class RayActors(Crew):
    """Actors of a Ray cluster, each with one CPU, and one GPU where a model asks for CUDA.

    Raises:
        InputError: Ray is not installed.
    """

    def __init__(self, workers: int) -> None:
        super().__init__(workers)
        self.ray = _import_ray()

    def run(self, work: Work, jobs: Iterable[Job], again: Again, on_lost: OnLost) -> Iterator[Message]:
        """Yield the messages of all jobs; a cluster that was started for them is ended with them."""
        started = not self.ray.is_initialized()
        try:
            if started:
                self.ray.init(log_to_driver=False, logging_level="ERROR", include_dashboard=False)
        except (ConnectionError, RuntimeError, ValueError) as error:
            raise WorkerError(f"the Ray cluster cannot be reached, or none be started here: {error}") from error
        try:
            yield from super().run(work, jobs, again, on_lost)
        finally:
            if started:
                self.ray.shutdown()

    def hire(self, work: Work) -> _Actor:
        """Start an actor."""
        gpus = any(model.device == "cuda" or model.device_map for model in work.models)
        make = self.ray.remote(num_cpus=1, num_gpus=int(gpus), max_restarts=0)(_Served)
        return _Actor(make.remote(work))

    def give(self, worker: _Actor, job: Job) -> None:
        """Have an actor do a job, and stream what it gives."""
        worker.stream = worker.handle.run.options(num_returns="streaming").remote(job)

    def listen(self, workers: Sequence[_Actor]) -> Iterator[tuple[_Actor, Message | Done | Lost]]:
        """Yield one message of each actor that has one."""
        by_stream = {worker.stream: worker for worker in workers}
        ready, _ = self.ray.wait(list(by_stream), num_returns=1)
        for stream in ready:
            yield by_stream[stream], self._receive(stream)

    def dismiss(self, worker: _Actor) -> None:
        """Kill the actor."""
        self.ray.kill(worker.handle)

    def _receive(self, stream: Any) -> Message | Done | Lost:
        errors = self.ray.exceptions
        try:
            message: Message = self.ray.get(next(stream))
        except StopIteration:
            return Done()
        except errors.RayTaskError as error:
            if isinstance(error.cause, KVCompError):
                raise error.cause from None
            raise
        except (errors.RayActorError, errors.WorkerCrashedError, errors.ObjectLostError) as error:
            return Lost(str(error).strip().splitlines()[0])
        return message


class _Actor:
    """An actor, and the stream of the job that it is doing."""

    def __init__(self, handle: Any) -> None:
        self.handle = handle
        self.stream: Any = None


class _Served:
    """What an actor runs."""

    def __init__(self, work: Work) -> None:
        prepare_process()
        self.worker = Worker(work)

    def run(self, job: Job) -> Iterator[Message]:
        yield from self.worker.run(job)


def _import_ray() -> Any:
    try:
        import ray  # an optional dependency
    except ImportError as error:
        raise InputError("--engine ray needs Ray, which is not installed: pip install 'kvcomp[ray]'") from error
    return ray
