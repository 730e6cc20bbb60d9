"""How well a model answers under one method: exact match with its interval, and more where it is asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

from kvcomp.core.strategy import Strategy
from kvcomp.lab.answers import Answers, answer
from kvcomp.lab.batches import Batch, QueryMode, make_batches
from kvcomp.lab.controls import Method
from kvcomp.lab.outcomes import Outcome, judge
from kvcomp.lab.records import TaskRecord, is_learned
from kvcomp.lab.statistics import mean, wilson
from kvcomp.lab.tasks import Task
from kvcomp.lab.testbed import LoadedTestbed

SAMPLES = 200
"""How many samples are asked of a task that always has one more, where nobody says."""
POOL = 16
"""Batches whose samples are drawn, and sorted by length, together."""
FIELDS = {
    "exact_match": "share of the answers that are right to the last token; ci is its Wilson 95 % interval",
    "score": "mean of the task's own metric, which `metric` names",
    "slot_accuracy": "share of the answer's informative words that stand in their places",
    "learned": "whether the model answers the task with the full cache; null where nobody has measured it",
    "prompt_tokens": "length of the prompts",
    "kv_bytes": "bytes of keys and values held once prompt or context is compressed, mean per sample",
    "slots": "slots per layer and KV head held then, mean per sample",
    "answer_nll": "nats per token of the reference answer under the compressed cache; of its tokens that are "
    "predicted from it, which the first one is not where the question was seen",
    "kl_to_full": "nats per token, divergence of the predictions there from those of the full cache",
    "max_new_tokens": "length of an answer at most",
    "evidence_retention": "per layer and KV head, share of the evidence that has a slot of its own, unmerged",
}


@dataclass(frozen=True)
class TaskResult:
    """One task under one method; `FIELDS` says what the numbers are.

    Attributes:
        evidence_retention: None where it was not asked for, or no sample knows its evidence.
    """

    task: str
    metric: str
    samples: int
    learned: bool | None
    exact_match: float
    ci: tuple[float, float]
    score: float
    slot_accuracy: float
    prompt_tokens: dict[str, float]
    kv_bytes: float
    slots: float
    max_new_tokens: int
    answer_nll: float | None = None
    kl_to_full: float | None = None
    evidence_retention: tuple[tuple[float, ...], ...] | None = None

    @classmethod
    def of(
        cls, task: Task, outcomes: Sequence[Outcome], learned: bool | None = None, max_new_tokens: int | None = None
    ) -> TaskResult:
        """Return the means over what the samples of a task showed; without a limit of tokens, the task's own held."""
        right, lengths = sum(seen.exact_match for seen in outcomes), [seen.prompt_tokens for seen in outcomes]
        return cls(
            task=task.id,
            metric=task.metric,
            samples=len(outcomes),
            learned=learned,
            exact_match=right / len(outcomes),
            ci=wilson(right, len(outcomes)),
            score=mean(seen.score for seen in outcomes) or 0.0,
            slot_accuracy=mean(seen.slot_accuracy for seen in outcomes) or 0.0,
            prompt_tokens={"least": min(lengths), "mean": sum(lengths) / len(lengths), "most": max(lengths)},
            kv_bytes=mean(seen.kv_bytes for seen in outcomes) or 0.0,
            slots=mean(seen.slots for seen in outcomes) or 0.0,
            max_new_tokens=max_new_tokens or task.max_new_tokens,
            answer_nll=mean(seen.answer_nll for seen in outcomes),
            kl_to_full=mean(seen.kl_to_full for seen in outcomes),
            evidence_retention=_mean_retention(outcomes),
        )

    def to_dict(self) -> dict[str, Any]:
        """Return the result as plain data."""
        return asdict(self)

    def record(self, task: Task) -> TaskRecord:
        """Return what is written beside a model that gave this result with the full cache."""
        return TaskRecord(
            exact_match=self.exact_match,
            ci=self.ci,
            samples=self.samples,
            reference_tokens=int(self.prompt_tokens["most"]),
            learned=is_learned(task, self.exact_match),
        )


