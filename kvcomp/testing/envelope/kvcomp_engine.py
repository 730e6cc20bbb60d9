"""kvcomp itself as an engine: a recipe or a strategy."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kvcomp.core.budget import Budget
from kvcomp.core.config import strategy
from kvcomp.core.errors import BudgetError, ConfigError, UnsupportedModelError, UnsupportedUseError
from kvcomp.core.strategy import Strategy
from kvcomp.runtime.cache_argument import CACHE
from kvcomp.runtime.session import attach, compress, load_cache
from kvcomp.testing.envelope.engine import Engine, NotClaimedError

CACHE_OPTIONS = ("defer", "reserve")


class KVCompEngine(Engine):
    """A recipe's name, file or mapping, or a strategy, through kvcomp's public interface."""

    refusals = (UnsupportedUseError, UnsupportedModelError, BudgetError)

    def __init__(self, source: Strategy | str | Path | Mapping[str, Any]) -> None:
        self.built = source if isinstance(source, Strategy) else strategy(source)
        self.name = self.built.name

    @contextmanager
    def compressing(self, model: Any, ratio: float, **options: Any) -> Iterator[Any]:
        """Give a compressed cache inside the block."""
        settings = {name: options.pop(name) for name in CACHE_OPTIONS if name in options}
        with compress(model, self.strategy(ratio, **options), **settings) as cache:
            yield cache

    def strategy(self, ratio: float, **options: Any) -> Strategy:
        """Return the strategy with this budget.

        Raises:
            NotClaimedError: the recipe cannot be combined with the options; the message is the configuration's.
        """
        store = self.built.store
        if "store" in options and store.shrinks:
            raise NotClaimedError(f"the method is its storage, {store.use!r}; with another it would be another method")
        made = replace(self.built, budget=Budget.parse(ratio))  # parts of it need not be registered
        try:
            made = strategy(made, **options) if options else made
        except ConfigError as error:
            raise NotClaimedError(" ".join(str(error).split())) from None
        if made.trigger.decoding and made.selector is None:
            raise NotClaimedError("the recipe has no selector: it keeps every token")
        return made

    def kept_bytes(self, cache: Any) -> int:
        """Return the report's bytes, which are read from storages."""
        return int(cache.report().allocated_bytes)

    def least(self, ratio: float, model: Any, prompt: Mapping[str, Tensor]) -> float:
        """Return 1 for a recipe that ignores the budget, and for one that keeps every token the smallest that fits."""
        made = self.strategy(ratio)
        if made.ignores_budget:
            return 1.0
        try:
            with compress(model, made) as cache, torch.no_grad():
                model(**prompt, **{CACHE: cache})
        except BudgetError as error:
            if error.smallest is None:
                raise
            return max(ratio, error.smallest)
        return ratio

    def irreversible(self) -> str:
        """Return that a storage codes tokens in blocks."""
        store = self.built.store
        return f"storage {store.use!r} codes tokens in blocks, which are not taken apart again" if store.shrinks else ""

    def next_turn(self, cache: Any, model: Any, inputs: Mapping[str, Tensor]) -> dict[str, Any]:
        """Return what the cache says: positions of its own, and only the media that are new."""
        arguments: dict[str, Any] = cache.next_turn(model, **inputs)
        return arguments

    @contextmanager
    def serving(self, model: Any, ratio: float) -> Iterator[Callable[[], Any]]:
        """Attach the model inside the block."""
        session, made = attach(model), self.strategy(ratio)
        try:
            yield lambda: session.cache(made)
        finally:
            session.detach()

    def snapshot(self, cache: Any) -> Any:
        """Return a snapshot, which shares the cache's memory."""
        return cache.snapshot()

    def restore(self, cache: Any, snapshot: Any) -> None:
        """Put a snapshot back."""
        cache.restore(snapshot)

    def save(self, cache: Any, path: Path) -> None:
        """Write a safetensors file."""
        cache.save(path)

    def load(self, path: Path, model: Any) -> Any:
        """Read it."""
        return load_cache(path, model)
