"""A library that compresses caches, as the features of the envelope see it: kvcomp, or a peer."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from torch import Tensor

from kvcomp.runtime.cache_argument import CACHE


class NotClaimedError(RuntimeError):
    """What is tried is not claimed: by the library, the method or the family. Its cell is a dash with this reason."""


class Engine(ABC):
    """One method of one library.

    Two methods are needed. The others are abilities that a library may claim: what it does not override, it does not
    claim, and the cells of the features that need it are dashes.

    Attributes:
        name: of the method.
        refusals: the errors by which the library says clearly that it does not do something.
    """

    name: str
    refusals: tuple[type[Exception], ...] = (NotImplementedError,)

    @property
    def dashes(self) -> tuple[type[Exception], ...]:
        """Return the errors that make a dash of a cell, and not red."""
        return (NotClaimedError, *self.refusals)

    @abstractmethod
    def compressing(self, model: Any, ratio: float, **options: Any) -> AbstractContextManager[Any]:
        """Give the cache for `model.generate(..., past_key_values=cache)` inside the block.

        Args:
            model: a transformers model.
            ratio: what is kept, in (0, 1].
            options: `defer=True` (prompts in chunks, compressed once), `turns="append"` (later turns stay whole),
                `trigger` (compression while tokens are decoded), `store` (another storage).

        Raises:
            NotClaimedError: the library has no such option, or the method cannot use it.
        """

    @abstractmethod
    def kept_bytes(self, cache: Any) -> int:
        """Return the bytes of keys and values in use, of the layers that are compressed, read from their storages."""

    def least(self, ratio: float, model: Any, prompt: Mapping[str, Tensor]) -> float:
        """Return the ratio, or the smallest above it with which the method can hold this prompt."""
        return ratio

    def irreversible(self) -> str:
        """Return why a token cannot be taken back without a trace, nothing where it can."""
        return ""

    def next_turn(self, cache: Any, model: Any, inputs: Mapping[str, Tensor]) -> dict[str, Any]:
        """Return the arguments of `generate` for a later turn: the whole conversation, without media."""
        return {name: inputs[name] for name in ("input_ids", "attention_mask")} | {CACHE: cache}

    def serving(self, model: Any, ratio: float) -> AbstractContextManager[Callable[[], Any]]:
        """Give a function that makes caches, for several requests that share the model inside the block."""
        raise NotClaimedError("no interface for several requests on one model at a time")

    def snapshot(self, cache: Any) -> Any:
        """Return what `restore` needs to make the cache what it is now."""
        raise NotClaimedError("no snapshots of a compressed cache")

    def restore(self, cache: Any, snapshot: Any) -> None:
        """Make the cache what it was."""
        raise NotClaimedError("no snapshots of a compressed cache")

    def save(self, cache: Any, path: Path) -> None:
        """Write the cache to a file."""
        raise NotClaimedError("no files of a compressed cache")

    def load(self, path: Path, model: Any) -> Any:
        """Return the cache of a file."""
        raise NotClaimedError("no files of a compressed cache")