class Evaluation:
    """Samples of tasks, answered under one method. Batches are padded on the left and give each row what it gives
    alone.

    Args:
        bed: who answers.
        method: see `find_method`.
        samples: how many of each task, or all that it has if there are fewer; None for all, and 200 of a task that
            always has one more.
        split: of the tasks; no training run has seen one that begins with `eval-`.
        mode: whether the question is compressed with the context; if it comes later, nothing after the context is
            compressed (`turns: append`).
        batch: samples per batch.
        max_new_tokens: length of an answer at most; None for what each task allows.
        forced: also measure likelihood, divergence and retention, which takes about as long again.
    """

    def __init__(
        self,
        bed: LoadedTestbed,
        method: Method,
        *,
        samples: int | None,
        split: str,
        mode: QueryMode = QueryMode.question_seen,
        batch: int = 20,
        max_new_tokens: int | None = None,
        forced: bool = False,
    ) -> None:
        self.bed, self.method, self.mode = bed, method, mode
        self.samples, self.split, self.batch = samples, split, batch
        self.max_new_tokens, self.forced = max_new_tokens, forced

    def run(self, task: Task, on_sample: Callable[[str], None] = lambda name: None) -> TaskResult:
        """Return the result of one task; `on_sample` is told its name once for each sample that is answered.

        Raises:
            KVCompError: the strategy cannot serve this model or this budget, or evidence that it needs is not found.
        """
        outcomes: list[Outcome] = []
        for seen in self.outcomes(task):
            outcomes.append(seen)
            on_sample(task.id)
        return self.result(task, outcomes)

    def result(self, task: Task, outcomes: Sequence[Outcome]) -> TaskResult:
        """Return the means over what the samples of a task showed."""
        record = self.bed.records.get(task.id)
        return TaskResult.of(task, outcomes, None if record is None else record.learned, self.max_new_tokens)

    def outcomes(self, task: Task) -> Iterator[Outcome]:
        """Yield what each sample showed, in the order of their batches."""
        name = partial(task.name_sample, self.split)
        numbers = range(self.count(task))
        for start in range(0, len(numbers), POOL * self.batch):  # images of all samples at once may not fit
            drawn = numbers[start : start + POOL * self.batch]
            pool = [self.method.ask(task.sample(self.split, number)) for number in drawn]
            for batch in make_batches(self.bed, name, pool, self.batch, self.mode, drawn):
                yield from judge(task, batch, self._answer(task, batch), self.mode)

    def count(self, task: Task) -> int:
        """Return how many samples of a task are asked."""
        if task.size is None:
            return SAMPLES if self.samples is None else self.samples
        return task.size if self.samples is None else min(self.samples, task.size)

    def _answer(self, task: Task, batch: Batch) -> Answers:
        return answer(
            batch,
            self._in_mode(self.method.strategy_for(batch)),
            mode=self.mode,
            max_new_tokens=self.max_new_tokens or task.max_new_tokens,
            forced=self.forced,
        )

    @property
    def strategy(self) -> Strategy:
        """Return the strategy, before it is told of a batch."""
        return self._in_mode(self.method.strategy)

    def _in_mode(self, chosen: Strategy) -> Strategy:
        return replace(chosen, turns="append") if self.mode is QueryMode.question_later else chosen


def _mean_retention(outcomes: Sequence[Outcome]) -> tuple[tuple[float, ...], ...] | None:
    """Return the mean over the samples that know their evidence, per layer and KV head."""
    known = [seen.retention for seen in outcomes if seen.retention is not None]
    if not known:
        return None
    layers = zip(*known, strict=True)  # each one entry per sample
    return tuple(tuple(sum(head) / len(known) for head in zip(*layer, strict=True)) for layer in layers)
