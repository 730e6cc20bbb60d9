"""What is measured: a strategy, or a control that a strategy is held against."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kvcomp.core.config import strategy
from kvcomp.core.errors import IgnoredSettingWarning, InputError, UnknownNameError, suggest
from kvcomp.core.ignored import ignored_settings
from kvcomp.core.interfaces import Observation, Scorer
from kvcomp.core.registry import registry
from kvcomp.core.strategy import Strategy
from kvcomp.core.types import LayerView
from kvcomp.lab.batches import Batch
from kvcomp.lab.tasks import Sample


@dataclass(frozen=True)
class Method:
    """A strategy, the same for every sample but for the lots that it draws."""

    strategy: Strategy

    def ask(self, sample: Sample) -> Sample:
        """Return what the model is asked instead of the sample."""
        return sample

    def strategy_for(self, batch: Batch) -> Strategy:
        """Return the strategy that serves a batch."""
        return self.strategy.for_samples(batch.numbers)

    def ignored(self) -> tuple[str, ...]:
        """Return a sentence for everything it was given that changes nothing."""
        return ignored_settings(self.strategy)


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
        evidence = _among(layer, self.evidence)
        protected = self.scorer.protect(layer, slots)
        return evidence if protected is None else evidence | protected


class Oracle(Method):
    """Keeps the evidence of every sample, then what the strategy keeps: an upper bound."""

    def strategy_for(self, batch: Batch) -> Strategy:
        """Return the strategy that knows the evidence of this batch.

        Raises:
            InputError: of a sample none is known: what it kept then would be no upper bound.
        """
        for number, sample in zip(batch.numbers, batch.samples, strict=True):
            if not sample.evidence:
                raise InputError(
                    f"the oracle keeps the evidence of a sample, and none is known of {batch.name(number)}; use "
                    "another control"
                )
        drawn = self.strategy.for_samples(batch.numbers)
        assert drawn.scorer is not None
        return replace(drawn, scorer=KeepEvidence(scorer=drawn.scorer, evidence=batch.evidence))


class LeaveOut(Scorer, use="leave-out"):
    """Rank some tokens below all others, which are equal. No method: it is told which.

    Attributes:
        tokens: for each row of the batch, positions in the prompt.
    """

    tokens: tuple[tuple[int, ...], ...]

    def score(self, layer: LayerView, slots: Tensor) -> Tensor:
        """Return zeros."""
        return torch.zeros(layer.shape, device=layer.keys.device)

    def tiers(self, layer: LayerView, slots: Tensor) -> Tensor:
        """Return two tiers, these tokens in the lower one."""
        return (~_among(layer, self.tokens)).to(torch.int16)


UPPER_TIER = {"budget": {"tokens": 1}, "scorer": "position", "selector": {"use": "top-k", "overflow": True}}
"""Keeps the upper tier of a scorer that stands in for this one, all of it and nothing else."""


class NoImages(Method):
    """Keeps everything but images: what can be answered without what was shown.

    An image goes with the marks around it: a model may write into the end mark what it has seen (`minimile-xs` does),
    and then the visual tokens alone can go at no loss.
    """

    def strategy_for(self, batch: Batch) -> Strategy:
        """Return the strategy that keeps what is no image in this batch, however much that is."""
        upper = strategy(
            {"budget": {"tokens": 1}, "scorer": "position", "selector": {"use": "top-k", "overflow": True}}
        )
        left_out = LeaveOut(tokens=batch.images)
        return replace(self.strategy, budget=upper.budget, scorer=left_out, selector=upper.selector)

    def ignored(self) -> tuple[str, ...]:
        """Return a sentence if it was given a budget, a scorer or a selector."""
        if self.strategy.budget.ratio == 1 and self.strategy.scorer is None and self.strategy.selector is None:
            return ()
        return (f"{self.strategy.name!r} keeps all but images, so it ignores a budget, a scorer and a selector",)


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
    "no-images": (NoImages, {"name": "no-images"}),
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
    method = build(strategy(source, budget, **overrides))
    for sentence in method.ignored():
        warnings.warn(sentence, IgnoredSettingWarning, stacklevel=2)
    return method


def _among(layer: LayerView, tokens: Sequence[Sequence[int]]) -> Tensor:
    """Return which tokens of a layer stand at these positions of their rows, `(batch, kv_heads, tokens)` bool."""
    rows = zip(layer.indices, tokens, strict=True)
    return torch.stack([torch.isin(row, row.new_tensor(known)) for row, known in rows])
