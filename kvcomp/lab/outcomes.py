"""What one sample showed under one method: the unit that every result is computed from."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from kvcomp.lab.answers import Answers
from kvcomp.lab.batches import Batch, QueryMode
from kvcomp.lab.metrics import answer_nll, evidence_retention, kl_divergence, slot_accuracy
from kvcomp.lab.tasks import Task
from kvcomp.runtime.report import Report


@dataclass(frozen=True)
class Outcome:
    """One sample.

    Attributes:
        number: of the sample in its source.
        prediction: what was answered.
        exact_match: whether it is right to the last token.
        score: of the task's own metric.
        slot_accuracy: see `metrics.slot_accuracy`.
        prompt_tokens: length of the prompt.
        new_tokens: length of the answer.
        kv_bytes: keys and values that the cache held for this sample, see `answers.Held`.
        full_bytes: what they would take in full.
        slots: per KV head, mean over layers.
        rho: per layer, the share of attention that crosses modalities; None where not measured.
        answer_nll: of the reference answer, in nats per token; None where not asked for.
        kl_to_full: divergence from the full cache's predictions there, in nats per token; None where not asked for.
        retention: per layer and KV head, see `metrics.evidence_retention`; None where not asked for or not known.
    """

    number: int
    prediction: str
    exact_match: bool
    score: float
    slot_accuracy: float
    prompt_tokens: int
    new_tokens: int
    kv_bytes: float
    full_bytes: float
    slots: float
    rho: tuple[float | None, ...]
    answer_nll: float | None = None
    kl_to_full: float | None = None
    retention: tuple[tuple[float, ...], ...] | None = None


def judge(task: Task, batch: Batch, answers: Answers, mode: QueryMode) -> Iterator[Outcome]:
    """Yield what each sample of a batch showed. What takes forced logits is measured where the answers have them.

    With `question_seen` the first token of an answer is still predicted from the full cache, so likelihood and
    divergence are taken from the second on.
    """
    report = answers.held.report
    num_bytes, prompts = _row_bytes(report), batch.inputs["attention_mask"].sum(dim=1).tolist()
    likelihoods, divergences, retentions = _forced(batch, answers, mode)
    for row, (sample, prediction) in enumerate(zip(batch.samples, answers.predictions, strict=True)):
        yield Outcome(
            number=batch.numbers[row],
            prediction=prediction,
            exact_match=task.exact_match(prediction, sample),
            score=task.score(prediction, sample),
            slot_accuracy=slot_accuracy(prediction, sample),
            prompt_tokens=prompts[row],
            new_tokens=answers.lengths[row],
            kv_bytes=num_bytes[row],
            full_bytes=sum(layer.full_bytes * layer.tokens[row] / sum(layer.tokens) for layer in report.layers),
            slots=sum(layer.slots[row] for layer in report.layers) / len(report.layers),
            rho=tuple(layer.rho[row] for layer in report.layers),
            answer_nll=likelihoods[row],
            kl_to_full=divergences[row],
            retention=retentions[row],
        )


def _row_bytes(report: Report) -> list[float]:
    """Return the bytes of each row: those of a layer are divided as its slots are."""
    rows = range(len(report.layers[0].slots))
    shares = [(layer.allocated_bytes / sum(layer.slots), layer.slots) for layer in report.layers]
    return [sum(slot_bytes * slots[row] for slot_bytes, slots in shares) for row in rows]


_Forced = tuple[list[float | None], list[float | None], list[tuple[tuple[float, ...], ...] | None]]


def _forced(batch: Batch, answers: Answers, mode: QueryMode) -> _Forced:
    """Return likelihood, divergence and retention of each row."""
    if answers.logits is None:
        unknown: list[None] = [None] * len(batch.samples)
        return list(unknown), list(unknown), list(unknown)
    first = 1 if mode is QueryMode.question_seen else 0
    targets, logits, reference = (side[:, first:] for side in (batch.targets, answers.logits, batch.full_logits))
    retentions = [_retention(batch, answers, row) for row in range(len(batch.samples))]
    return answer_nll(logits, targets), kl_divergence(reference, logits, targets >= 0), retentions


def _retention(batch: Batch, answers: Answers, row: int) -> tuple[tuple[float, ...], ...] | None:
    evidence = batch.evidence[row]
    if not evidence:
        return None
    tables = zip(answers.held.indices, answers.held.counts, strict=True)
    return tuple(tuple(evidence_retention(indices[row], counts[row], evidence)) for indices, counts in tables)
