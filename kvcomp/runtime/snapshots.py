"""Snapshots of a cache: many questions against one compressed context, without copying it."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from kvcomp.core.strategy import Strategy
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
    "output",
    "carried",
    "memory",
    "log",
    "steps",
    "prompt",
    "rotary",
    "compressions",
)


@dataclass(frozen=True, eq=False)
class LayerSnapshot:
    """One compressed layer: what its storage needs to come back, and its state by name."""

    storage: Any
    state: Mapping[str, Any]

    @classmethod
    def of(cls, layer: CompressedCacheLayer) -> LayerSnapshot:
        """Return a snapshot of a layer, sharing its memory."""
        return cls(layer.storage.snapshot(), {name: getattr(layer, name) for name in STATE})

    def put_back(self, layer: CompressedCacheLayer) -> None:
        """Make a layer what it was."""
        layer.forget_forward()
        layer.storage.restore(self.storage)
        for name, value in self.state.items():
            setattr(layer, name, value)


@dataclass(frozen=True, eq=False)
class Snapshot:
    """A cache at one moment. Layers that are not compressed are copied, since transformers changes them in place."""

    strategy: Strategy
    compressed: Mapping[int, LayerSnapshot]
    others: Mapping[int, Any]
    fed: tuple[Tensor, ...]

    @classmethod
    def of(cls, layers: list[Any], strategy: Strategy, fed: tuple[Tensor, ...]) -> Snapshot:
        """Return a snapshot of all layers of a cache, and of what waits to be fed again."""
        pairs = list(enumerate(layers))
        return cls(
            strategy,
            {number: LayerSnapshot.of(layer) for number, layer in pairs if isinstance(layer, CompressedCacheLayer)},
            {number: copy.deepcopy(layer) for number, layer in pairs if not isinstance(layer, CompressedCacheLayer)},
            fed,
        )

    def put_back(self, layers: list[Any]) -> None:
        """Make all layers of a cache what they were."""
        for number, snapshot in self.compressed.items():
            snapshot.put_back(layers[number])
        for number, layer in self.others.items():
            layers[number] = copy.deepcopy(layer)
