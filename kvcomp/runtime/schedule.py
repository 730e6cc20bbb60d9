"""When the layers of a cache are compressed: each by itself, or together where they share one budget."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from kvcomp.core.strategy import Strategy
from kvcomp.core.types import LayerView, Scores
from kvcomp.runtime.compression import LayerCompression


class Schedule:
    """What one strategy asks for, and the layers that wait until the last of them is known."""

    def __init__(self, strategy: Strategy) -> None:
        self.strategy = strategy
        self._waiting: list[tuple[LayerCompression, LayerView, Scores]] = []

    def forget(self) -> None:
        """Let go of what waits."""
        self._waiting.clear()

    def compress(self, layer: LayerCompression, *, decoding: bool = False) -> None:
        """Compress a layer; with a model-wide allocator, all layers once the last one is given.

        Args:
            layer: that is compressed.
            decoding: whether tokens are being decoded, so that the layers go on to share the budget as they did.
        """
        prepared = layer.prepare()
        if self.strategy.allocator.scope == "layer":
            if prepared is not None:
                layer.trim()
            return
        if prepared is not None:
            self._waiting.append((layer, *prepared))
        if layer.number == layer.layers - 1 and self._waiting:
            self._trim_together(decoding=decoding)

    def compress_decoded(self, layers: Sequence[LayerCompression]) -> None:
        """Compress all layers again after one more decoded token where the trigger says so: a budget is of all layers,
        which may share it unevenly.
        """
        due = self._is_due(layers)
        for layer in layers:
            if due:
                self.compress(layer, decoding=True)
            else:
                layer.fold()

    def _is_due(self, layers: Sequence[LayerCompression]) -> bool:
        if self.strategy.trigger.every is not None:
            return layers[0].steps >= self.strategy.trigger.every
        return bool((torch.stack([layer.excess() for layer in layers]).sum(dim=0) > 0).any())

    def _trim_together(self, *, decoding: bool) -> None:
        layers, views, scores = zip(*self._waiting, strict=True)
        self._waiting.clear()
        together = self.strategy.together(views, scores)
        before = [layer.granted for layer in layers if layer.granted is not None] if decoding else []
        granted = torch.stack(before) if before else None
        allotted = self.strategy.allocate(layers[0].share(), views, together, granted=granted)
        for layer, slots, seen in zip(layers, allotted, together, strict=True):
            if granted is None and self.strategy.recompresses:
                layer.granted = slots
            layer.trim(slots, seen)
