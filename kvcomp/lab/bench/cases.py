"""What is timed beside one another: transformers' own caches, and strategies."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers import Cache, DynamicCache, StaticCache

from kvcomp.core.config import strategy
from kvcomp.core.strategy import Strategy
from kvcomp.lab.compare import budget_of
from kvcomp.runtime.session import compress

STOCK = "DynamicCache"
COMPILED = "StaticCache, compiled"

Forward = Callable[..., Any]


@dataclass(frozen=True)
class Opened:
    """A cache that is ready for a prompt.

    Attributes:
        cache: the cache.
        step: what decodes a token.
    """

    cache: Cache
    step: Forward


@dataclass(frozen=True, eq=False)
class Case:
    """One kind of cache.

    Attributes:
        name: how it is called in results.
        strategy: what compresses it; None for a cache of transformers.
        compiled: a cache whose slots lie at fixed addresses, decoded with `torch.compile`.
        steps: compiled functions by model, so that each is compiled once.
    """

    name: str
    strategy: Strategy | None = None
    compiled: bool = False
    steps: dict[int, Forward] = field(default_factory=dict)

    @property
    def budget(self) -> float | str:
        """Return what is kept."""
        return 1.0 if self.strategy is None or self.strategy.ignores_budget else budget_of(self.strategy)

    @contextmanager
    def open(self, model: nn.Module, tokens: int, decoded: int) -> Iterator[Opened]:
        """Give a new cache for a prompt of `tokens`, with room for what is decoded."""
        config: Any = model.config
        step = self._compiled_step(model) if self.compiled else model
        if self.strategy is not None:
            with compress(model, self.strategy, reserve=decoded, compiled=self.compiled) as cache:
                yield Opened(cache, step)
        elif self.compiled:
            yield Opened(StaticCache(config=config, max_cache_len=tokens + decoded), step)
        else:
            yield Opened(DynamicCache(config=config), step)

    def _compiled_step(self, model: nn.Module) -> Forward:
        """Return the compiled model, the same for all turns; it compiles when it is first called."""
        if id(model) not in self.steps:
            self.steps[id(model)] = torch.compile(model, dynamic=False, fullgraph=True)
        return self.steps[id(model)]

    def forget(self) -> None:
        """Drop what was compiled."""
        self.steps.clear()


def make_cases(recipes: Sequence[str], budgets: Sequence[float | str], *, compiled: bool = False) -> list[Case]:
    """Return the stock cache first, then every recipe at every budget; a recipe that ignores the budget once. Where
    compiled decoding is asked for, a static cache and every recipe are there compiled as well.

    Raises:
        UnknownNameError, ConfigError, BudgetError: there is no such recipe, or not at this budget.
    """
    cases = [Case(STOCK), *([Case(COMPILED, compiled=True)] if compiled else [])]
    for recipe in recipes:
        for budget in budgets:
            made = strategy(recipe, budget)
            name = made.name if made.ignores_budget else f"{made.name} at {budget_of(made)}"
            if name not in {case.name for case in cases}:
                cases += [Case(name, made), *([Case(f"{name}, compiled", made, compiled=True)] if compiled else [])]
    return cases
