"""What an ablation finds: configurations, the result of each sample under them, and what a run planned.

A result is keyed by a hash of everything that determines it, so that a run that was killed goes on where it was, and a
result of another model, method or version is never taken for one of this.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from functools import cached_property
from typing import Any

FORMAT = 1  # of keys and of files
UNLEARNED = "unlearned"  # in what a run notes of a model: the tasks that it does not answer with the full cache
COLUMNS = ("model", "task", "query_mode", "strategy", "budget", "seed")  # of a configuration, in this order


@dataclass(frozen=True)
class Configuration:
    """Everything that determines an answer, beside the sample.

    Attributes:
        model: its name.
        task: its name.
        metric: what `score` measures.
        query_mode: `question_seen` or `question_later`.
        strategy: its name; two configurations of one name differ in `settings` or in `budget`.
        settings: what the grid changed of it, by path (`policy.threshold`); empty where nothing.
        budget: a ratio, 1.0 for what ignores budgets; other spellings as text (`512t`).
        seed: of the samples.
        details: what else it takes: the whole strategy, checkpoint, prompt template, stop ids, versions.
    """

    model: str
    task: str
    metric: str
    query_mode: str
    strategy: str
    budget: float | str
    seed: int
    settings: Mapping[str, Any] = field(default_factory=dict)
    details: Mapping[str, Any] = field(default_factory=dict)

    @cached_property
    def id(self) -> str:
        """Return the hash of everything here."""
        return digest(asdict(self))

    @property
    def label(self) -> str:
        """Return the strategy's name with what the grid changed: `flowmm policy.threshold=0.1`."""
        return " ".join([self.strategy, *(f"{path}={value}" for path, value in self.settings.items())])


@dataclass(frozen=True)
class Result:
    """What one sample showed under one configuration.

    Attributes:
        configuration: what it was answered under.
        sample: its number in the task.
        digest: of its content.
        prediction: what was answered.
        reference: the right answer.
        exact_match: whether the prediction is that to the last token.
        score: of the task's own metric.
        slot_accuracy: share of the answer's informative words that stand in their places.
        depth: how deep the evidence stands in the context, from 0 to 1; None where the task has no such grid.
        prompt_tokens: length of the prompt.
        new_tokens: length of the answer.
        kv_bytes: keys and values held once prompt or context is compressed.
        full_bytes: what they would take in full.
        slots: per KV head, mean over layers.
        compress_seconds: this sample's share of the time that its batch took to compress; None where not measured.
        decode_seconds: likewise, per decoded token.
        answer_nll, kl_to_full: nats per token, see `kvcomp eval`; None where not asked for.
        rho: per layer, the share of attention that crosses modalities; None where not measured.
        retention: per layer and KV head, share of the evidence with a slot of its own; None where not asked for.
        made: when, in ISO 8601.
    """

    configuration: Configuration
    sample: int
    digest: str
    prediction: str
    reference: str
    exact_match: bool
    score: float
    slot_accuracy: float
    prompt_tokens: int
    new_tokens: int
    kv_bytes: float
    full_bytes: float
    slots: float
    depth: float | None = None
    compress_seconds: float | None = None
    decode_seconds: float | None = None
    answer_nll: float | None = None
    kl_to_full: float | None = None
    rho: tuple[float | None, ...] = ()
    retention: tuple[tuple[float, ...], ...] | None = None
    made: str = ""

    @property
    def key(self) -> str:
        """Return the hash of everything that determines this result."""
        return result_key(self.configuration, self.sample, self.digest)

    def row(self) -> dict[str, Any]:
        """Return the result as one flat row of a table: numbers, texts and None."""
        own = {name: getattr(self, name) for name in OWN if name not in ("digest", "made")}
        own["exact_match"] = int(self.exact_match)
        own["rho"] = json.dumps(self.rho) if self.rho else None
        own["retention"] = None if self.retention is None else json.dumps(self.retention)
        configuration = self.configuration
        settings = json.dumps(dict(configuration.settings)) if configuration.settings else None
        place = {name: getattr(configuration, name) for name in COLUMNS}
        return place | own | {"metric": configuration.metric, "settings": settings}


OWN = tuple(entry.name for entry in fields(Result) if entry.name != "configuration")


@dataclass(frozen=True)
class Planned:
    """A configuration, and how many samples are to be answered under it."""

    configuration: Configuration
    samples: int


@dataclass(frozen=True)
class Run:
    """One run of an ablation: its file, and what it ran on. `finished` is None while it runs or once it was killed."""

    config: Mapping[str, Any]
    environment: Mapping[str, Any]
    started: str
    finished: str | None


@dataclass(frozen=True, eq=False)
class Study:
    """What a folder holds of its latest run, results of earlier runs that are of the same plan included.

    Attributes:
        run: the latest.
        planned: its configurations, in the order of its file.
        results: in the order of the plan, then of the samples; of a configuration that was skipped none, though some
            of its samples may have been answered before.
        skipped: why a configuration cannot be, by its id: its strategy refuses the model or the budget.
        stale: how many other results the folder holds, of another plan, checkpoint, version, or sample.
    """

    run: Run
    planned: tuple[Planned, ...]
    results: tuple[Result, ...]
    stale: int
    skipped: Mapping[str, str] = field(default_factory=dict)

    def missing(self) -> list[tuple[Configuration, int]]:
        """Return the configurations that are not complete, and how many samples each lacks; those that are skipped left
        out.
        """
        have: dict[str, int] = {}
        for result in self.results:
            have[result.configuration.id] = have.get(result.configuration.id, 0) + 1
        asked = [entry for entry in self.planned if entry.configuration.id not in self.skipped]
        lacking = [(entry.configuration, entry.samples - have.get(entry.configuration.id, 0)) for entry in asked]
        return [(configuration, count) for configuration, count in lacking if count > 0]


def digest(document: Any) -> str:
    """Return the SHA-256 of plain data, whatever the order of its keys."""
    text = json.dumps(document, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def result_key(configuration: Configuration, sample: int, sample_digest: str) -> str:
    """Return the key of the result of one sample under one configuration."""
    return digest([FORMAT, configuration.id, sample, sample_digest])
