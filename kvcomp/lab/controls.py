"""What is measured: a strategy, or a control that a strategy is held against."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kvcomp.core.config import strategy
from kvcomp.core.errors import InputError, UnknownNameError, suggest
from kvcomp.core.ignored import warn_of_ignored
from kvcomp.core.interfaces import Observation, Scorer
from kvcomp.core.registry import registry
from kvcomp.core.strategy import Strategy
from kvcomp.core.types import LayerView
from kvcomp.lab.batches import Batch
from kvcomp.lab.tasks import Sample


@dataclass(frozen=True)
class Method:
    """A strategy, the same for every sample."""

    strategy: Strategy

    def ask(self, sample: Sample) -> Sample:
        """Return what the model is asked instead of the sample."""
        return sample

    def strategy_for(self, batch: Batch) -> Strategy:
        """Return the strategy that serves a batch."""
        return self.strategy


class KeepEvidence(Scorer, use="keep-evidence"):
    """Keep the evidence whatever another scorer says of it. No method: it is told what the question is about.

    Attributes:
        scorer: ranks the other tokens.
        evidence: for each row of the batch, positions in the prompt.
    """

    scorer: Scorer
    evidence: tuple[tuple[int, ...], ...]

    def observations(self) -> tuple[Observation, ...]:
        """Return what the other scorer reads."""
        return self.scorer.observations()

    def score(self, layer: LayerView, slots: Tensor) -> Tensor:
        """Return the scores of the other scorer."""
        return self.scorer.score(layer, slots)

    def protect(self, layer: LayerView, slots: Tensor) -> Tensor:
        """Return the evidence, and what the other scorer protects."""
        rows = [torch.isin(row, row.new_tensor(known)) for row, known in zip(layer.indices, self.evidence, strict=True)]
        evidence = torch.stack(rows)
        protected = self.scorer.protect(layer, slots)
        return evidence if protected is None else evidence | protected


class Oracle(Method):
    """Keeps the evidence of every sample, then what the strategy keeps: an upper bound."""

    def strategy_for(self, batch: Batch) -> Strategy:
        """Return the strategy that knows the evidence of this batch."""
        assert self.strategy.scorer is not None
        return replace(self.strategy, scorer=KeepEvidence(scorer=self.strategy.scorer, evidence=batch.evidence))


class NoContext(Method):
    """Asks the question alone: what can be guessed."""

    def ask(self, sample: Sample) -> Sample:
        """Return the sample without its context.

        Raises:
            InputError: nothing is left of it.
        """
        if not sample.question:
            raise InputError(
                "no-context asks the question alone, and here it is part of the context; use another control"
            )
        return replace(sample, context=(), evidence=(), depth=None)


CONTROLS: dict[str, tuple[type[Method], Mapping[str, Any]]] = {
    "oracle": (Oracle, {"name": "oracle", "base": "recency"}),
    "no-context": (NoContext, {"name": "no-context"}),
}
"""Beside the recipes; a recipe of the same name comes first."""


def find_method(source: str | Path | Mapping[str, Any], budget: Any = None, **overrides: Any) -> Method:
    """Return the method of this name: a recipe, a control, or a strategy file.

    Args:
        source: a name, a path of a YAML file, or a mapping of the same form.
        budget: replaces the budget.
        overrides: change its parts, as in `kvcomp.strategy`.

    Raises:
        BudgetError, ConfigError, UnknownNameError: there is no such method, or it cannot be built.

    Warns:
        IgnoredSettingWarning: something was given that changes nothing, as for `kvcomp.compress`.
    """
    build: Callable[[Strategy], Method] = Method
    if isinstance(source, str) and not source.endswith((".yaml", ".yml")):
        recipes = {entry.name for entry in registry.entries("recipe")}
        if source not in recipes | CONTROLS.keys():
            raise UnknownNameError(f"no strategy named {source!r}. {suggest(source, recipes | CONTROLS.keys())}")
        if source not in recipes:
            build, source = CONTROLS[source]
    built = strategy(source, budget, **overrides)
    warn_of_ignored(built, stacklevel=2)
    return build(built)
