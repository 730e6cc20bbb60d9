"""What an ablation is going to do: every configuration, and the jobs that are still to be done."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from typing import Any

from kvcomp.lab.ablation import AblationFile, Variant, in_mode
from kvcomp.lab.batches import QueryMode
from kvcomp.lab.jobs import Cell, Job, ModelSource, Work, split_of
from kvcomp.lab.provenance import digest_folder, digest_sample, prompt_template, stop_ids, versions
from kvcomp.lab.records import read_records
from kvcomp.lab.results import UNLEARNED, Configuration, Planned, digest, result_key
from kvcomp.lab.tasks import Task

WINDOW = 10  # batches whose samples are in memory at a time


@dataclass(frozen=True)
class Group:
    """The cells of one model, task, seed and query mode, by their places in the work."""

    model: int
    task: int
    seed: int
    mode: QueryMode
    cells: tuple[int, ...]


@dataclass(frozen=True)
class Plan:
    """All configurations of an ablation.

    Attributes:
        file: what was asked for.
        work: what workers need.
        groups: the cells that are answered together.
        environment: versions and checkpoints, for the record.
    """

    file: AblationFile
    work: Work
    groups: tuple[Group, ...]
    environment: Mapping[str, Any]

    @cached_property
    def planned(self) -> tuple[Planned, ...]:
        """Return every configuration with its number of samples."""
        return tuple(
            Planned(self.work.cells[place].configuration, self.count(group))
            for group in self.groups
            for place in group.cells
        )

    @property
    def answers(self) -> int:
        """Return how many answers there are to be."""
        return sum(entry.samples for entry in self.planned)

    def count(self, group: Group) -> int:
        """Return how many samples each configuration of a group is asked."""
        size = self.work.tasks[group.task].size
        return self.file.samples if size is None else min(self.file.samples, size)

    def jobs(
        self,
        known: Callable[[Sequence[str]], Collection[str]],
        on_known: Callable[[int], None],
        on_drawn: Callable[[str, str, int, Mapping[int, str]], None],
    ) -> Iterator[Job]:
        """Yield what is still to be done. Nothing that is known is in it.

        Args:
            known: returns which of the results with these keys are there.
            on_known: told how many were found to be.
            on_drawn: told of model, task, seed, and the digests of samples that are asked, by their numbers.
        """
        digests: dict[tuple[int, int], dict[int, str]] = defaultdict(dict)
        for group in self.groups:
            task, seen = self.work.tasks[group.task], digests[group.task, group.seed]
            window = WINDOW * self.work.models[group.model].batch
            for start in range(0, self.count(group), window):
                numbers = range(start, min(start + window, self.count(group)))
                for number in numbers:
                    if number not in seen:
                        seen[number] = digest_sample(task.sample(split_of(group.seed), number))
                asked = {number: seen[number] for number in numbers}
                on_drawn(self.work.models[group.model].name, task.name, group.seed, asked)
                jobs = self.lacking(group.cells, list(asked.items()), known)
                lacking = sum(len(job.cells) * len(job.samples) for job in jobs)
                on_known(len(numbers) * len(group.cells) - lacking)
                yield from jobs

    def lacking(
        self,
        cells: Sequence[int],
        samples: Sequence[tuple[int, str]],
        known: Callable[[Sequence[str]], Collection[str]],
    ) -> list[Job]:
        """Return the jobs that these samples still take under these cells: those that lack the same are one."""
        keys = {
            (place, sample): result_key(self.work.cells[place].configuration, *sample)
            for place, sample in product(cells, samples)
        }
        there = known(list(keys.values()))
        lacks: dict[tuple[int, ...], list[tuple[int, str]]] = defaultdict(list)
        for sample in samples:
            lacks[tuple(place for place in cells if keys[place, sample] not in there)].append(sample)
        return [Job(places, tuple(asked)) for places, asked in lacks.items() if places]


def make_plan(
    file: AblationFile, models: Sequence[ModelSource], tasks: Sequence[Sequence[Task]], variants: Sequence[Variant]
) -> Plan:
    """Return the plan of a file whose names were looked up.

    Args:
        file: what is asked for.
        models: in its order.
        tasks: of each model.
        variants: see `make_variants`.
    """
    used = versions()
    about = [_describe(model, own) for model, own in zip(models, tasks, strict=True)]
    asked = list(dict.fromkeys(task for own in tasks for task in own))
    seeds = list(dict.fromkeys(file.seed))
    cells: list[Cell] = []
    groups = []
    for place, own in enumerate(tasks):
        details = {name: about[place][name] for name in ("checkpoint", "dtype", "device", "images")}
        details |= {"versions": used, "metrics": file.metrics}
        for task, seed, mode in product(own, seeds, file.modes):
            first = len(cells)
            limit = {"max_new_tokens": file.max_new_tokens or task.max_new_tokens, "task": task.describe()}
            for variant in variants:
                configuration = _configuration(models[place], task, seed, mode, variant, details | limit)
                cells.append(Cell(configuration, place, asked.index(task), seed, mode, variant.method))
            groups.append(Group(place, asked.index(task), seed, mode, tuple(range(first, len(cells)))))
    work = Work(tuple(models), tuple(asked), tuple(cells), file.max_new_tokens, file.metrics == "all")
    environment = {"versions": used, "models": {entry["name"]: entry for entry in about}}
    return Plan(file, work, tuple(groups), environment)


def _configuration(
    model: ModelSource, task: Task, seed: int, mode: QueryMode, variant: Variant, details: Mapping[str, Any]
) -> Configuration:
    method = in_mode(variant.method, mode)
    whole = {"method": type(method).__name__, "strategy": method.strategy.dump()}
    return Configuration(
        model=model.name,
        task=task.name,
        metric=task.metric,
        query_mode=str(mode),
        strategy=variant.name,
        budget=variant.budget,
        seed=seed,
        settings=dict(variant.settings),
        details=whole | dict(details),
    )


def _describe(model: ModelSource, tasks: Sequence[Task]) -> dict[str, Any]:
    records = read_records(model.folder)
    template = prompt_template(model.folder)
    return {
        "name": model.name,
        "checkpoint": digest_folder(model.folder),
        "dtype": model.dtype,
        "device": model.device_map or model.device,
        "images": {"min_pixels": model.min_pixels, "max_pixels": model.max_pixels},
        "template": template,
        UNLEARNED: [task.name for task in tasks if task.id in records and not records[task.id].learned],
        "template_digest": None if template is None else digest(template),
        "stop_ids": stop_ids(model.folder),
    }
