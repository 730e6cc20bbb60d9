"""Snapshots of a cache: many questions against one compressed context, without copying it."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from kvcomp.core.errors import UnsupportedUseError
from kvcomp.core.strategy import Strategy
from kvcomp.runtime.fed import Fed
from kvcomp.runtime.layer import CompressedCacheLayer

# What a layer is, beside its storage. All of it is replaced when it changes, never changed in place.
STATE = (
    "is_initialized",
    "dtype",
    "device",
    "form",
    "held_table",
    "tokens",
    "next_positions",
    "tail",
    "seen",
    "trimmed",
    "holds_padding",
    "rho",
    "seconds",
    "forwards",
    "observed",
    "repeated",
    "output",
    "carried",
    "memory",
    "granted",
    "log",
    "steps",
    "prompt",
    "rotary",
    "transcript",
    "compressions",
)


@dataclass(frozen=True, eq=False)
class LayerSnapshot:
    """One compressed layer: what its storage needs to come back, and its state by name.

    Attributes:
        slots: keys and values `(batch, kv_heads, tokens, head_dim)` while nothing is compressed yet, else None.
    """

    storage: Any
    state: Mapping[str, Any]
    slots: tuple[Tensor, Tensor] | None

    @classmethod
    def of(cls, layer: CompressedCacheLayer) -> LayerSnapshot:
        """Return a snapshot of a layer, sharing its memory."""
        slots = layer.storage.read() if layer.pending and not layer.trimmed else None
        return cls(layer.storage.snapshot(), {name: getattr(layer, name) for name in STATE}, slots)

    def put_back(self, layer: CompressedCacheLayer) -> None:
        """Make a layer what it was."""
        layer.forget_forward()
        layer.fixed = None
        layer.storage.restore(self.storage)
        self._set_state(layer)

    def hand_over(self, layer: CompressedCacheLayer) -> None:
        """Make a layer of another request what it would be, had it read the prompt."""
        assert self.slots is not None
        layer.reset()
        layer.storage.append(*self.slots)
        self._set_state(layer)
        layer.go_on()

    def _set_state(self, layer: CompressedCacheLayer) -> None:
        for name, value in self.state.items():
            setattr(layer, name, value)


@dataclass(frozen=True, eq=False)
class Snapshot:
    """A cache at one moment. Layers that are not compressed are copied, since transformers changes them in place."""

    strategy: Strategy
    compressed: Mapping[int, LayerSnapshot]
    others: Mapping[int, Any]
    fed: tuple[Fed, ...]

    @classmethod
    def of(cls, layers: list[Any], strategy: Strategy, fed: tuple[Fed, ...]) -> Snapshot:
        """Return a snapshot of all layers of a cache, and of what waits to be fed again."""
        pairs = list(enumerate(layers))
        return cls(
            strategy,
            {number: LayerSnapshot.of(layer) for number, layer in pairs if isinstance(layer, CompressedCacheLayer)},
            {number: copy.deepcopy(layer) for number, layer in pairs if not isinstance(layer, CompressedCacheLayer)},
            fed,
        )

    @property
    def pending(self) -> bool:
        """Return whether nothing is compressed yet in any layer."""
        return all(snapshot.slots is not None for snapshot in self.compressed.values())

    def put_back(self, layers: list[Any]) -> None:
        """Make all layers of a cache what they were."""
        for number, snapshot in self.compressed.items():
            snapshot.put_back(layers[number])
        self._copy_others(layers)

    def hand_over(self, layers: list[Any], strategy: Strategy) -> None:
        """Make all layers of a cache of another strategy what they would be, had that read the prompt.

        Raises:
            UnsupportedUseError: something is compressed, or that strategy wants to know more than is held.
        """
        if not self.pending:
            raise UnsupportedUseError(
                f"the snapshot is of a cache with strategy {self.strategy.name!r} at {self.strategy.budget}, and this "
                f"one has {strategy.name!r} at {strategy.budget}; only one in which nothing is compressed yet, as of "
                "session.shared_cache(strategies), serves several"
            )
        for number, snapshot in self.compressed.items():
            snapshot.hand_over(layers[number])
        self._copy_others(layers)

    def _copy_others(self, layers: list[Any]) -> None:
        for number, layer in self.others.items():
            layers[number] = copy.deepcopy(layer)
